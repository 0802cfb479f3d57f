"""Transforms of an image to one size, as `data.fit` names them, and pixels as a tensor.

FID depends on the transform, so `describe_transform` says it in words, for the record and for the model card.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps

from looc_ldm.images.config import DataConfig
from looc_ldm.utils.errors import DataError

CENTRE = (0.5, 0.5)


def to_square(
    image: Image.Image, fit: str, side: int, name: str = "the image", place: tuple[float, float] = CENTRE
) -> Image.Image:
    """Bring an image to `side` x `side` pixels, as `DataConfig.fit` names it.

    Args:
        image: In mode `L` or `RGB`.
        fit: `crop`, `random_crop`, `adm` or `pad`.
        side: In pixels.
        name: Name of the image in errors.
        place: For `random_crop`: the share of what is cropped that goes at the left and at the top, in [0, 1].

    Raises:
        DataError: `pad` of an image that is larger.
    """
    if fit == "crop":
        return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    if fit == "random_crop":
        return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS, centering=place)
    return adm_crop(image, side) if fit == "adm" else pad(image, side, name)


def adm_crop(image: Image.Image, side: int) -> Image.Image:
    """Return the centre crop of ADM (Dhariwal & Nichol 2021), which most published FIDs on ImageNet are measured with.

    The image is halved by box filters while its shorter side is at least twice `side`, resized (bicubic) until the
    shorter side is `side`, and cropped at the centre, rounded towards the upper left.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, upper, left + side, upper + side))


def pad(image: Image.Image, side: int, name: str = "the image") -> Image.Image:
    """Return the image in the centre of a black one. Raises DataError if it is larger."""
    if max(image.size) > side:
        raise DataError(
            f"{name} is {image.width}x{image.height}: fit=pad needs images of at most {side}x{side} (the "
            "resolution); fit=crop takes any."
        )
    canvas = Image.new(image.mode, (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Return a contiguous uint8 tensor `(C, H, W)` of an image in mode `L` or `RGB`."""
    return torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))


def describe_transform(config: DataConfig) -> str:
    """Describe the transform in one sentence.

    >>> describe_transform(DataConfig(resolution=256, fit="crop", flip=True))
    'centred square of the shorter side, resized to 256x256 (Lanczos); mirrored at random in training'
    """
    side = config.resolution
    square = {
        "crop": f"centred square of the shorter side, resized to {side}x{side} (Lanczos)",
        "random_crop": "square of the shorter side, at a random place in training and centred elsewhere, resized to "
        f"{side}x{side} (Lanczos)",
        "adm": f"halved by box filters while the shorter side is at least {2 * side}, shorter side resized to {side} "
        f"(bicubic), centre crop {side}x{side}",
        "pad": f"not resized, in the centre of {side}x{side} black pixels",
    }[config.fit]
    return square + ("; mirrored at random in training" if config.flip else "")
