"""One image as LooC codes and as JPEG and WebP of about the same size, and a map of the codes."""

from __future__ import annotations

import bisect
import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from looc_ldm.analysis.rate_distortion import CODEC_NAMES, CODECS
from looc_ldm.codes.images import decode_image, encode_image
from looc_ldm.codes.looc_file import ImageCodes
from looc_ldm.models.autoencoder import LooCVQModel

QUALITIES = range(1, 101)  # Pillow's
MOST_SEGMENTS, COLUMNS = 16, 4  # in the map of codes


class Stored(NamedTuple):
    """An image in one format."""

    name: str
    image: Image.Image  # decoded
    content: bytes  # size of the file


@torch.no_grad()
def compare(model: LooCVQModel, image: Image.Image) -> list[Stored]:
    """Return an image in the model's mode (`L` or `RGB`) as a .looc file, and as JPEG and WebP of about its size."""
    content = encode_image(model, image)
    looc = Stored("LooC", decode_image(model, content), content)
    return [looc, *(of_size(image, codec, len(content)) for codec in CODECS)]


def of_size(image: Image.Image, codec: str, size: int) -> Stored:
    """Return an image as JPEG or WebP of at most `size` bytes, at the highest quality; else as the smallest file."""

    def encoded(quality: int) -> bytes:
        file = io.BytesIO()
        image.save(file, codec.upper(), quality=quality, **CODECS[codec])
        return file.getvalue()

    # The size rises with the quality. A quality is only taken if its own file fits.
    fitting = bisect.bisect_right(QUALITIES, size, key=lambda quality: len(encoded(quality)))
    content = encoded(QUALITIES[max(fitting - 1, 0)])
    name = f"{CODEC_NAMES[codec]}, {f'quality {QUALITIES[fitting - 1]}' if fitting else 'smallest file'}"
    return Stored(name, Image.open(io.BytesIO(content)).convert(image.mode), content)


def code_map(codes: ImageCodes) -> Image.Image:
    """Return one picture per segment side by side, with one colour per codevector and transparent gaps."""
    indices = codes.indices[..., :MOST_SEGMENTS]
    height, width, count = indices.shape
    colours = np.random.default_rng(0).integers(40, 236, (codes.num_codevectors, 3), np.uint8)
    size = min(count, COLUMNS) * (width + 1) - 1, -(-count // COLUMNS) * (height + 1) - 1
    picture = Image.new("RGBA", size)
    for i in range(count):
        place = i % COLUMNS * (width + 1), i // COLUMNS * (height + 1)
        picture.paste(Image.fromarray(colours[indices[..., i]]), place)
    return enlarge(picture)


def enlarge(image: Image.Image) -> Image.Image:
    """Return a small image with every pixel as a square, so that its longer side has about 512 pixels."""
    factor = max(1, round(512 / max(image.size)))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
