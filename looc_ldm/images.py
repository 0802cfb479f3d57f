"""Pixels between their forms: uint8 in [0, 255], float in [-1, 1], PIL."""

from __future__ import annotations

import torch
from PIL import Image


def to_float(image: torch.Tensor) -> torch.Tensor:
    """uint8 pixels in [0, 255] as float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(image: torch.Tensor) -> torch.Tensor:
    """Float pixels in [-1, 1] as uint8 in [0, 255], rounded; values outside are clamped."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(image: torch.Tensor) -> Image.Image:
    """A uint8 image `(C, H, W)`, C = 1 or 3, as a grey or RGB PIL image."""
    pixels = image.cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
