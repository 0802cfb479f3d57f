"""Prepare images for measuring, by protocol `clean` or `paper`.

`clean`: float images as they are, clamped to their range, rounded to 8 bits for feature networks only.

`paper` (the scripts behind the tables of CVQ-VAE and LooC): originals and reconstructions are clamped, truncated to 8
bits, stored as JPEG of Pillow's default quality, 75, grey ones as RGB, and measured as they are read back; SSIM has
uniform windows; images are resized to 229x229 for FID. Generated images are not stored as JPEG; for them only the
resize differs. A JPEG damages both sides: figures of the two protocols must never stand in one column.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class CleanProtocol:
    """Float images without JPEG and 8-bit rounding; the default."""

    name: str = "clean"
    ssim_window: str = "gaussian"  # argument of `looc_ldm.metrics.ssim`
    pil_resize: int | None = None  # argument of `InceptionFeatures`

    def view(self, images: torch.Tensor) -> torch.Tensor:
        """Return what is measured: float `(B, C, H, W)` in [-1, 1], clamped, as float32 in [0, 1]."""
        return (images.float().clamp(-1, 1) + 1) / 2

    def as_uint8(self, viewed: torch.Tensor) -> torch.Tensor:
        """Return the input of feature networks: float `(B, C, H, W)` in [0, 1] rounded to uint8 in 0..255."""
        return (viewed * 255).round().byte()


@dataclass(frozen=True)
class PaperProtocol(CleanProtocol):
    """8-bit images that went through a JPEG, to compare with the paper's tables."""

    name: str = "paper"
    ssim_window: str = "uniform"
    pil_resize: int | None = 229

    def view(self, images: torch.Tensor) -> torch.Tensor:
        """Store float `(B, 1 or 3, H, W)` in [-1, 1], clamped, as RGB JPEGs and return what is read back.

        Returns:
            float32 `(B, 3, H, W)` in [0, 1], on the device of `images`; the JPEGs are made on the CPU.

        Raises:
            ValueError: A different number of channels, or images that are not finite.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                "the protocol paper measures images of shape (batch, 1 or 3, height, width), "
                f"got {tuple(images.shape)}."
            )
        if not images.isfinite().all():  # as 8-bit numbers they would look like images
            raise ValueError("images and reconstructions must be finite, got nan or infinite values.")
        eight_bits = (super().view(images) * 255).byte()  # truncated, not rounded
        decoded = []
        for pixels in eight_bits.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy():
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, format="JPEG")
            decoded.append(np.asarray(Image.open(file)))
        return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(images.device).float() / 255


_BY_NAME = {"clean": CleanProtocol(), "paper": PaperProtocol()}
PROTOCOLS = tuple(_BY_NAME)


def get_protocol(name: str) -> CleanProtocol:
    """Return the protocol of a name. Raises ValueError for any but `"clean"` and `"paper"`."""
    if name not in _BY_NAME:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}.")
    return _BY_NAME[name]
