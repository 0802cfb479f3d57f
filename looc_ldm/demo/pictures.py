"""Pictures of the demo page."""

from __future__ import annotations

import numpy as np
from PIL import Image

from looc_ldm.codes.looc_file import ImageCodes

MOST_SEGMENTS, COLUMNS = 16, 4  # in the map of codes


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
