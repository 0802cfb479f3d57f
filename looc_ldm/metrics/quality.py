"""PSNR, SSIM and mean absolute error of each image of a batch against its original."""

from __future__ import annotations

import math

import torch

SSIM_WINDOWS = ("gaussian", "uniform")
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # for images in [0, 1]


def psnr(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio of each image, 10 log10(1 / mean squared error), in dB.

    Args:
        images, reconstructions (`torch.Tensor` of shape `(B, C, H, W)`): Float images in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B,)`, float64: infinite if the two are identical.

    Raises:
        ValueError: Different shapes, integers, or values outside [0, 1].
    """
    images, reconstructions = _checked_pair(images, reconstructions)
    return -10 * torch.log10((images - reconstructions).square().mean(dim=(1, 2, 3)))


def l1(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute error of each image, `(B,)` float64 in [0, 1]. Takes and raises what `psnr` does."""
    images, reconstructions = _checked_pair(images, reconstructions)
    return (images - reconstructions).abs().mean(dim=(1, 2, 3))


def ssim(images: torch.Tensor, reconstructions: torch.Tensor, window: str = "gaussian") -> torch.Tensor:
    """Return the structural similarity of each image (Wang et al. 2004), in windows of 11x11, mean over channels.

    Only windows that lie inside the image count.

    Args:
        images, reconstructions (`torch.Tensor` of shape `(B, C, H, W)`): Float images in [0, 1], H and W at least 11.
        window (`str`, defaults to `"gaussian"`): `"gaussian"`: weights of sigma 1.5, as in the publication.
            `"uniform"`: equal weights and sample covariances, divided by 120 rather than by 121, which is
            scikit-image's `structural_similarity(win_size=11)`.

    Returns:
        `torch.Tensor` of shape `(B,)`, float64, in [-1, 1]: 1 if the two are identical.

    Raises:
        ValueError: An unknown window, images smaller than it, different shapes, integers, or values outside [0, 1].
    """
    if window not in SSIM_WINDOWS:
        raise ValueError(f"window must be one of {', '.join(SSIM_WINDOWS)}, got {window!r}.")
    x, y = _checked_pair(images, reconstructions)
    height, width = x.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW}, got {height}x{width}.")
    sigma = SSIM_SIGMA if window == "gaussian" else math.inf
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (
        _window_means(moment, sigma).flatten(1)  # (B, C * windows)
        for moment in (x, y, x * x, y * y, x * y)
    )
    covariance = mean_xy - mean_x * mean_y
    variances = mean_xx - mean_x.square() + mean_yy - mean_y.square()
    if window == "uniform":
        pixels = SSIM_WINDOW**2
        covariance, variances = (moment * (pixels / (pixels - 1)) for moment in (covariance, variances))
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x.square() + mean_y.square() + SSIM_C1)
    return (luminance * (2 * covariance + SSIM_C2) / (variances + SSIM_C2)).mean(dim=1)


def _checked_pair(images: torch.Tensor, reconstructions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both in float64: in float32 the variances of flat, bright regions would drown in rounding."""
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


def _window_means(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return Gaussian means of the windows inside `(B, C, H, W)`, `(B, C, H - 10, W - 10)`; plain for infinite sigma.

    Sums of shifted images: on a CPU 6 to 13 times as fast as `conv2d`, which has no fast path for float64.
    """
    weights = [math.exp(-0.5 * ((i - SSIM_WINDOW // 2) / sigma) ** 2) for i in range(SSIM_WINDOW)]
    for axis in (2, 3):
        windows = x.shape[axis] - SSIM_WINDOW + 1
        mean = torch.zeros_like(x.narrow(axis, 0, windows))
        for i, weight in enumerate(weights):
            mean.add_(x.narrow(axis, i, windows), alpha=weight / sum(weights))
        x = mean
    return x
