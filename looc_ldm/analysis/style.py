"""Style of all figures: colours that colour-blind readers can tell apart, and SVG text that can be searched."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color universal design" (2008).
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
HEAT = "magma"  # a colour map that rises evenly in lightness
WIDTH = 6.5  # inches, the text width of most papers
PNG_DPI = 200

SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "image.interpolation": "nearest",
    "svg.fonttype": "none",  # keep text as text, which readers can search and copy
    "svg.hashsalt": "looc-ldm",  # the same drawing always gives the same file
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Drawing:
    """A figure with its file name, title and caption."""

    name: str  # file name without suffix
    title: str  # heading
    caption: str  # plain text
    figure: Figure

    def png(self) -> bytes:
        """Return the content of the PNG file."""
        return self._saved("png")

    def svg(self) -> bytes:
        """Return the content of the SVG file. Scatter plots with thousands of dots are embedded as pixels."""
        return self._svg

    @cached_property  # cached: drawing is slow, and both the page and the file need it
    def _svg(self) -> bytes:
        return self._saved("svg", metadata={"Date": None})

    def _saved(self, kind: str, **kwargs) -> bytes:
        buffer = io.BytesIO()
        with style():
            self.figure.savefig(buffer, format=kind, dpi=PNG_DPI, **kwargs)
        return buffer.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """Use these settings for making and saving figures, and ignore the user's own matplotlib settings."""
    import matplotlib.style
    from cycler import cycler

    cycle = {"axes.prop_cycle": cycler(color=[BLUE, RED, GREEN, ORANGE, PURPLE, SKY, "black"])}
    with matplotlib.style.context(["default", {**SETTINGS, **cycle}]):
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """Return an empty figure with constrained layout; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    return figure


def picture(axes: Axes, pixels, **kwargs) -> object:
    """Draw an image without ticks: uint8 `(C, H, W)`, or numbers `(H, W)` with a colour map."""
    if pixels.ndim == 3:
        pixels = pixels.permute(1, 2, 0).numpy()
        pixels = pixels.repeat(3, axis=-1) if pixels.shape[-1] == 1 else pixels
    drawn = axes.imshow(pixels, **kwargs)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return drawn
