"""Rate and distortion of the rows of benchmarks/tables.py as a picture."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from io import BytesIO

from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator
from table_rows import PAPER_ROWS, VARIANTS

from looc_ldm.analysis.rate_distortion import OCTAVES, Point, draw_rate_distortion
from looc_ldm.analysis.style import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, new_figure, style

HEIGHT, LINE, COLUMNS = 3.0, 0.18, 3  # inches of a figure without its legend, and of a line of the legend
# One colour per method, the same in every plot; the last six are from Paul Tol's "muted" scheme (2021).
METHODS = {
    "looc": ("LooC", BLUE),
    "vq": ("VQ-VAE", "black"),
    "cvq": ("CVQ-VAE", PURPLE),
    "sq": ("SQ-VAE", ORANGE),
    "pq": ("PQ", RED),
    "rq": ("RQ", GREEN),
    "factorized": ("ViT-VQGAN", SKY),
    "fsq": ("FSQ", "#999933"),
    "lfq": ("LFQ", "#882255"),
    "rfsq": ("residual FSQ", "#44aa99"),
    "gsq": ("GSQ", "#332288"),
    "bsq": ("BSQ", "#ddcc77"),
    "simvq": ("SimVQ", "#aa4499"),
}
# One marker and one name per way in which the codebook learns.
MARKERS = {
    "": ("o", ""),
    "-rotation": ("D", VARIANTS["-rotation"][1]),
    "-ema": ("s", VARIANTS["-ema"][1]),
    "-ema-rotation": ("^", "our default"),
    "-commitment8": ("X", "commitment 8"),
    "-ema-rotation-commitment8": ("*", "our default, commitment 8"),
    "-mean": ("d", "mean of its losses"),
}
# Figures of JPEGs; the white edge keeps them apart from ours of float images in the same colour.
HOLLOW = {
    "markerfacecolor": "none",
    "markeredgewidth": 0.9,
    "path_effects": [withStroke(linewidth=2.2, foreground="white")],
}
SOLID = {"markeredgecolor": "white", "markeredgewidth": 0.4, "linestyle": "none"}


def draw_plot(
    images: str, results: Sequence[dict], codecs: Sequence[dict], paper: dict, title: str, longer: Sequence[dict] = ()
) -> bytes:
    """Draw clean PSNR and SSIM over bits per pixel. Returns a PNG.

    Args:
        images: Name of the set.
        results: Rows with one training.
        codecs: Lines of benchmarks/image_codecs.py for the set.
        paper: Tables of the paper. Its PSNR is drawn as hollow circles; its SSIM has a different window.
        title: Title of the picture.
        longer: Rows with longer trainings, drawn as pentagons; hollow ones show PSNR under the protocol "paper".
    """
    families = defaultdict(list)
    for result in results:
        families[family_of(result["row"])].append(result["clean"])
    with style():
        figure = new_figure(HEIGHT)
        for number, name in enumerate(("psnr", "ssim")):
            axes = figure.add_subplot(1, 2, number + 1)
            _draw_codecs(axes, codecs, name)
            for (method, variant, interpolates), points in sorted(families.items(), key=_legend_order):
                for point in points:
                    axes.plot(
                        point["bits_per_pixel"],
                        point[name],
                        "P" if interpolates else MARKERS[variant][0],
                        color=METHODS[method][1],
                        markersize=7 if MARKERS[variant][0] == "*" else 4.5,
                        zorder=3 + point["psnr"] / 100,  # the better above the worse
                        label=_label(method, variant, interpolates) if point is points[0] else None,
                        **SOLID,
                    )
            for result in longer:
                color, rate = METHODS[result["row"].split("-")[0]][1], result["clean"]["bits_per_pixel"]
                axes.plot(rate, result["clean"][name], "p", color=color, markersize=8, zorder=5, **SOLID)
                if name == "psnr":
                    axes.plot(rate, result["paper"]["psnr"], "p", color=color, zorder=6, **HOLLOW)
            if name == "psnr":
                for rate, psnr, method in _points_of_paper(images, paper, results):
                    axes.plot(rate, psnr, "o", color=METHODS[method][1], markersize=4.5, zorder=6, **HOLLOW)
                if longer:
                    axes.plot([], [], "p", color="0.3", markersize=8, label="trained longer")
                    axes.plot([], [], "p", mfc="none", color="0.3", label="the same, of JPEGs")
                axes.plot([], [], "o", mfc="none", color="0.3", markersize=5, label="the paper's, of JPEGs")
                handles, labels = axes.get_legend_handles_labels()
            axes.xaxis.set_major_locator(FixedLocator([2.0**i for i in OCTAVES]))
        figure.legend(handles, labels, loc="outside lower center", ncols=COLUMNS)
        figure.set_figheight(HEIGHT + LINE * math.ceil(len(labels) / COLUMNS))
        figure.suptitle(title)
        content = BytesIO()
        figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def family_of(row: str) -> tuple[str, str, bool]:
    """Return method, suffix for how the codebook learns, and whether the row interpolates."""
    variant = next(name for name in sorted(MARKERS, key=len, reverse=True) if row.endswith(name))
    return row.split("-")[0], variant, any(row.endswith(f"-s{s}") for s in (2, 3, 4))


def _label(method: str, variant: str, interpolates: bool) -> str:
    # A CVQ-VAE with interpolation is LooC with one segment.
    name = "LooC with m = 1" if method == "cvq" and interpolates else METHODS[method][0]
    rule = "published rule" if method == "looc" and not variant else MARKERS[variant][1]
    return ", ".join(filter(None, [name, rule, "s > 1" if interpolates else ""]))


def _legend_order(family: tuple) -> tuple:
    (method, variant, interpolates), _ = family
    return list(METHODS).index(method), list(MARKERS).index(variant), interpolates


def _draw_codecs(axes, codecs: Sequence[dict], name: str) -> None:
    curves = defaultdict(list)
    for line in codecs:
        if line.get("quality") is not None:
            curves[line["codec"]].append(Point(*(line[key] for key in ("quality", "bits_per_pixel", "psnr", "ssim"))))
        elif line["codec"] == "lossless webp":
            axes.axvline(line["bits_per_pixel"], color="0.75", linewidth=0.8, zorder=0)
            place = (line["bits_per_pixel"], 1.01)
            axes.annotate(
                "lossless WebP", place, xycoords=("data", "axes fraction"), fontsize=7, color="0.4", ha="right"
            )
    draw_rate_distortion(axes, curves, [], name)


def _points_of_paper(images: str, paper: dict, results: Sequence[dict]) -> set[tuple[float, float, str]]:
    """Return rate, PSNR and method of the paper's rows that were measured here."""
    rates = {result["row"]: result["clean"]["bits_per_pixel"] for result in results}
    rows = {row: paper[table][name].get(images, {}) for table in PAPER_ROWS for row, name in PAPER_ROWS[table].items()}
    return {(rates[row], rows[row]["psnr"], row.split("-")[0]) for row in rates if "psnr" in rows.get(row, {})}
