"""Figures of images: rate and distortion, where the errors are, and what codevectors decode to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from looc_ldm.analysis.collect import Findings, occurrences
from looc_ldm.analysis.rate_distortion import ModelPoint, codec_curve, draw_rate_distortion
from looc_ldm.analysis.style import BLUE, HEAT, SKY, Drawing, new_figure, picture, style
from looc_ldm.images.pixels import to_uint8
from looc_ldm.metrics.quality import SSIM_WINDOW
from looc_ldm.metrics.reconstruction import eval_mode
from looc_ldm.models.autoencoder import LooCVQModel

MOST_CODED = 64  # images that JPEG and WebP compress
EXAMPLES = 8  # images shown with their errors
SHOWN_CODES = 8  # codevectors shown of the most used, and of the least used
OCCURRENCES = 8  # patches of each codevector
BEYOND = 217  # light grey: outside the image
CONTEXT = 1  # latent positions around the one of a patch


def compared_with_codecs(findings: Findings) -> dict:
    """Measure the model and codecs on the same images of the sample, ready for JSON.

    Returns:
        `dict`: `images`; `psnr`, the model's mean in dB; `bits_per_pixel` and `bits_per_pixel_entropy`, its rate at
        log2 K and at the entropy of the codes; `by_image`, for each image its rate under an ideal entropy coder with
        the data's frequencies, and its PSNR; `codecs`, by name, the points of `codec_curve`, empty for images smaller
        than the window of SSIM.
    """
    sample = findings.sample
    chosen = _spread(len(sample.originals), MOST_CODED)
    images = findings.content(sample.originals[chosen])
    names = ("jpeg", "webp") if min(findings.content_size) >= SSIM_WINDOW else ()
    bits, psnr = findings.bits_of(sample.codes[chosen]), sample.psnr[chosen]
    return {
        "images": len(chosen),
        "psnr": psnr.mean().item(),
        "bits_per_pixel": findings.bits_per_pixel,
        "bits_per_pixel_entropy": bits.mean().item(),
        "by_image": [list(pair) for pair in zip(bits.tolist(), psnr.tolist(), strict=True)],
        "codecs": {name: codec_curve(images, name) for name in names},
    }


def draw_rate(findings: Findings, compared: dict) -> Drawing:
    """Draw rate and distortion of the model, of each image, and of codecs."""
    with style():
        figure = new_figure(3.7)
        axes = figure.subplots()
        rates, psnrs = zip(*compared["by_image"], strict=True)
        axes.plot(rates, psnrs, ".", color=SKY, markersize=5, markeredgewidth=0, alpha=0.8, label="model, each image")
        points = [
            ModelPoint("model, log2 K bits a code", compared["bits_per_pixel"], compared["psnr"]),
            ModelPoint("model, entropy-coded", compared["bits_per_pixel_entropy"], compared["psnr"]),
        ]
        points = [point for point in points if point.bits_per_pixel > 0]  # a logarithmic axis has no place for 0
        axes.plot([p.bits_per_pixel for p in points], [p.psnr for p in points], ":", color=BLUE, linewidth=1)
        draw_rate_distortion(axes, compared["codecs"], points)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        axes.set_title(
            f"{compared['psnr']:.2f} dB at {compared['bits_per_pixel']:.3g} bits per pixel, "
            f"{compared['bits_per_pixel_entropy']:.3g} entropy-coded"
        )
    caption = (
        f"Means over {compared['images']:,} images drawn at random. Entropy-coded: with an ideal coder that "
        "knows how often each code is chosen in the data; small dots are single images under it."
    )
    if compared["codecs"]:
        caption += " JPEG and WebP: qualities 1 to 95, one file per image, headers included."
    return Drawing("rate_distortion", "Rate and distortion", caption, figure)


def draw_error_map(findings: Findings) -> Drawing:
    """Draw the mean absolute error at each pixel."""
    height, width = findings.content_size
    with style():
        figure = new_figure(min(6.0, 0.7 + 3.2 * height / width), width=4.6)
        figure.set_layout_engine("compressed")  # the scale as high as the map
        axes = figure.subplots()
        highest = _ceiling(findings.error_map)
        extend = "max" if highest < findings.error_map.max() else "neither"
        drawn = axes.imshow(findings.error_map.numpy(), cmap=HEAT, vmin=0, vmax=highest, extent=(0, width, height, 0))
        axes.set(xlabel="x (pixels)", ylabel="y (pixels)")
        figure.colorbar(drawn, ax=axes, label="mean absolute error (0 to 1)", pad=0.02, extend=extend)
        axes.set_title(f"mean over {findings.images:,} images: {findings.l1:.4f}")
    caption = (
        f"Mean over {findings.images:,} images and all channels; black and white are 1 apart. The brightest "
        "colour stands for the highest 0.5 %. A grid shows the latent positions; a frame, the network's padding."
    )
    return Drawing("error_map", "Where the errors are", caption, figure)


def draw_examples(findings: Findings) -> Drawing:
    """Draw originals, reconstructions, and the error of each pixel."""
    sample = findings.sample
    chosen = _spread(len(sample.originals), EXAMPLES)
    count = len(chosen)
    originals, reconstructions = (findings.content(x[chosen]) for x in (sample.originals, sample.reconstructions))
    errors = (originals.float() - reconstructions.float()).abs().mean(1) / 255
    height, width = findings.content_size
    highest = _ceiling(errors)
    with style():
        side = min(1.6, 5.7 / count)
        figure = new_figure(3 * side * height / width + 0.5, width=count * side + 1.2)
        cells = figure.subplots(3, count, squeeze=False)
        for i in range(count):
            picture(cells[0, i], originals[i])
            picture(cells[1, i], reconstructions[i])
            drawn = picture(cells[2, i], errors[i].numpy(), cmap=HEAT, vmin=0, vmax=highest)
            cells[2, i].set_xlabel(f"{sample.psnr[chosen[i]]:.1f} dB", fontsize=8)
        for row, name in zip(cells[:, 0], ("original", "decoded", "error"), strict=True):
            row.set_ylabel(name)
        figure.colorbar(drawn, ax=cells, pad=0.01, extend="max", aspect=12, shrink=1 / 3, anchor=(0, 0))
        figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    caption = (
        "Error: absolute error of each pixel in [0, 1], mean over channels, with the image's PSNR below. The brightest "
        "colour stands for the highest 0.5 %."
    )
    return Drawing("examples", "Reconstructions and their errors", caption, figure)


def shown_codes(findings: Findings) -> tuple[list[int], list[int]]:
    """Return the most used codevectors, and the least used ones of the others that were used at all."""
    counts = findings.statistics.counts.sum(0)
    order = [code for code in counts.argsort(descending=True, stable=True).tolist() if counts[code]]
    most = order[:SHOWN_CODES]
    return most, order[len(most) :][-SHOWN_CODES:][::-1]


@torch.no_grad()
def swatches(model: LooCVQModel, codes: Sequence[int], findings: Findings) -> torch.Tensor:
    """Decode maps in which every code is the same, as uint8 `(codes, channels, side, side)`.

    Only the middle is kept, as large as the patches beside it: the network's padding reaches it least.
    """
    size, side = findings.latent_size, _patch_side(findings)
    decoded = []
    with eval_mode(model):
        for code in codes:
            indices = torch.full((1, *size, model.quantize.codes_per_position), code, device=model.device)
            decoded.append(to_uint8(model.decode_indices(indices).sample)[0].cpu())
    images = torch.stack(decoded)
    top, left = ((length - side) // 2 if length > side else 0 for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def draw_codes(findings: Findings, model: LooCVQModel) -> Drawing:
    """Draw the most and the least used codevectors: the decoded constant map of each, and where they are chosen."""
    most, least = shown_codes(findings)
    groups = [("most used", most)] + ([("least used", least)] if least else [])
    with style():
        rows = max(len(codes) for _, codes in groups)
        figure = new_figure(0.55 + 0.36 * rows, width=4.0 * len(groups))
        for axes, (name, codes) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
            _draw_group(axes, name, codes, rows, findings, model)
    f = findings.downsampling_factor
    caption = (
        "Codevectors by number, with their share of all codes, or their count below 0.1 %. Map: what the decoder makes "
        f"of this codevector at every place. In images: the {f}x{f} pixels (framed) of positions where most codes are "
        "this one, in the sample of images, with their neighbours; grey is outside the image."
    )
    return Drawing("codes", "What codevectors stand for", caption, figure)


def _patch_side(findings: Findings) -> int:
    return findings.downsampling_factor * (1 + 2 * CONTEXT)


def _draw_group(axes, name: str, codes: list[int], rows: int, findings: Findings, model: LooCVQModel) -> None:
    """Draw one row of squares per codevector: what it decodes to, and where it is chosen."""
    from matplotlib.patches import Rectangle

    f, side, counts = findings.downsampling_factor, _patch_side(findings), findings.statistics.counts.sum(0)
    gap = max(1, side // 12)
    step, first = side + gap, 2 * gap  # a wider gap after the first column
    sheet = torch.full((3, rows * step - gap, first + (OCCURRENCES + 1) * step - gap), 255, dtype=torch.uint8)
    frames, most = [], 0  # upper left corners of the positions; patches in a row
    for row, (code, swatch) in enumerate(zip(codes, swatches(model, codes, findings), strict=True)):
        squares, found = [(0, swatch)], occurrences(findings, code, OCCURRENCES)
        most = max(most, len(found))
        for column, (image, y, x) in enumerate(found):
            left = first + (column + 1) * step
            squares.append((left, _patch(image, y, x, findings)))
            frames.append((left + CONTEXT * f, row * step + CONTEXT * f))
        for left, square in squares:
            sheet[:, row * step : row * step + square.shape[1], left : left + square.shape[2]] = square
    picture(axes, sheet)
    for left, top in frames:
        for color, width in (("black", 1.6), ("white", 0.7)):  # seen on any image
            axes.add_patch(Rectangle((left - 0.5, top - 0.5), f, f, fill=False, edgecolor=color, linewidth=width))
    shares = {code: counts[code].item() / counts.sum().item() for code in codes}
    often = [f"{share:.1%}" if share >= 0.001 else f"{counts[code]:,} ×" for code, share in shares.items()]
    axes.set_yticks(
        [row * step + side / 2 for row in range(len(codes))],
        [f"{code}\n{text}" for code, text in zip(codes, often, strict=True)],
        fontsize=7.5,
    )
    axes.set_xticks([side / 2, first + (1 + most / 2) * step], ["map", "in images"], fontsize=8)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False, pad=3)
    axes.set_title(name)


def _patch(image: torch.Tensor, y: int, x: int, findings: Findings) -> torch.Tensor:
    """Cut out a latent position's pixels and those around it `(channels, side, side)`; light grey outside the image."""
    f, side, margin = findings.downsampling_factor, _patch_side(findings), CONTEXT * findings.downsampling_factor
    wide = torch.nn.functional.pad(image, [margin] * 4, value=BEYOND)
    return wide[:, y * f : y * f + side, x * f : x * f + side]


def _spread(length: int, most: int) -> torch.Tensor:
    """Return at most `most` indices at even distances: the sample is in the order of the data, perhaps by class."""
    return torch.linspace(0, length - 1, min(length, most)).round().long()


def _ceiling(errors: torch.Tensor) -> float:
    """Return the 99.5th percentile, at least one level of 255: a few extreme pixels must not set the scale."""
    return max(np.quantile(errors, 0.995).item(), 1 / 255)
