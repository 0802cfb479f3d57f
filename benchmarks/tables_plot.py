"""Rate and distortion of the rows of benchmarks/tables.py as a picture."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from io import BytesIO

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator
from table_rows import PAPER_ROWS, ROWS, VARIANTS

from looc_ldm.analysis.rate_distortion import OCTAVES, Point, draw_rate_distortion
from looc_ldm.analysis.style import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, new_figure, style

HEIGHT, LINE = 3.0, 0.18  # inches, of a figure without its legend, and of a line of that
# A colour for each method, the same in every plot; the last three are of Paul Tol's "muted" scheme (2021).
METHODS = {
    "looc": ("LooC", BLUE),
    "vq": ("VQ-VAE", "black"),
    "cvq": ("CVQ-VAE", PURPLE),
    "hvq": ("HVQ-VAE", "0.5"),
    "sq": ("SQ-VAE", ORANGE),
    "pq": ("PQ", RED),
    "rq": ("RQ", GREEN),
    "factorized": ("ViT-VQGAN", SKY),
    "fsq": ("FSQ", "#999933"),
    "lfq": ("LFQ", "#882255"),
    "rfsq": ("residual FSQ", "#44aa99"),
}
# A marker for each way in which the codebook learns.
MARKERS = {
    "": "o",
    "-rotation": "D",
    "-ema": "s",
    "-ema-rotation": "^",
    "-commitment8": "X",
    "-ema-rotation-commitment8": "*",
    "-mean": "d",
}
# Figures of JPEGs: above ours of float images, also where these have the same colour.
HOLLOW = {
    "markerfacecolor": "none",
    "markeredgewidth": 0.9,
    "path_effects": [withStroke(linewidth=2.2, foreground="white")],
}
SIZES = {"-ema-rotation-commitment8": 7}  # points of a marker, where it is not 4.5
SHORT = {
    "-ema-rotation": "our default",
    "-commitment8": "commitment 8",
    "-ema-rotation-commitment8": "our default, commitment 8",
    "-mean": "mean of its losses",
}
POSITION_PIXELS = 16  # pixels of a latent position, f = 4


def draw_plot(
    images: str, results: list[dict], codecs: dict, paper: dict, title: str, longer: Sequence[dict] = ()
) -> bytes:
    """PSNR and SSIM, clean, over bits per pixel, as a PNG.

    Args:
        images: Name of the set.
        results: Of one training.
        codecs: The record of `tables.measure_codecs`, or nothing.
        paper: The tables of the paper.
        title: Above the picture.
        longer: Results of longer or annealed trainings, shown as pentagons, hollow ones by the protocol paper.
    """
    curves = {name: [Point(**point) for point in points] for name, points in codecs.get("codecs", {}).items()}
    families = defaultdict(list)
    for result in results:
        families[family_of(result["row"])].append(result["test"]["clean"])
    stated = _of_paper(images, paper)
    with style():
        figure = new_figure(HEIGHT)
        for number, name in enumerate(("psnr", "ssim")):
            axes = figure.add_subplot(1, 2, number + 1)
            draw_rate_distortion(axes, curves, [], name)
            if codecs:
                lines = ((codecs["lossless"]["webp"], "lossless WebP", "right"), (codecs["raw"], "raw", "left"))
                for rate, word, side in lines:
                    axes.axvline(rate, color="0.75", linewidth=0.8, zorder=0)
                    place = (rate, 1.01)
                    axes.annotate(word, place, xycoords=("data", "axes fraction"), fontsize=7, color="0.4", ha=side)
            for kind, points in stated.items() if name == "psnr" else ():  # its SSIM has another window
                label = None if any(kind == family[0] for family in families) else METHODS[kind][0]
                x, y = zip(*points, strict=True)
                axes.plot(x, y, "o", color=METHODS[kind][1], markersize=4.5, zorder=6, label=label, **HOLLOW)
            for (kind, variant, several), points in sorted(families.items(), key=_place):
                # What interpolates is LooC, also with the one segment of CVQ-VAE.
                method = "LooC with m = 1" if kind == "cvq" and several else METHODS[kind][0]
                words = ", ".join(filter(None, [method, _rule(kind, variant), "s > 1" if several else ""]))
                for point in points:
                    axes.plot(
                        point["bits_per_pixel"],
                        point[name],
                        marker="P" if several else MARKERS[variant],
                        color=METHODS[kind][1],
                        linestyle="none",
                        markersize=SIZES.get(variant, 4.5),
                        zorder=3 + point["psnr"] / 100,  # the better above the worse, whosever they are
                        markeredgecolor="white",
                        markeredgewidth=0.4,
                        label=words if point is points[0] else None,
                    )
            for result in longer:
                rate, color = result["test"]["clean"]["bits_per_pixel"], METHODS[family_of(result["row"])[0]][1]
                axes.plot(
                    rate,
                    result["test"]["clean"][name],
                    "p",
                    color=color,
                    markersize=8,
                    zorder=5,
                    markeredgecolor="white",
                    markeredgewidth=0.4,
                )
                if name == "psnr":  # where it stands by the paper's protocol
                    psnr = result["test"]["paper"]["psnr"]
                    axes.plot(rate, psnr, "p", color=color, zorder=6, **HOLLOW)
            if name == "psnr":
                if longer:
                    axes.plot([], [], "p", color="0.3", markersize=8, label="trained longer, or annealed")
                    axes.plot([], [], "p", mfc="none", color="0.3", label="the same, of JPEGs")
                axes.plot([], [], "o", mfc="none", color="0.3", markersize=5, label="the paper's, of JPEGs")
                handles, labels = axes.get_legend_handles_labels()
            axes.xaxis.set_major_locator(FixedLocator([2.0**i for i in OCTAVES]))
        _add_legend(figure, handles, labels)
        figure.suptitle(title)
        content = BytesIO()
        figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def _add_legend(figure: Figure, handles: list, labels: list[str]):
    """Below the axes, in as many columns as the width takes; the figure grows by its lines."""
    for columns in (3, 2, 1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        if legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(HEIGHT + LINE * math.ceil(len(labels) / columns))


def _of_paper(images: str, paper: dict) -> dict[str, list[tuple[float, float]]]:
    """By method, the rate and the PSNR of each row that the paper has of this set."""
    rows = {row: paper[table][name] for table in PAPER_ROWS for row, name in PAPER_ROWS[table].items()}
    found = defaultdict(list)
    for row, figures in rows.items():
        if "psnr" in figures.get(images, {}):
            found[row.split("-")[0]].append((_rate(row), figures[images]["psnr"]))
    return found


def _rate(row: str) -> float:
    """Bits per pixel of a row, where every pixel is in a latent position."""
    if ROWS[row].whole_model:
        return ROWS[row].make(1, 32, 1).bits_per_image(32, 32) / 32**2
    quantizer = ROWS[row].make(1) if ROWS[row].anneals else ROWS[row].make()
    return quantizer.bits_per_position / POSITION_PIXELS


def family_of(row: str) -> tuple[str, str, bool]:
    """Method, how its codebook learns (the end of the row's name), and whether it interpolates."""
    variant = next(name for name in sorted(MARKERS, key=len, reverse=True) if row.endswith(name))
    return row.split("-")[0], variant, any(row.endswith(f"-s{s}") for s in (2, 3, 4))


def _rule(kind: str, variant: str) -> str:
    if not variant:
        return "published rule" if kind == "looc" else ""
    return SHORT[variant] if variant in SHORT else VARIANTS[variant][1].removeprefix("published rule, ")


def _place(family: tuple) -> tuple:
    (kind, variant, several), _ = family
    return list(METHODS).index(kind), list(MARKERS).index(variant), several
