"""Several models on the same images: their names, the table, and the pictures."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

import numpy as np
import torch

from looc_ldm.analysis.rate_distortion import AXIS_NAMES, ModelPoint, Point, draw_rate_distortion
from looc_ldm.analysis.style import PNG_DPI, WIDTH, Drawing, new_figure, style

GENERIC_NAMES = ("model", "pipeline", "vqvae")  # of the folders that trainings end in
LARGEST_CELL = 256  # pixels; larger images are shown smaller
MAGNIFIED_CELL = 144  # pixels; smaller images are shown larger, as far as a whole factor fits into this
# Of the picture: pixels between cells, and between models; characters of a line of a label, and its size in points.
GAP, GROUP_GAP, LABEL_CHARACTERS, POINTS = 3, 12, 20, 6.5
DIFFERENCE_FACTORS = (16, 8, 4, 2)
CLIPPED_SHARE = 0.05  # of the values of a model's differences that may be too bright to show


@dataclass
class Compared:
    """One model of a comparison.

    Attributes:
        name (`str`): What it is called.
        figures (`dict`): What `evaluate_reconstruction` says, and `downsampling_factor` and `interpolation_factor`.
        reconstructions (`torch.Tensor` of shape `(n, C, H, W)`, uint8): Of the images that are shown.
    """

    name: str
    figures: dict
    reconstructions: torch.Tensor


def distinguishing_names(models: Sequence[str]) -> list[str]:
    """The shortest ends of folders or hub ids that tell them apart, without what all, or trainings, end in.

    `runs/a/model` and `runs/b/model` become `a` and `b`, and so do `runs/a/model` and `runs/b/pipeline`. A model that
    is there twice gets a number the second time.
    """
    parts = [Path(os.path.abspath(name)).parts if Path(name).is_dir() else tuple(name.split("/")) for name in models]
    different = len(set(parts))
    without = [path[:-1] if path[-1] in GENERIC_NAMES and len(path) > 1 else path for path in parts]
    parts = without if len(set(without)) == different else parts
    while different > 1 and len({path[-1] for path in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [path[:-1] for path in parts]
    length = 1
    while len({path[-length:] for path in parts}) < different:
        length += 1
    names: list[str] = []
    for path in parts:
        name, count = "/".join(path[-length:]), parts[: len(names)].count(path)
        names.append(f"{name} ({count + 1})" if count else name)
    return names


# The table ------------------------------------------------------------------------------------------------------------


def _number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


# Headings with the better direction, and how a figure is written. The names of figures that depend on a feature layer
# have it after an "@".
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "bits_per_pixel": ("bits/pixel ↓", lambda value: f"{value:#.4g}"),
    "bits_per_pixel_entropy": ("entropy, bits/pixel ↓", lambda value: f"{value:#.4g}"),
    "num_codevectors": ("K", _number(0)),
    "codevector_dim": ("d", _number(0)),
    "interpolation_factor": ("s", _number(0)),
    "downsampling_factor": ("f", _number(0)),
    "psnr": ("PSNR (dB) ↑", _number(2)),
    "ssim": ("SSIM ↑", _number(4)),
    "l1": ("L1 ↓", _number(4)),
    "lpips_vgg": ("LPIPS (VGG) ↓", _number(4)),
    "lpips_alex": ("LPIPS (AlexNet) ↓", _number(4)),
    "rfid": ("rFID{} ↓", _number(3)),
    "kid": ("KID{} ↓", _number(5)),
    "codebook_use": ("codebook use", lambda value: f"{value:.1%}"),
    "parameters": ("parameters", lambda value: f"{value / 1e6:.2f} M"),
}


def markdown_table(models: Sequence[Compared]) -> str:
    """A row a model, in their order, with the figures that were measured; readable as it stands."""
    rows = [["model"], *([model.name.replace("|", "\\|")] for model in models)]
    for known, (heading, write) in COLUMNS.items():
        for figure in models[0].figures:
            name, _, layer = figure.partition("@")
            if name != known:
                continue
            rows[0].append(heading.format(f"@{layer}" if layer else ""))
            for row, model in zip(rows[1:], models, strict=True):
                row.append(write(model.figures[figure]))
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in (rows[0], ruler, *rows[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# The pictures ---------------------------------------------------------------------------------------------------------


def difference_factor(originals: torch.Tensor, models: Sequence[Compared]) -> int:
    """By how much the differences of all models are amplified.

    For each model there is a largest factor that clips little, at least 2; this is the middle one, so that a single
    model that is far better or worse than the others leaves theirs to be seen.
    """
    return median_low(_own_factor(_difference(originals, model.reconstructions)) for model in models)


def _own_factor(differences: torch.Tensor) -> int:
    for factor in DIFFERENCE_FACTORS:
        if (differences * factor > 255).double().mean() <= CLIPPED_SHARE:
            break
    return factor


def comparison_picture(originals: torch.Tensor, models: Sequence[Compared], factor: int) -> Drawing:
    """Originals, and below them each model's reconstructions and their absolute differences, amplified.

    Args:
        originals (`torch.Tensor` of shape `(n, C, H, W)`, uint8): The images, a column each.
        models (`Sequence[Compared]`): Two rows each, in their order.
        factor (`int`): What differences are multiplied with; brighter ones than 255 are shown as 255.
    """
    from matplotlib.figure import Figure

    rows = [_Row(originals, ["originals"], [])]
    for model in models:
        difference = (_difference(originals, model.reconstructions) * factor).clamp(max=255).byte()
        rate, kept = f"{model.figures['bits_per_pixel']:#.3g} bits/pixel", f"{model.figures['psnr']:.2f} dB"
        rows.append(_Row(model.reconstructions, textwrap.wrap(model.name, LABEL_CHARACTERS), [rate, kept]))
        rows.append(_Row(difference, [], [f"difference × {factor}"]))
    height, width, _ = _cell(originals[0]).shape
    line_height = POINTS * PNG_DPI / 72 * 1.25
    row_height = max(height, *(round(len(row.lines) * line_height) for row in rows))  # labels may be the higher ones
    tops = [i * (row_height + GAP) + (i + 1) // 2 * (GROUP_GAP - GAP) for i in range(len(rows))]
    canvas = np.full((tops[-1] + row_height, len(originals) * (width + GAP) - GAP, 3), 255, np.uint8)
    for top, row in zip(tops, rows, strict=True):
        for j, image in enumerate(row.images):
            canvas[top : top + height, j * (width + GAP) : j * (width + GAP) + width] = _cell(image)
    margin = round(max(_text_width(line) for row in rows for line in row.lines)) + 4 * GAP
    full_height, full_width = canvas.shape[0] + 2 * GAP, margin + canvas.shape[1] + GAP
    with style():
        # A pixel of the canvas is a pixel of the PNG: nothing is resampled.
        figure = Figure(figsize=(full_width / PNG_DPI, full_height / PNG_DPI))
        axes = figure.add_axes(
            (margin / full_width, GAP / full_height, canvas.shape[1] / full_width, canvas.shape[0] / full_height)
        )
        axes.imshow(canvas, interpolation="none", aspect="auto")
        axes.axis("off")
        for top, row in zip(tops, rows, strict=True):
            first = GAP + top + height / 2 - (len(row.lines) - 1) / 2 * line_height
            for j, line in enumerate(row.lines):
                figure.text(
                    (margin - 2 * GAP) / full_width,
                    1 - (first + j * line_height) / full_height,
                    line,
                    ha="right",
                    va="center",
                    fontsize=POINTS,
                    parse_math=False,  # a name may hold dollars
                    color="black" if row.name else "0.35",
                    weight="bold" if j < len(row.name) else "normal",
                )
    caption = (
        f"Originals, and of each model the reconstructions and below them the absolute differences, {factor} times as "
        "bright. Rates and PSNR are those of the table, of all images measured."
    )
    return Drawing("comparison", "Reconstructions", caption, figure)


def rate_distortion_figure(
    codecs: Mapping[str, Sequence[Point]], models: Sequence[Compared], codec_images: int
) -> Drawing:
    """PSNR, and SSIM where it was measured, over bits per pixel: models as points, codecs as curves.

    Args:
        codecs: The points of `codec_curve`, by codec.
        models: In the order of the legend.
        codec_images: How many images the codecs were given, for the caption.
    """
    measured = [name for name in AXIS_NAMES if name in models[0].figures]
    points = [
        ModelPoint(model.name, model.figures["bits_per_pixel"], model.figures.get("psnr"), model.figures.get("ssim"))
        for model in models
    ]
    width = WIDTH if len(measured) > 1 else WIDTH * 0.65
    names = ["JPEG", "WebP", *(model.name for model in models)]
    columns = max(1, min(len(names), int(width * 15 / (max(map(len, names)) + 6))))  # 15 characters in an inch
    with style():
        figure = new_figure(2.9 + 0.2 * -(-len(names) // columns), width)
        for axes, name in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
            draw_rate_distortion(axes, codecs, points, name)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    images = models[0].figures["images"]
    caption = (
        f"Means over {images:,} image{'s' * (images > 1)}. Models: bits of the codes, log2 K each. JPEG "
        "(4:2:0, optimized Huffman tables) and WebP at qualities from 1 to 95: a file for every image, headers "
        "included, which make up much of the files of small images"
    )
    caption += f"; of {codec_images:,} of the images." if codec_images < images else "."
    return Drawing("rate_distortion", "Rate and distortion", caption, figure)


@dataclass
class _Row:
    """A row of the picture: images, and beside them lines of text, those of the name first and bold."""

    images: torch.Tensor
    name: list[str]
    facts: list[str]

    @property
    def lines(self) -> list[str]:
        return self.name + self.facts


def _text_width(line: str) -> float:
    """Pixels of a line of a label, if it is bold."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    path = TextPath((0, 0), line.replace("$", "S"), prop=FontProperties(size=POINTS, weight="bold"))
    return path.get_extents().width * PNG_DPI / 72


def _difference(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first.short() - second.short()).abs()


def _cell(image: torch.Tensor) -> np.ndarray:
    """An image `(C, H, W)` as it is shown: `(h, w, 3)`, by a whole factor larger or smaller."""
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
    side = max(pixels.shape[:2])
    if side <= LARGEST_CELL:
        zoom = max(1, MAGNIFIED_CELL // side)
        return pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)
    from PIL import Image

    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).reduce(-(-side // LARGEST_CELL)))
