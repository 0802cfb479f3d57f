"""Self-contained HTML pages of text, pictures, tables and curves."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from html import escape

from PIL import Image

MAGNIFICATION = 2  # small images are shown larger, without smoothing

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
img { image-rendering: pixelated; display: block; max-width: 100%; }
.row { display: flex; align-items: center; gap: 1rem; }
.row span { flex: none; width: 6rem; text-align: right; }
.row img { min-width: 0; }
table { border-collapse: collapse; margin: .5rem 0; }
td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid #ddd; }
td:nth-child(2) { font-weight: 600; white-space: nowrap; }
td:nth-child(3) { color: #666; }
figure { margin: .5rem 0 0; }
figure img { image-rendering: auto; height: auto; }
figcaption { margin-top: .5rem; font-size: .9rem; color: #444; max-width: 46rem; }
"""


@dataclass(frozen=True)
class Curve:
    """One line of a plot: values over the images seen."""

    name: str
    images: list[int]
    values: list[float]


class Report:
    """A page, built part by part. Pictures are inside it."""

    def __init__(self, title: str):
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, html: str) -> None:
        """Add a paragraph, given as HTML."""
        self._parts.append(f"<p>{html}</p>")

    def image(self, image: Image.Image) -> None:
        self._parts.append(_tag(image))

    def row(self, name: str, image: Image.Image) -> None:
        """Add a picture with its name to the left."""
        self._parts.append(f'<div class="row"><span>{escape(name)}</span>{_tag(image)}</div>')

    def figure(self, svg: bytes, name: str, caption: str) -> None:
        """Add a drawing, the content of an SVG file, with its caption; `name` is its alternative text."""
        # Not inline: different drawings use the same ids for their parts.
        data = base64.b64encode(svg).decode()
        image = f'<img alt="{escape(name)}" src="data:image/svg+xml;base64,{data}">'
        self._parts.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")

    def table(self, rows: list[tuple[str, ...]]) -> None:
        cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
        self._parts.append("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")

    def curves(self, title: str, curves: list[Curve]) -> None:
        """Add a plot of curves over the images seen, with a logarithmic axis of values."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3), layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            axes.plot(curve.images, curve.values, label=curve.name)
        axes.set(title=title, xlabel="images seen", ylabel="loss", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
        self._parts.append(buffer.getvalue()[buffer.getvalue().index("<svg") :])

    def html(self) -> str:
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            f"<style>{STYLE}</style></head><body><h1>{escape(self.title)}</h1>{''.join(self._parts)}</body></html>\n"
        )


def _tag(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{image.width * MAGNIFICATION}" alt="" src="data:image/png;base64,{data}">'
