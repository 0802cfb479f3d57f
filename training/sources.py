"""Where images come from: each kind of data as a `Source`, one encoded image and its class for every index.

`open_sources` finds out what `data.path` names. What comes after, sizes, order, augmentation and resuming, is the same
for all of them (`looc_ldm.training.data`).
"""

from __future__ import annotations

import logging
import os
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa

import looc_ldm
from looc_ldm.errors import DataError
from looc_ldm.training.config import DataConfig

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}  # of datasets, by the suffix of shards
BUNDLED = Path(looc_ldm.__file__).resolve().parent / "data"  # one folder of parquet files a data set


logger = logging.getLogger(__name__)


class Stored(NamedTuple):
    """An image as it is stored.

    Attributes:
        content (`bytes` or `str`, *optional*): The encoded image, or the path or address of its file; None where it is
            missing.
        name (`str`): What it is called in messages.
        label (`int`): Its class; -1 without classes.
    """

    content: bytes | str | None
    name: str
    label: int


class Source(ABC):
    """The images of one split, by index. Sent to the loader's workers, so it must be picklable.

    Attributes:
        classes (`list[str]`): Names of the classes; empty where the data has none.
    """

    classes: list[str] = []

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Stored:
        """Image `index`, in [0, len), undecoded."""

    def labels(self) -> np.ndarray:
        """All labels, int64 `(len,)`; -1 without classes."""
        return np.full(len(self), -1)

    def sizes(self) -> np.ndarray | None:
        """Bytes of every image as it is stored, int64 `(len,)`, where that can be told without reading them."""
        return None

    def select(self, indices: np.ndarray) -> Source:
        """The images at some indices, in their order."""
        return Selection(self, np.asarray(indices, np.int64))


class Selection(Source):
    """Some of the images of another source, under the names that they have there."""

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


# Finding out what data.path names ----------------------------------------------------------------------------------


def names_of_split(name: str | None) -> tuple[str, ...]:
    """What a split may be called that a setting names: as it says, or by the usual name (`validation` for `val`)."""
    return tuple(dict.fromkeys((name, SPLIT_NAMES.get(name.lower(), name)))) if name else ()


def open_sources(config: DataConfig, wanted: Collection[str] | None = None) -> dict[str, Source]:
    """The splits of what `data.path` names.

    Args:
        config: Settings of the data.
        wanted: Names of splits; those of a table that are not among them get no labels, which may be wrong there. All
            if not given.

    Raises:
        DataError: There is no such data, or it is not what it should be.
    """
    try:
        splits = _open_sources(config, wanted)
    except DataError:
        raise
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot load data.path={config.path!r}: {_reason(error)}") from error
    for name, source in splits.items():
        if source.classes and config.num_classes not in (None, len(source.classes)):
            raise DataError(
                f"data.num_classes={config.num_classes}: the split {name} of {config.path} has "
                f"{len(source.classes)} classes."
            )
    if config.num_classes is not None and not any(source.classes for source in splits.values()):
        raise DataError(f"data.num_classes={config.num_classes}: {config.path} has no labels.")
    return splits


def _open_sources(config: DataConfig, wanted: Collection[str] | None) -> dict[str, Source]:
    from looc_ldm.training import lsun  # these need this module
    from looc_ldm.training.tables import open_tables

    folder = folder_of(config)
    if folder is None:
        return open_tables(datasets.load_dataset(config.path), config, wanted)
    if (folder / "dataset_dict.json").is_file():
        return open_tables(datasets.load_from_disk(folder), config, wanted)
    if (folder / "dataset_info.json").is_file():
        return open_tables({"train": datasets.load_from_disk(folder)}, config, wanted)
    split_folders = split_folders_of(folder)
    shards = find_shards(folder, split_folders)
    if shards is not None:
        if next(_walk(folder, "", ()), None) is not None:
            raise DataError(f"{folder} holds images beside {shards[0]} files: give a folder of only one kind.")
        builder, files = shards
        for file in chain.from_iterable(files.values()):
            try:
                check_tar_end(Path(file))  # `datasets` would leave out the rest of it without a word
            except tarfile.ReadError as error:
                raise DataError(f"cannot read {file}: {error}") from None
        return open_tables(datasets.load_dataset(builder, data_files=files), config, wanted)
    lmdbs = lsun.find_lmdbs(folder)
    if lmdbs is not None:
        return {split: lsun.LmdbSource(lmdb) for split, lmdb in lmdbs.items()}
    return _image_folder(folder, split_folders, config)


def folder_of(config: DataConfig) -> Path | None:
    """The folder that `data.path` names; None where it is the id of a data set on the hub.

    Raises:
        DataError: It is neither.
    """
    bundled = sorted({file.parent.name for file in BUNDLED.glob("*/*.parquet")})  # a model lies beside them
    folder = BUNDLED / config.path if config.path in bundled else Path(config.path)
    if config.path and folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or config.path.count("/") != 1:
        raise DataError(
            f"data.path={config.path!r} is neither bundled ({', '.join(bundled)}), a folder, nor a hub id (user/name)."
        )
    return None


def find_shards(
    folder: Path, split_folders: list[tuple[Path, str]] | None = None
) -> tuple[str, dict[str, list[str]]] | None:
    """The parquet files or WebDataset shards of a folder: the builder of `datasets` for them, and the files by split.

    They lie in sub-folders that are splits, or where there are none, in the folder or in its `data` (as on the hub).
    The split is then the first word of a file's name that is one (`imagenet1k-train-0003.tar`), else it is `train`.
    """
    split_folders = split_folders_of(folder) if split_folders is None else split_folders
    places = split_folders or [(folder.resolve(), None), (folder.resolve() / "data", None)]
    for suffix, builder in BUILDERS.items():
        splits: dict[str, list[str]] = {}
        for place, split in places:
            for file in sorted(place.glob(f"*{suffix}")):
                words = [SPLIT_NAMES.get(word) for word in re.split(r"[-_.]", file.name.lower())]
                splits.setdefault(split or next(filter(None, words), "train"), []).append(str(file))
        if splits:
            return builder, splits
    return None


def check_tar_end(file: Path) -> None:
    """Refuse a tar on this machine that is cut off, which the archive's reader may take for its end.

    Raises:
        tarfile.ReadError: It does not end in zeros, as tars do. Not for other files, nor for addresses.
    """
    if file.suffix == ".tar" and file.is_file():
        with file.open("rb") as tar:
            tar.seek(max(file.stat().st_size - tarfile.BLOCKSIZE, 0))
            if any(tar.read()):
                raise tarfile.ReadError("the archive is cut off: it does not end in zeros")


def _image_folder(folder: Path, split_folders: list[tuple[Path, str]], config: DataConfig) -> dict[str, Source]:
    """A folder of images is like a table of the columns `image` and `label`, the latter if there are classes."""
    if config.image_column != "image":
        raise DataError(f"data.image_column={config.image_column!r}: {config.path} has image, label.")
    places = {split: place for place, split in split_folders} or {"train": folder.resolve()}
    files = {split: found for split, place in places.items() if (found := _image_files(place))}
    if not files:
        raise DataError(f"no images in the folder {folder} (looked for {', '.join(IMAGE_SUFFIXES)}).")
    # The first sub-folder is the class, if all images are in some. The names are those of all splits together.
    folders = {split: [name.split(os.sep)[0] for name in names if os.sep in name] for split, names in files.items()}
    labelled = [split for split in files if len(folders[split]) == len(files[split])]
    for split, names in files.items():
        beside = [name for name in names if os.sep not in name]
        if folders[split] and beside and config.label_column == "label":
            logger.warning(
                "%s: %d images lie in sub-folders and %d beside them, the first of which is %s, so there are no "
                "classes; data.label_column='' says that there are none",
                places[split],
                len(folders[split]),
                len(beside),
                beside[0],
            )
    classes = sorted(set().union(*(folders[split] for split in labelled)))
    index = {name: label for label, name in enumerate(classes)}
    sources: dict[str, Source] = {}
    for split, names in files.items():
        paths = [os.path.join(places[split], name) for name in names]
        if split in labelled and len(classes) > 1 and config.label_column == "label":
            sources[split] = FileSource(paths, [index[name] for name in folders[split]], classes)
        else:
            sources[split] = FileSource(paths)
    return sources


def _image_files(folder: Path) -> list[str]:
    """Paths, relative to the folder, of the images in it and below it, sorted; hidden ones are left out."""
    return sorted(_walk(folder, "", ()))


def _walk(folder: Path | str, below: str, above: tuple[str, ...]) -> Iterator[str]:
    place = os.path.realpath(folder)
    if place in above:  # a link that leads back
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith((".", "__")):
                continue
            name = os.path.join(below, entry.name)
            if entry.name.lower().endswith(IMAGE_SUFFIXES):
                yield name
            elif entry.is_dir():
                yield from _walk(entry.path, name, (*above, place))


def split_folders_of(folder: Path) -> list[tuple[Path, str]]:
    """Sub-folders that are splits, and the names of these."""
    with os.scandir(folder) as entries:  # a flat folder may have millions: only a handful become objects that are kept
        found = sorted(entry.name for entry in entries if entry.name.lower() in SPLIT_NAMES and entry.is_dir())
    places: dict[str, Path] = {}
    for name in found:
        split = SPLIT_NAMES[name.lower()]
        if split in places:
            raise DataError(f"{folder} has two folders of the split {split}: {places[split].name} and {name}.")
        places[split] = (folder / name).resolve()
    return [(place, split) for split, place in places.items()]


def _reason(error: Exception) -> str:
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__  # what happened; the error itself only says that something did
    return str(error).strip().split("\n")[0] or type(error).__name__
