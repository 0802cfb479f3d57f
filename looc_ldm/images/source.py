"""Sources: the encoded images of one split, by index. `tables.py` and `lsun.py` hold further kinds."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga"),
)
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


class Stored(NamedTuple):
    """An encoded image.

    Attributes:
        content (`bytes` or `str`, *optional*): The encoded image, or the path or address of its file; None if it is
            missing.
        name (`str`): Name of the image in messages.
        label (`int`): Its class; -1 without classes.
    """

    content: bytes | str | None
    name: str
    label: int


class Source(ABC):
    """The images of one split, by index. Sent to the loader's workers, so it must be picklable.

    Attributes:
        classes (`list[str]`): Names of the classes; empty if the data has none.
    """

    classes: list[str] = []

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Stored:
        """Return image `index`, in [0, len), undecoded."""

    def labels(self) -> np.ndarray:
        """Return all labels, int64 `(len,)`; -1 without classes."""
        return np.full(len(self), -1)

    def sizes(self) -> np.ndarray | None:
        """Return the bytes of every stored image, int64 `(len,)`; None if that would need reading them."""
        return None

    def select(self, indices: np.ndarray) -> Source:
        """Return the images at some indices, in their order."""
        return Selection(self, np.asarray(indices, np.int64))


class Selection(Source):
    """Some of the images of a source, under the same names."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices, self.classes = source, indices, source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Stored:
        return self.source.read(int(self.indices[index]))

    def labels(self) -> np.ndarray:
        return self.source.labels()[self.indices]

    def sizes(self) -> np.ndarray | None:
        sizes = self.source.sizes()
        return None if sizes is None else sizes[self.indices]


class FileSource(Source):
    """Image files.

    Args:
        files: Their absolute paths.
        labels: Their classes; None without.
        classes: Names of the classes.
    """

    def __init__(self, files: Sequence[str], labels: Sequence[int] | None = None, classes: Sequence[str] = ()):
        # In one block of memory: a million Python strings are copied into every worker when they are first counted.
        self._files = pa.array([os.fsencode(file) for file in files], pa.large_binary())
        self._labels = np.full(len(files), -1) if labels is None else np.asarray(labels, np.int64)
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> Stored:
        file = os.fsdecode(self._files[index].as_py())
        return Stored(file, file, int(self._labels[index]))

    def labels(self) -> np.ndarray:
        return self._labels

    def sizes(self) -> np.ndarray:
        return np.array([os.path.getsize(file.as_py()) for file in self._files], np.int64)
