"""PSNR, SSIM, rFID, codebook use and rate: what an autoencoder keeps of an image, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from looc_ldm.metrics.generation import InceptionFeatures, fid_and_kid

if TYPE_CHECKING:
    from looc_ldm.autoencoder import LooCVQModel

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # of images in [0, 1]
PSNR_CEILING = 100.0  # dB; one wrong bit in one 8-bit value of a 256x256 RGB image is 101 dB


def psnr(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image, 10 log10(1 / mean squared error), in dB.

    Args:
        images, reconstructions (`torch.Tensor` of shape `(B, C, H, W)`): Float images in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B,)`, float64: infinite where the two are identical.

    Raises:
        ValueError: Different shapes, integers, or values outside [0, 1].
    """
    images, reconstructions = _checked_pair(images, reconstructions)
    return -10 * torch.log10((images - reconstructions).square().mean(dim=(1, 2, 3)))


def ssim(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image (Wang et al. 2004): Gaussian window of 11, sigma 1.5, mean over channels.

    Only windows that lie inside the image count.

    Args:
        images, reconstructions (`torch.Tensor` of shape `(B, C, H, W)`): Float images in [0, 1], H and W at least 11.

    Returns:
        `torch.Tensor` of shape `(B,)`, float64, in [-1, 1]: 1 where the two are identical.

    Raises:
        ValueError: Images smaller than the window, different shapes, integers, or values outside [0, 1].
    """
    x, y = _checked_pair(images, reconstructions)
    height, width = x.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW}, got {height}x{width}.")
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (
        _window_means(moment).flatten(1)  # (B, C * windows)
        for moment in (x, y, x * x, y * y, x * y)
    )
    covariance = mean_xy - mean_x * mean_y
    variances = mean_xx - mean_x.square() + mean_yy - mean_y.square()
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x.square() + mean_y.square() + SSIM_C1)
    return (luminance * (2 * covariance + SSIM_C2) / (variances + SSIM_C2)).mean(dim=1)


@torch.no_grad()
def evaluate_reconstruction(
    model: LooCVQModel,
    batches: Iterable[torch.Tensor],
    measured_size: tuple[int, int] | None = None,
    features: InceptionFeatures | None = None,
    lpips: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, float | int | str]:
    """Encode, quantize and decode images, and measure what came back and what it cost.

    The model is put into eval mode and left in the modes it had. Batches are moved to its device and dtype. None is
    kept, except for rFID: 8-bit copies of originals and reconstructions, on the CPU.

    Args:
        model (`LooCVQModel`): The autoencoder.
        batches: Float images in [-1, 1], `(B, C, H, W)` each, all of one height and width.
        measured_size (`tuple[int, int]`, *optional*): Height and width of the centre that is measured, for images that
            were padded to fit the network (Fashion-MNIST's 28x28 in 32x32): padding is easy to reconstruct and must
            not flatter the figures. Where the margin is odd, the smaller half is above and to the left. The whole
            image if not given.
        features (`InceptionFeatures`, *optional*): Measure rFID too, with these features.
        lpips (`Callable`, *optional*): Measure LPIPS too: the distances of two batches of RGB images in [-1, 1], for
            instance `lpips.LPIPS(net="vgg")`.

    Returns:
        `dict`, ready for JSON:

        - `protocol`: "clean", no JPEG and no 8-bit rounding on the way (rounding for rFID only).
        - `images`: their number; `height`, `width`: the measured size in pixels.
        - `psnr` in dB, `ssim` in [-1, 1], `l1` (mean absolute error in [0, 1]): means over images. In the mean an
          image's PSNR counts as at most 100 dB, so that a single exact reconstruction does not make it infinite.
          `lpips`, where it is given: of whole images, since its networks need some size, padding included.
        - `codebook_use`: the share of the codevectors that were used at least once over all images, in [0, 1].
        - `perplexity`: exp of the entropy of the codes of all images, in [1, K].
        - `bits_per_image`: the rate of the image the network was given, padding included.
        - `bits_per_pixel`: `bits_per_image` per *measured* pixel: padding costs bits, but is nothing anybody wanted.
        - `num_codevectors` (K), `codevector_dim` (d).
        - `rfid@<layer>` with `features`: FID of the reconstructions against the originals.

    Raises:
        ValueError: No images, a batch that is not as said, sizes that differ or do not fit, reconstructions that are
            not finite, or features that cannot be had (see `fid_and_kid`).
    """
    if features is not None:
        features.check()
    totals = {"psnr": 0.0, "ssim": 0.0, "l1": 0.0}
    if lpips is not None:
        totals["lpips"] = 0.0
    code_counts = torch.zeros(model.config.num_vq_embeddings, dtype=torch.int64)
    images = 0
    given_size = None
    originals: list[torch.Tensor] = []
    reconstructions: list[torch.Tensor] = []

    with eval_mode(model):
        for batch in batches:
            _check_batch(batch, given_size)
            given_size = tuple(batch.shape[-2:])
            output = model.decode(model.encode(batch.to(model.device, model.dtype)).latents)
            original, reconstruction = (
                (_centre(x.to(model.device, torch.float32), measured_size).clamp(-1, 1) + 1) / 2
                for x in (batch, output.sample)
            )
            totals["psnr"] += psnr(original, reconstruction).clamp(max=PSNR_CEILING).sum().item()
            totals["ssim"] += ssim(original, reconstruction).sum().item()
            totals["l1"] += (original - reconstruction).abs().mean(dim=(1, 2, 3)).cpu().double().sum().item()
            if lpips is not None:
                whole = (x.to(model.device, torch.float32).clamp(-1, 1) for x in (batch, output.sample))
                totals["lpips"] += lpips(*(x.expand(-1, 3, -1, -1) for x in whole)).sum().item()  # grey ones as RGB
            code_counts += torch.bincount(output.indices.flatten(), minlength=len(code_counts)).cpu()
            images += len(batch)
            if features is not None:
                originals.extend((original * 255).round().byte().cpu())
                reconstructions.extend((reconstruction * 255).round().byte().cpu())
    if not images:
        raise ValueError("There are no images to reconstruct: batches is empty.")

    height, width = measured_size if measured_size is not None else given_size
    bits = model.bits_per_image(*given_size)
    shares = code_counts[code_counts > 0].double() / code_counts.sum()
    report = {
        "protocol": "clean",
        "images": images,
        "height": height,
        "width": width,
        **{name: total / images for name, total in totals.items()},
        "codebook_use": len(shares) / len(code_counts),
        "perplexity": math.exp(-torch.sum(shares * shares.log()).item()),
        "bits_per_image": bits,
        "bits_per_pixel": bits / (height * width),
        "num_codevectors": model.config.num_vq_embeddings,
        "codevector_dim": model.quantize.codevector_dim,
    }
    if features is not None:
        report[f"rfid@{features.layer}"] = fid_and_kid(originals, reconstructions, features)[f"fid@{features.layer}"]
    return report


def _checked_pair(images: torch.Tensor, reconstructions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float64: in float32 the variances of flat, bright regions would drown in rounding."""
    if images.ndim != 4 or images.shape != reconstructions.shape:
        raise ValueError(
            "images and reconstructions must have one shape (batch, channels, height, width), "
            f"got {tuple(images.shape)} and {tuple(reconstructions.shape)}."
        )
    for name, x in (("images", images), ("reconstructions", reconstructions)):
        low, high = x.aminmax()
        if not x.is_floating_point() or not 0 <= low <= high <= 1:
            raise ValueError(f"{name} must be floats in [0, 1], got {x.dtype} from {low.item():g} to {high.item():g}.")
    device = "cpu" if images.device.type == "mps" else images.device  # Apple's GPUs have no float64
    return images.to(device, torch.float64), reconstructions.to(device, torch.float64)


def _check_batch(batch: torch.Tensor, size: tuple[int, int] | None) -> None:
    if not batch.is_floating_point() or batch.ndim != 4 or not batch.numel() or not batch.abs().max() <= 1:
        raise ValueError(
            "batches must hold float images (batch, channels, height, width) in [-1, 1], "
            f"got {batch.dtype} of shape {tuple(batch.shape)}"
            + (f" from {batch.min().item():g} to {batch.max().item():g}." if batch.numel() else ".")
        )
    if size is not None and size != tuple(batch.shape[-2:]):
        raise ValueError(f"all images must have one size, got {size} and {tuple(batch.shape[-2:])}.")


def _centre(images: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    if size is None:
        return images
    (height, width), (given_height, given_width) = size, images.shape[-2:]
    if not (0 < height <= given_height and 0 < width <= given_width):
        raise ValueError(f"measured_size {height}x{width} does not lie inside images of {given_height}x{given_width}.")
    top, left = (given_height - height) // 2, (given_width - width) // 2
    return images[..., top : top + height, left : left + width]


def _window_means(x: torch.Tensor) -> torch.Tensor:
    """Gaussian means of the windows inside `(B, C, H, W)`, as `(B, C, H - 10, W - 10)`.

    Sums of shifted images: on a CPU 6 to 13 times as fast as `conv2d`, which has no fast path for float64.
    """
    weights = [math.exp(-0.5 * ((i - SSIM_WINDOW // 2) / SSIM_SIGMA) ** 2) for i in range(SSIM_WINDOW)]
    for axis in (2, 3):
        windows = x.shape[axis] - SSIM_WINDOW + 1
        mean = torch.zeros_like(x.narrow(axis, 0, windows))
        for i, weight in enumerate(weights):
            mean.add_(x.narrow(axis, i, windows), alpha=weight / sum(weights))
        x = mean
    return x


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module gets its own mode back: `model.train()` would also wake what its owner has frozen."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
