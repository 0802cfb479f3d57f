"""What happens to an image file: decoding, the transform to one size that `data.fit` names, pixels as a tensor.

FID depends on the transform, so `describe_transform` says it in words, for the record and for the model card.
"""

from __future__ import annotations

import io
import logging
import time
from pathlib import Path

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from looc_ldm.errors import ConfigError, DataError, UnreadableImage
from looc_ldm.images import MODES, as_shown
from looc_ldm.training.config import DataConfig

CENTRE = (0.5, 0.5)
# What may be over soon: a network that is gone, another process that has opened too many files.
RETRIES = 3
PAUSE_SECONDS = 5.0

logger = logging.getLogger(__name__)


def mode_of(channels: int) -> str:
    """PIL's mode of images with so many channels. Raises ConfigError if there is none."""
    if channels not in MODES:
        raise ConfigError(f"images have 1 (grey) or 3 channels, the model asks for {channels}.")
    return MODES[channels]


def read_encoded(content: bytes | str | Path | None, name: str) -> bytes:
    """The encoded image, read from its file or address where it is not at hand. What fails is tried again, a few times.

    Args:
        content: The encoded image, or the path or address (`https://`, `hf://`) of its file; None is a missing one.
        name: What the image is called in errors.

    Raises:
        UnreadableImage: There is no such file.
        DataError: The machine or the network does not give it: a disk that fails, too many open files, no permission.
    """
    if content is None:
        raise UnreadableImage(f"{name} is missing.", name)
    if isinstance(content, bytes):
        return content
    failures = 0
    while True:
        try:
            if "://" in str(content):
                with fsspec.open(str(content), "rb") as file:
                    return file.read()
            return Path(content).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise UnreadableImage(f"cannot read {name}: {_reason(error)}", name) from None
        except MemoryError:
            raise
        except Exception as error:  # those of networks have no common base
            failures += 1
            reason = f"cannot read {name}: {_reason(error)}"
            if failures > RETRIES:
                raise DataError(reason) from error
            logger.warning("%s; it is tried again (%d of %d)", reason, failures, RETRIES)
            time.sleep(PAUSE_SECONDS * failures)


def decode(content: bytes | str | Path | None, mode: str, name: str) -> Image.Image:
    """An image as a viewer shows it (`looc_ldm.images.as_shown`).

    Args:
        content: As in `read_encoded`.
        mode: `L` or `RGB`.
        name: What the image is called in errors.

    Raises:
        UnreadableImage: It is missing or cannot be decoded. One line with the name and what is wrong.
        DataError: The machine or the network does not give it.
    """
    encoded = read_encoded(content, name)
    try:
        if not encoded:
            raise ValueError("the file is empty")
        with Image.open(io.BytesIO(encoded)) as image:
            return as_shown(image, mode)
    except UnidentifiedImageError:  # its text names an object in memory
        reason = "no image, or of a format that Pillow does not know"
    except MemoryError:  # says nothing about the image
        raise
    except Exception as error:  # what decoders raise on damaged files has no common base
        reason = _reason(error)
    raise UnreadableImage(f"cannot read {name}: {reason}", name)


def _reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(reason).split())


def to_square(
    image: Image.Image, fit: str, side: int, name: str = "the image", place: tuple[float, float] = CENTRE
) -> Image.Image:
    """Bring an image to `side` x `side` pixels, as `DataConfig.fit` names it.

    Args:
        image: In mode `L` or `RGB`.
        fit: `crop`, `random_crop`, `adm` or `pad`.
        side: In pixels.
        name: What the image is called in errors.
        place: Of `random_crop`: the share of what is cropped that goes at the left and at the top, in [0, 1].

    Raises:
        DataError: `pad` of an image that is larger.
    """
    if fit == "crop":
        return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    if fit == "random_crop":
        return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS, centering=place)
    return adm_crop(image, side) if fit == "adm" else pad(image, side, name)


def adm_crop(image: Image.Image, side: int) -> Image.Image:
    """The centre crop of ADM (Dhariwal & Nichol 2021), which most published FIDs on ImageNet are measured with.

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
    """The image in the centre of a black one. Raises DataError if it is larger."""
    if max(image.size) > side:
        raise DataError(
            f"{name} is {image.width}x{image.height}: fit=pad needs images of at most {side}x{side} (the "
            "resolution); fit=crop takes any."
        )
    canvas = Image.new(image.mode, (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def to_pixels(image: Image.Image) -> torch.Tensor:
    """A contiguous uint8 tensor `(C, H, W)` of an image in mode `L` or `RGB`."""
    return torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))


def describe_transform(config: DataConfig) -> str:
    """What is done to the images, in one sentence.

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
