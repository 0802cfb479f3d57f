"""Read the images of a set, each brought to one size, and draw the random numbers of training.

Order, crops and flips of training are functions of (seed, position in the stream of images) alone. A run that resumes
at position p, or that is divided over a different number of processes, sees the same images with the same flips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from looc_ldm.images.config import DataConfig
from looc_ldm.images.folders import ALL
from looc_ldm.images.open import names_of_split, open_sources, split_name
from looc_ldm.images.pixels import CENTRE, MODES, read_image, to_pixels, to_square
from looc_ldm.images.source import Source, Stored
from looc_ldm.images.unreadable import warn_of
from looc_ldm.utils.errors import ConfigError, DataError, UnreadableImage

MOST_IN_A_ROW = 1000  # unreadable images, one after the other, before reading stops
# Random numbers of one seed must not overlap: each use has its own number.
ORDER, FLIP, NOISE, CROP, SHARDS, BLOCKS = 0, 1, 2, 3, 5, 6

Item = TypeVar("Item")


def random_at(seed: int, use: int, position: int) -> np.random.Generator:
    """Return a generator that depends only on the seed, the use (`FLIP`, ...) and the position in the stream."""
    return np.random.Generator(np.random.Philox(key=[(seed << 8) + use, position]))


@dataclass
class Report:
    """Notes on an item of a stream, or on a batch, next to its tensors.

    Attributes:
        unreadable (`list[str]`): One line for each image that could not be read; see `ImageReader.first_readable`.
        cursor (`tuple[int, ...]`, *optional*): The position at which the lane of a streamed data set continues.
    """

    unreadable: list[str] = field(default_factory=list)
    cursor: tuple[int, ...] | None = None


class ImageReader:
    """Turn encoded images into tensors of one size.

    Args:
        config (`DataConfig`): Settings of the data set, such as `resolution` and `fit`.
        channels (`int`): 1 (grey) or 3.

    Attributes:
        content_size (`tuple[int, int]`, *optional*): Height and width of the images inside their padding, if `fit` is
            `pad`; metrics are measured there.
        needs_labels (`bool`): Count images without a label as unreadable.
    """

    def __init__(self, config: DataConfig, channels: int):
        if channels not in MODES:
            raise ConfigError(f"images have 1 (grey) or 3 channels, but the model expects {channels}.")
        self.config = config
        self.mode = MODES[channels]
        self.content_size: tuple[int, int] | None = None
        self.needs_labels = False

    def decode(self, stored: Stored) -> Image.Image:
        """Return an image at its own size. Raises UnreadableImage."""
        if self.config.max_image_pixels is not None:
            Image.MAX_IMAGE_PIXELS = self.config.max_image_pixels // 2  # Pillow refuses twice as many
        return read_image(stored.content, self.mode, stored.name)

    def to_item(self, stored: Stored, at: tuple[int, int] | None = None) -> tuple[torch.Tensor, int]:
        """Return an image as uint8 `(C, resolution, resolution)`, and its label, -1 without classes.

        Args:
            stored: The image.
            at: (seed, position in the stream), which decide how training crops and mirrors it. None: cropped at the
                centre, not mirrored.

        Raises:
            UnreadableImage: The image cannot be read.
            DataError: `fit` is `pad`, and the image differs in size from the other images.
        """
        if self.needs_labels and stored.label < 0:
            raise UnreadableImage(f"{stored.name} has no label")
        image = self.decode(stored)
        if self.content_size not in (None, image.size[::-1]):
            height, width = self.content_size
            raise DataError(
                f"{stored.name} is {image.width}x{image.height}: fit=pad needs images of one size, and the first is "
                f"{width}x{height}."
            )
        place, mirrored = CENTRE, False
        if at is not None:
            seed, position = at
            if self.config.fit == "random_crop":
                place = tuple(random_at(seed, CROP, position).random(2))
            mirrored = self.config.flip and random_at(seed, FLIP, position).random() < 0.5
        pixels = to_pixels(to_square(image, self.config.fit, self.config.resolution, stored.name, place))
        return pixels.flip(-1) if mirrored else pixels, stored.label

    def first_readable(self, candidates: Iterable, read: Callable[..., Item]) -> tuple[Item, list[str]]:
        """Return the first candidate that `read` can read, and one line for each before it: its name and the reason.

        Raises DataError if none of the first `MOST_IN_A_ROW` can be read.
        """
        problems: list[str] = []
        for candidate in islice(candidates, MOST_IN_A_ROW):
            try:
                return read(candidate), problems
            except UnreadableImage as error:
                problems.append(str(error))
        message = f"{len(problems)} images of {self.config.path} in a row cannot be read. The last: {problems[-1]}"
        raise DataError(message)


class ImageSet(ImageReader, Dataset):
    """The images of one split. Item i is what `read(i)` returns.

    Args:
        source (`Source`): The images, encoded.
        config, channels: See `ImageReader`.
        skip_unreadable (`bool`, default False): If an item cannot be read, return the next readable one and log a
            warning. Otherwise reading it raises `UnreadableImage`.

    Attributes:
        classes (`list[str]`): Names of the classes; empty if the data has none.
    """

    def __init__(self, source: Source, config: DataConfig, channels: int, skip_unreadable: bool = False):
        super().__init__(config, channels)
        self.source = source
        self.skip_unreadable = skip_unreadable
        self.classes = source.classes
        self._warned: set[str] = set()
        if config.fit == "pad" and len(source):
            width, height = self._readable(self.open, 0)[0].size
            self.content_size = (height, width)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._readable(self.read, range(len(self))[int(index)])  # IndexError ends a loop over the images

    def read(self, index: int, at: tuple[int, int] | None = None) -> tuple[torch.Tensor, int]:
        """Return image `index` and its label; see `to_item`."""
        return self.to_item(self.source.read(index), at)

    def open(self, index: int) -> tuple[Image.Image, Stored]:
        """Return image `index` at its original size, and its `Stored` record. Raises UnreadableImage."""
        stored = self.source.read(index)
        return self.decode(stored), stored

    def indices_from(self, index: int) -> Iterator[int]:
        """Return all indices, from `index` on and then from 0, to try in this order until an image can be read."""
        return ((index + offset) % len(self) for offset in range(len(self)))

    def labels(self) -> np.ndarray:
        """Return all labels, int64 `(len,)`; -1 without classes."""
        return self.source.labels()

    def pixels(self) -> Iterator[torch.Tensor]:
        """Yield the images alone, without labels."""
        return (pixels for pixels, _ in self)

    def _readable(self, read: Callable, index: int):
        if not self.skip_unreadable:
            return read(index)
        item, problems = self.first_readable(self.indices_from(index), read)
        warn_of(problems, self._warned)
        return item


def load_image_set(config: DataConfig, channels: int) -> ImageSet:
    """Return the images of `config.split`; if that is empty, of the test, validation or only split.

    For data that is not a folder of images, `all` means the same as an empty split.

    Raises:
        DataError: No such data, a folder without images, an unknown split or column.
    """
    whole = config.split in ("", ALL)
    splits = open_sources(config, None if whole else names_of_split(config.split))
    if whole and config.split not in splits:
        held_out = [name for name in ("test", "validation") if name in splits]
        config = replace(config, split=[*held_out, *splits][0])
    return ImageSet(splits[split_name(splits, "split", config)], config, channels)


def spread(length: int, count: int) -> np.ndarray:
    """Return up to `count` of `length` positions at even distances: of a set sorted by class, as many of each."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))
