"""Pixels between their forms: encoded, PIL, uint8 in [0, 255], float in [-1, 1].

`read_image` reads every image of the package.
"""

from __future__ import annotations

import io
from pathlib import Path

import fsspec
import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from looc_ldm.utils.errors import DataError, UnreadableImage, one_line

MODES = {1: "L", 3: "RGB"}  # of PIL, by channels
# How an image is stored, by the EXIF orientation, and what turns it upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_float(image: torch.Tensor) -> torch.Tensor:
    """uint8 pixels in [0, 255] as float32 in [-1, 1]."""
    # In place: memory for a batch of photographs costs more than the arithmetic.
    return image.to(torch.float32, copy=True).div_(127.5).sub_(1)


def to_uint8(image: torch.Tensor) -> torch.Tensor:
    """Float pixels in [-1, 1] as uint8 in [0, 255], rounded; values outside are clamped."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def centre_crop(images: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """The middle of images `(..., H, W)`, `size` = (height, width); where the margin is odd, the smaller half is above
    and to the left. The whole images if `size` is None. Raises ValueError if it does not lie inside.
    """
    if size is None:
        return images
    (height, width), (given_height, given_width) = size, images.shape[-2:]
    if not (0 < height <= given_height and 0 < width <= given_width):
        raise ValueError(f"the centre, {height}x{width}, does not lie inside images of {given_height}x{given_width}.")
    top, left = (given_height - height) // 2, (given_width - width) // 2
    return images[..., top : top + height, left : left + width]


def to_pil(image: torch.Tensor) -> Image.Image:
    """A uint8 image `(C, H, W)`, C = 1 or 3, as a grey or RGB PIL image."""
    pixels = image.cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def read_bytes(content: bytes | str | Path | None, name: str) -> bytes:
    """Return an encoded image, read from its file or address if it is not in memory.

    Args:
        content: The encoded image, or the path or address (`https://`, `hf://`) of its file. None if it is missing.
        name: Name of the image in errors.

    Raises:
        UnreadableImage: There is no such file.
        DataError: The machine or the network fails: a broken disk, too many open files, no permission.
    """
    if content is None:
        raise UnreadableImage(f"{name} is missing.", name)
    if isinstance(content, bytes):
        return content
    try:
        if "://" in str(content):
            with fsspec.open(str(content), "rb") as file:
                return file.read()
        return Path(content).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UnreadableImage(f"cannot read {name}: {one_line(error)}", name) from None
    except MemoryError:
        raise
    except Exception as error:  # network errors have no common base
        raise DataError(f"cannot read {name}: {one_line(error)}") from error


def read_image(content: bytes | str | Path | None, mode: str, name: str) -> Image.Image:
    """Read an image as a viewer shows it (see `as_shown`).

    Args:
        content: As in `read_bytes`.
        mode: `L` or `RGB`.
        name: Name of the image in errors.

    Raises:
        UnreadableImage: It is missing or cannot be decoded. One line with the name and the reason.
        DataError: The machine or the network fails.
    """
    encoded = read_bytes(content, name)
    try:
        if not encoded:
            raise ValueError("the file is empty")
        with Image.open(io.BytesIO(encoded)) as image:
            return as_shown(image, mode)
    except UnidentifiedImageError:  # its message names an object in memory
        reason = "not an image, or in a format that Pillow does not know"
    except MemoryError:  # says nothing about the image
        raise
    except Exception as error:  # errors of decoders on damaged files have no common base
        reason = one_line(error)
    raise UnreadableImage(f"cannot read {name}: {reason}", name)


def as_shown(image: Image.Image, mode: str, background: str = "white") -> Image.Image:
    """A PIL image as a viewer shows it, in mode `L` or `RGB`.

    It is turned as its EXIF data says, transparency is put on `background`, and 16 bits become 8. Palettes, CMYK and
    other modes are converted; colour profiles are not applied; of several frames the first is taken. Damaged EXIF data
    turns nothing, as in viewers.

    Raises:
        DataError: 32-bit pixels, whose range is not known.
    """
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # what Pillow raises on damaged EXIF data has no common base
        turn = None
    if image.mode in ("I", "F"):
        raise DataError(f"its pixels have 32 bits (mode {image.mode}), whose range is not known; 8 or 16 are read.")
    if image.mode.startswith("I;16"):  # which convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image.load()  # truncated data is found here
    image = image if image.mode == mode else image.convert(mode)
    return image if turn is None else image.transpose(turn)
