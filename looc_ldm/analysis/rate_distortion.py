"""Rate and distortion of JPEG and WebP, and the plot of models beside them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from looc_ldm.images.pixels import to_float, to_pil
from looc_ldm.metrics.protocols import get_protocol
from looc_ldm.metrics.quality import psnr, ssim
from looc_ldm.metrics.reconstruction import PSNR_CEILING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Options of Pillow besides the quality. Without Huffman tables made for the image, JPEG would be too easy to beat.
CODECS = {"jpeg": {"optimize": True}, "webp": {}}
CODEC_NAMES = {"jpeg": "JPEG", "webp": "WebP"}
QUALITIES = (1, 5, 10, 20, 35, 50, 65, 80, 90, 95)
AXIS_NAMES = {"psnr": "PSNR (dB)", "ssim": "SSIM"}
MARKERS = "osD^vP*Xp<>h"
OCTAVES = range(-12, 9)  # powers of two of bits per pixel that may have ticks


@dataclass(frozen=True)
class Point:
    """A codec at one quality, over all images."""

    quality: int  # Pillow's, 1 to 100
    bits_per_pixel: float  # bits of all files, headers included, per pixel of all images
    psnr: float  # mean over images, in dB; an image counts as at most 100 dB, as in `evaluate_reconstruction`
    ssim: float  # mean over images, in [-1, 1]


@dataclass(frozen=True)
class ModelPoint:
    """A model as a point of the plot; `psnr` in dB, None if not measured."""

    name: str
    bits_per_pixel: float
    psnr: float | None = None
    ssim: float | None = None


def codec_curve(
    images: Iterable[torch.Tensor], codec: str, qualities: Sequence[int] = QUALITIES, protocol: str = "clean"
) -> list[Point]:
    """Measure a codec at each quality, in one pass over the images.

    Every image is one file, and the whole file counts. The headers of a JPEG are 300 to 600 bytes, most of the file of
    a 28x28 image. JPEG halves the resolution of colour, as is usual (4:2:0). WebP always does, and has no grey: a grey
    image is stored with empty colour, and compared in grey.

    Args:
        images: uint8 tensors `(C, H, W)`, C = 1 (grey) or 3 (RGB), H and W at least 11.
        codec: "jpeg" or "webp" (lossy), as Pillow writes them.
        qualities: Pillow's qualities, 1 to 100.
        protocol: Protocol of PSNR and SSIM, "clean" or "paper".

    Raises:
        ValueError: An unknown protocol, or no images.
    """
    measured_as = get_protocol(protocol)
    sizes = np.zeros(len(qualities), np.int64)  # bytes
    sums = torch.zeros(2, len(qualities), dtype=torch.float64)  # PSNR and SSIM
    count = pixels = 0
    for image in images:
        original, kept = to_pil(image), measured_as.view(to_float(image.cpu())[None])
        # One quality at a time: SSIM of all together would not fit into the caches, and takes up to 4 times as long.
        for i, quality in enumerate(qualities):
            file = io.BytesIO()
            original.save(file, codec.upper(), quality=quality, **CODECS[codec])
            sizes[i] += file.tell()
            decoded = np.array(Image.open(file).convert(original.mode)).reshape(*image.shape[1:], -1)
            shown = measured_as.view(to_float(torch.from_numpy(decoded).permute(2, 0, 1))[None])
            sums[0, i] += psnr(kept, shown).clamp(max=PSNR_CEILING).item()
            sums[1, i] += ssim(kept, shown, window=measured_as.ssim_window).item()
        count += 1
        pixels += image.shape[1] * image.shape[2]
    if not count:
        raise ValueError("There are no images to compress: images is empty.")
    rates, means = 8 * sizes / pixels, (sums / count).tolist()
    return [
        Point(quality, float(rate), mean_psnr, mean_ssim)
        for quality, rate, mean_psnr, mean_ssim in zip(qualities, rates, *means, strict=True)
    ]


def draw_rate_distortion(
    axes: Axes, codecs: Mapping[str, Sequence[Point]], models: Sequence[ModelPoint], figure: str = "psnr"
) -> None:
    """Draw codecs as curves and models as points over bits per pixel, on a logarithmic axis, without a legend.

    `codecs` are the points of `codec_curve` by codec. `figure` is "psnr" or "ssim"; models without it are left out.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for name, points in codecs.items():
        points = sorted(points, key=lambda point: point.bits_per_pixel)
        is_jpeg = name == "jpeg"
        axes.plot(
            [point.bits_per_pixel for point in points],
            [getattr(point, figure) for point in points],
            color="0.35" if is_jpeg else "0.6",
            linestyle="-" if is_jpeg else "--",
            marker=".",
            markersize=4,
            linewidth=1.2,
            label=CODEC_NAMES[name],
        )
    for i, model in enumerate(models):
        if getattr(model, figure) is None:
            continue
        axes.plot(
            model.bits_per_pixel,
            getattr(model, figure),
            linestyle="none",
            marker=MARKERS[i % len(MARKERS)],
            markersize=8,
            markeredgecolor="white",
            color=f"C{i}",
            label=_as_label(model.name),
            zorder=3,
        )
    axes.set(xlabel="bits per pixel", ylabel=AXIS_NAMES[figure], xscale="log")
    low, high = axes.get_xlim()
    between = (1.0, 1.5) if high < 8 * low else (1.0,)  # else a short axis would have no more than two ticks
    axes.xaxis.set_major_locator(FixedLocator([step * 2.0**i for i in OCTAVES for step in between]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.3g}"))
    axes.grid(alpha=0.3)


def _as_label(name: str) -> str:
    """Escape a name: matplotlib reads formulas between dollars, and omits labels that start with an underscore."""
    return (" " + name if name.startswith("_") else name).replace("$", r"\$")
