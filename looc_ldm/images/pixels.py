"""Convert images between encoded, PIL, uint8 in [0, 255] and float in [-1, 1], and bring them to one size.

`read_image` reads every image of the package.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from looc_ldm.utils.errors import DataError, UnreadableImage, one_line

if TYPE_CHECKING:
    from looc_ldm.images.config import DataConfig

CENTRE = (0.5, 0.5)
MODES = {1: "L", 3: "RGB"}  # PIL modes, by number of channels
# The transposition that turns an image upright, by its EXIF orientation. ImageOps.exif_transpose would copy every image
# that is upright already, and fails on other damage in the EXIF data.
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
    """Return uint8 pixels in [0, 255] as float32 in [-1, 1]."""
    # In place: memory for a batch of photographs costs more than the arithmetic.
    return image.to(torch.float32, copy=True).div_(127.5).sub_(1)


def to_uint8(image: torch.Tensor) -> torch.Tensor:
    """Return float pixels in [-1, 1] as uint8 in [0, 255], rounded; values outside are clamped."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def centre_crop(images: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """Crop images `(..., H, W)` at the centre to `size` = (height, width); no crop if `size` is None.

    If the margin is odd, its smaller half is above and to the left. Raises ValueError if the size is too large.
    """
    if size is None:
        return images
    (height, width), (given_height, given_width) = size, images.shape[-2:]
    if not (0 < height <= given_height and 0 < width <= given_width):
        raise ValueError(f"the centre, {height}x{width}, does not lie inside images of {given_height}x{given_width}.")
    top, left = (given_height - height) // 2, (given_width - width) // 2
    return images[..., top : top + height, left : left + width]


def to_pil(image: torch.Tensor) -> Image.Image:
    """Return a uint8 image `(C, H, W)`, C = 1 or 3, as a grey or RGB PIL image."""
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
        raise UnreadableImage(f"{name} is missing.")
    if isinstance(content, bytes):
        return content
    try:
        if "://" in str(content):
            with fsspec.open(str(content), "rb") as file:
                return file.read()
        return Path(content).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UnreadableImage(f"cannot read {name}: {one_line(error)}") from None
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
        UnreadableImage: The image is missing or cannot be decoded. The message is one line: the name and the reason.
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
    except MemoryError:  # not a fault of the image
        raise
    except Exception as error:  # errors of decoders on damaged files have no common base
        reason = one_line(error)
    raise UnreadableImage(f"cannot read {name}: {reason}")


def as_shown(image: Image.Image, mode: str, background: str = "white") -> Image.Image:
    """Return a PIL image as a viewer shows it, in mode `L` or `RGB`.

    It is rotated by its EXIF orientation, transparent pixels are blended with `background`, and 16 bits become 8.
    Palettes, CMYK and other modes are converted. Colour profiles are not applied. Only the first frame is read. Damaged
    EXIF data is ignored, as in viewers.

    Raises:
        DataError: 32-bit pixels, whose range is not known.
    """
    image.load()  # finds truncated data; turns a TIFF upright, and takes its EXIF orientation away
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow's errors on damaged EXIF data have no common base
        turn = None
    if image.mode in ("I", "F"):
        raise DataError(f"its pixels have 32 bits (mode {image.mode}), whose range is not known; 8 or 16 are read.")
    if image.mode.startswith("I;16"):  # which convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image if image.mode == mode else image.convert(mode)
    return image if turn is None else image.transpose(turn)


def to_square(
    image: Image.Image, fit: str, side: int, name: str = "the image", place: tuple[float, float] = CENTRE
) -> Image.Image:
    """Make an image `side` x `side` pixels by the method `fit`.

    Args:
        image: In mode `L` or `RGB`.
        fit: `crop`, `random_crop`, `adm` or `pad`.
        side: In pixels.
        name: Name of the image in errors.
        place: For `random_crop`: (left, top) offset of the crop, in [0, 1] of the margin.

    Raises:
        DataError: `fit` is `pad`, and the image is larger than `side`.
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
    """Pad an image with black on all sides. Raises DataError if it is larger than the result."""
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
    """Describe the transform in one sentence: FID depends on it."""
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
