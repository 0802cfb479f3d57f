"""Figures of images: rate and distortion, and where the errors are."""

from __future__ import annotations

import numpy as np
import torch

from looc_ldm.analysis.collect import Findings
from looc_ldm.analysis.rate_distortion import ModelPoint, codec_curve, draw_rate_distortion
from looc_ldm.analysis.style import BLUE, HEAT, SKY, Drawing, new_figure, picture, style
from looc_ldm.images.image_set import spread
from looc_ldm.metrics.quality import SSIM_WINDOW

MOST_CODED = 64  # images that JPEG and WebP compress
EXAMPLES = 8  # images shown with their errors


def compared_with_codecs(findings: Findings) -> dict:
    """Measure the model and codecs on the same images of the sample.

    `by_image` are pairs of an image's entropy-coded rate and PSNR, `codecs` the points of `codec_curve`, which are left
    out for images smaller than the window of SSIM.
    """
    sample = findings.sample
    chosen = spread(len(sample.originals), MOST_CODED)
    images = findings.content(sample.originals[chosen])
    names = ("jpeg", "webp") if min(findings.content_size) >= SSIM_WINDOW else ()
    bits, psnr = findings.bits_per_pixel_each(sample.indices[chosen]), sample.psnr[chosen]
    return {
        "images": len(chosen),
        "psnr": psnr.mean().item(),
        "bits_per_pixel": findings.bits_per_pixel,
        "bits_per_pixel_entropy": bits.mean().item(),
        "by_image": [list(pair) for pair in zip(bits.tolist(), psnr.tolist(), strict=True)],
        "codecs": {name: codec_curve(images, name) for name in names},
    }


def draw_rate(compared: dict) -> Drawing:
    """Draw rate and distortion of the model, of each image, and of codecs."""
    with style():
        figure = new_figure(3.7)
        axes = figure.subplots()
        rates, psnrs = zip(*compared["by_image"], strict=True)
        axes.plot(rates, psnrs, ".", color=SKY, markersize=5, markeredgewidth=0, alpha=0.8, label="model, each image")
        points = [
            ModelPoint("model, log2 K bits per code", compared["bits_per_pixel"], compared["psnr"]),
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
        f"Means over {compared['images']:,} images drawn at random. Entropy-coded: by an ideal coder that knows how "
        "often the data use each code. Small dots: single images, entropy-coded."
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
        f"Mean over {findings.images:,} images and all channels; black and white differ by 1. The brightest colour "
        "stands for the highest 0.5 %. A grid in the map shows the latent positions, a frame the network's padding."
    )
    return Drawing("error_map", "Where the errors are", caption, figure)


def draw_examples(findings: Findings) -> Drawing:
    """Draw originals, reconstructions, and the error of each pixel."""
    sample = findings.sample
    chosen = spread(len(sample.originals), EXAMPLES)
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


def _ceiling(errors: torch.Tensor) -> float:
    """Return the 99.5th percentile, at least one level of 255: a few extreme pixels must not set the scale."""
    return max(np.quantile(errors, 0.995).item(), 1 / 255)
