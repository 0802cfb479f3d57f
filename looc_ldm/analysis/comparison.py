"""Compare several models on the same images: their names, the table, and the pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

import torch

from looc_ldm.analysis.rate_distortion import AXIS_NAMES, ModelPoint, Point, draw_rate_distortion
from looc_ldm.analysis.style import PNG_DPI, WIDTH, Drawing, new_figure, picture, style

GENERIC_NAMES = ("model", "pipeline", "vqvae")  # folders that trainings write
CELL = 144, 256  # height of an image in pixels: smaller ones are magnified by a whole factor, larger ones reduced
MARGIN, LABEL_CHARACTERS = 1.35, 20  # inches left of the images, and characters per line there
DIFFERENCE_FACTORS = (16, 8, 4, 2)
CLIPPED_SHARE = 0.05  # largest share of a model's differences that may be too bright to show


@dataclass
class Compared:
    """One model of a comparison."""

    name: str  # in table and pictures
    figures: dict  # from `evaluate_reconstruction`, with `downsampling_factor` and `interpolation_factor`
    reconstructions: torch.Tensor  # uint8 (n, C, H, W), of the images shown


def distinguishing_names(models: Sequence[str]) -> list[str]:
    """Return a short name of each model: the last part of its folder or hub id, `a` for `runs/a/model`.

    If the short names do not tell the models apart, the names are the models as they were given. A model that is given
    twice gets a number the second time.
    """
    places = [Path(model).resolve() if Path(model).is_dir() else Path(model) for model in models]
    names = [place.parent.name if place.name in GENERIC_NAMES else place.name for place in places]
    if len(set(names)) < len(set(places)):
        names = list(models)
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


# The table ------------------------------------------------------------------------------------------------------------


def _number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


# Headings (the arrow is the better direction) and number formats. Figures of a feature layer have it after an "@".
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
    """Return a table of one row per model, with the figures measured; readable as plain text too."""
    columns = [["model", *(model.name.replace("|", "\\|") for model in models)]]
    for known, (heading, write) in COLUMNS.items():
        for figure in models[0].figures:
            name, _, layer = figure.partition("@")
            if name == known:
                title = heading.format(f"@{layer}" if layer else "")
                columns.append([title, *(write(model.figures[figure]) for model in models)])
    aligned = []
    for i, (title, *cells) in enumerate(columns):
        width = max(3, len(title), *map(len, cells))
        ruler = "-" * width if i == 0 else "-" * (width - 1) + ":"
        aligned.append([f"{cell:{'<' if i == 0 else '>'}{width}}" for cell in (title, ruler, *cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*aligned, strict=True))


# The pictures ---------------------------------------------------------------------------------------------------------


def difference_factor(originals: torch.Tensor, models: Sequence[Compared]) -> int:
    """Return the factor by which the differences of all models are amplified.

    It is the median of the largest factors, at least 2, that clip little of each model's differences. So one model
    that is far better or worse than the others does not hide their differences.
    """
    factors = []
    for model in models:
        difference = _difference(originals, model.reconstructions)
        clips_little = (f for f in DIFFERENCE_FACTORS if (difference * f > 255).double().mean() <= CLIPPED_SHARE)
        factors.append(next(clips_little, 2))
    return median_low(factors)


def _difference(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first.short() - second.short()).abs()


def comparison_picture(originals: torch.Tensor, models: Sequence[Compared], factor: int) -> Drawing:
    """Draw the originals, uint8 `(n, C, H, W)`, one per column, and two rows of images per model.

    These are its reconstructions and their absolute differences, multiplied by `factor` and clipped at 255.
    """
    from matplotlib.figure import Figure

    rows = [(originals, "originals", "")]
    for model in models:
        name = "\n".join(textwrap.wrap(model.name, LABEL_CHARACTERS, max_lines=3))
        facts = f"{model.figures['bits_per_pixel']:#.3g} bits/pixel\n{model.figures['psnr']:.2f} dB"
        difference = (_difference(originals, model.reconstructions) * factor).clamp(max=255).byte()
        rows += [(model.reconstructions, name, facts), (difference, "", f"difference × {factor}")]
    height, width = originals.shape[-2:]
    zoom = max(1, CELL[0] // height) * min(1, CELL[1] / height) / PNG_DPI  # inches per pixel
    figure_width, figure_height = MARGIN + len(originals) * width * zoom * 1.03, len(rows) * height * zoom * 1.03
    with style():
        figure = Figure((figure_width, figure_height))
        cells = figure.subplots(len(rows), len(originals), squeeze=False)
        figure.subplots_adjust(MARGIN / figure_width, 0.005, 0.995, 0.995, wspace=0.03, hspace=0.03)
        for line, (images, bold, plain) in zip(cells, rows, strict=True):
            for axes, image in zip(line, images, strict=True):
                picture(axes, image, interpolation="auto")
            # A name may hold dollars: no formulas.
            label = {"transform": line[0].transAxes, "ha": "right", "fontsize": 6.5, "parse_math": False}
            line[0].text(-0.06, 0.5, bold, va="bottom", weight="bold", **label)
            line[0].text(-0.06, 0.5, plain, va="top", **label)
    caption = (
        f"Below each model's reconstructions: absolute differences from the originals, {factor} times as bright. Rates "
        "and PSNR are means over all images measured."
    )
    return Drawing("comparison", "Reconstructions", caption, figure)


def rate_distortion_figure(
    codecs: Mapping[str, Sequence[Point]], models: Sequence[Compared], codec_images: int
) -> Drawing:
    """Draw PSNR, and SSIM if it was measured, over bits per pixel: models as points, codecs as curves.

    `codec_images` is the number of images that the codecs compressed, for the caption.
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
    caption = f"Means over {images:,} images"
    caption += f"; codecs over {codec_images:,} of the images. " if codec_images < images else ". "
    caption += "JPEG and WebP: qualities 1 to 95, one file per image, headers included."
    return Drawing("rate_distortion", "Rate and distortion", caption, figure)
