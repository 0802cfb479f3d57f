"""Figures of images: rate and distortion, where the errors are, and what codevectors decode to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from looc_ldm.analysis.collect import Findings, occurrences
from looc_ldm.analysis.rate_distortion import ModelPoint, codec_curve, draw_rate_distortion
from looc_ldm.analysis.style import BLUE, HEAT, SKY, Drawing, counted, new_figure, percent, picture, style
from looc_ldm.autoencoder import LooCVQModel
from looc_ldm.images import to_uint8
from looc_ldm.metrics.quality import SSIM_WINDOW
from looc_ldm.metrics.reconstruction import eval_mode

MOST_CODED = 64  # images that JPEG and WebP are asked for
EXAMPLES = 8  # images shown with their errors
SHOWN_CODES = 8  # most used, and as many least used
OCCURRENCES = 8  # patches of each
JPEG_HEADER = (300, 600)  # bytes, about
BEYOND = 217  # light grey, where an image has ended
CONTEXT = 1  # latent positions around the one of a patch


def compared_with_codecs(findings: Findings) -> dict:
    """The model and codecs on the same images of the sample, ready for JSON.

    Returns:
        `dict`: `images`; `psnr`, the model's mean in dB; `bits_per_pixel` and `bits_per_pixel_entropy`, its rate at
        log2 K and at the entropy of the codes; `by_image`, for each image its rate under an ideal entropy coder with
        the data's frequencies, and its PSNR; `codecs`, by name, the points of `codec_curve`, nothing for images that
        are smaller than the window of SSIM.
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
    """Rate and distortion of the model, of its images and of codecs."""
    with style():
        figure = new_figure(3.4)
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
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
        _rate_ticks(axes)
        axes.set_title(
            f"{counted(compared['images'], 'image')}: {compared['psnr']:.2f} dB at "
            f"{compared['bits_per_pixel']:.3g} bits per pixel, "
            f"{compared['bits_per_pixel_entropy']:.3g} entropy-coded"
        )
    caption = (
        f"{counted(compared['images'], 'image')} drawn at random: mean PSNR against mean bits per pixel. The model at "
        "log2 K bits for every code, and under an ideal entropy coder that knows how often each code is chosen in the "
        "data; small dots are its images under that coder."
    )
    if compared["codecs"]:
        caption += " JPEG (4:2:0, optimized Huffman tables) and WebP at qualities from 1 to 95, a file for every image."
        low, high = (8 * size / math.prod(findings.content_size) for size in JPEG_HEADER)
        caption += f" A JPEG's headers alone are about {low:.2g} to {high:.2g} bits per pixel here."
    else:
        caption += " Images so small are left out for JPEG and WebP."
    return Drawing("rate_distortion", "Rate and distortion", caption, figure)


def draw_error_map(findings: Findings) -> Drawing:
    """Mean absolute error at each pixel."""
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
        axes.set_title(f"mean over {counted(findings.images, 'image')}: {findings.l1:.4f}")
    caption = (
        f"Absolute error of reconstructions at each of {width} x {height} pixels, mean over "
        f"{counted(findings.images, 'image')} and all channels; black and white are 1 apart. The brightest colour "
        "stands for the highest 0.5 % of them. A grid shows the latent positions, a frame what the network's padding "
        "does."
    )
    return Drawing("error_map", "Where the errors are", caption, figure)


def draw_examples(findings: Findings) -> Drawing:
    """Originals, reconstructions, and the error of each pixel."""
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
        "Images of the data, their reconstructions, and the absolute error of each pixel, mean over channels, of "
        "[0, 1]; below it the image's PSNR. The brightest colour stands for the highest 0.5 % of these errors."
    )
    return Drawing("examples", "Reconstructions and their errors", caption, figure)


def shown_codes(findings: Findings) -> tuple[list[int], list[int]]:
    """The most used codevectors, and the least used of those that were used, others than those."""
    counts = findings.statistics.counts.sum(0)
    order = [code for code in counts.argsort(descending=True, stable=True).tolist() if counts[code]]
    most = order[:SHOWN_CODES]
    return most, order[len(most) :][-SHOWN_CODES:][::-1]


@torch.no_grad()
def swatches(model: LooCVQModel, codes: Sequence[int], findings: Findings) -> torch.Tensor:
    """What maps decode to in which every code is the same, as uint8 (codes, channels, side, side).

    The middle of the image, where the network's padding reaches least: as large as the patches beside it.
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


def draw_codes(findings: Findings, model: LooCVQModel, read: Callable[[int], torch.Tensor]) -> Drawing:
    """What the most and the least used codevectors stand for: constant maps of them, and patches where they are."""
    most, least = shown_codes(findings)
    groups = [("most used", most)] + ([("least used", least)] if least else [])
    with style():
        rows = max(len(codes) for _, codes in groups)
        figure = new_figure(0.55 + 0.36 * rows, width=4.0 * len(groups))
        for axes, (name, codes) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
            _draw_group(axes, name, codes, rows, findings, model, read)
    f = findings.downsampling_factor
    slots = findings.sample.codes.shape[-1]
    caption = (
        "Codevectors by number, with their share of all codes (where that is below 0.1 %, how often they were chosen). "
        "First column: what a map decodes to in which every code, of every segment at every position, is this one. No "
        "image has such a map: it is the decoder's answer to the codevector alone. Others: "
        f"places in {'the image' if findings.images == 1 else f'{len(findings.sample.originals):,} images of the data'}"
        + (
            f" where most of the {slots} codes of a position are this one, from as many images as have it"
            if slots > 1
            else " where it was chosen, from as many images as have it"
        )
        + f": the {f}x{f} pixels of the position in the frame, with their neighbours; grey is beyond the image."
    )
    if len(findings.statistics.dead):
        caption += f" The {len(findings.statistics.dead):,} dead codevectors are not shown."
    return Drawing("codes", "What codevectors stand for", caption, figure)


def _patch_side(findings: Findings) -> int:
    return findings.downsampling_factor * (1 + 2 * CONTEXT)


def _draw_group(axes, name: str, codes: list[int], rows: int, findings: Findings, model: LooCVQModel, read) -> None:
    """A row for each codevector, of squares in one picture: what it decodes to, and where it is chosen."""
    from matplotlib.patches import Rectangle

    f, side, counts = findings.downsampling_factor, _patch_side(findings), findings.statistics.counts.sum(0)
    gap = max(1, side // 12)
    step, first = side + gap, 2 * gap  # a wider gap after the first column
    sheet = torch.full((3, rows * step - gap, first + (OCCURRENCES + 1) * step - gap), 255, dtype=torch.uint8)
    frames, most = [], 0  # upper left corners of the positions; patches in a row
    for row, (code, swatch) in enumerate(zip(codes, swatches(model, codes, findings), strict=True)):
        squares, found = [(0, swatch)], occurrences(findings, code, OCCURRENCES, read)
        most = max(most, len(found))
        for column, (image, y, x, _) in enumerate(found):
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
    often = [percent(share) if share >= 0.001 else f"{counts[code]:,} ×" for code, share in shares.items()]
    axes.set_yticks(
        [row * step + side / 2 for row in range(len(codes))],
        [f"{code}\n{text}" for code, text in zip(codes, often, strict=True)],
        fontsize=7.5,
    )
    axes.set_xticks([side / 2, first + (1 + most / 2) * step], ["map", "in images"], fontsize=8)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False, pad=3)
    axes.set_title(name)


def _patch(image: torch.Tensor, y: int, x: int, findings: Findings) -> torch.Tensor:
    """A latent position's pixels and those around it (channels, side, side); light grey where the image ends."""
    f, side, margin = findings.downsampling_factor, _patch_side(findings), CONTEXT * findings.downsampling_factor
    wide = torch.nn.functional.pad(image, [margin] * 4, value=BEYOND)
    return wide[:, y * f : y * f + side, x * f : x * f + side]


def _spread(length: int, most: int) -> torch.Tensor:
    """At most so many indices at even distances: the sample is in the order of the data, perhaps by class."""
    return torch.linspace(0, length - 1, min(length, most)).round().long()


def _ceiling(errors: torch.Tensor) -> float:
    """What a few pixels that err most do not decide: the 99.5th percentile, at least one level of 255."""
    flat = errors.flatten()
    flat = flat[:: -(-len(flat) // 2**22)]  # torch.quantile takes no more than 2**24
    return max(torch.quantile(flat, 0.995).item(), 1 / 255)


def _rate_ticks(axes) -> None:
    """Ticks closer together where the rates span little."""
    from matplotlib.ticker import FixedLocator

    low, high = axes.get_xlim()
    if high / low < 12:
        axes.xaxis.set_major_locator(FixedLocator([m * 10.0**e for e in range(-4, 3) for m in (1, 1.5, 2, 3, 4, 6)]))
