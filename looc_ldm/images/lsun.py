"""Read LSUN as it is distributed: one LMDB of encoded images per scene and split (`church_outdoor_train_lmdb`).

https://github.com/fyu/lsun; the images are WebP or JPEG of 256 pixels or more at the shorter side, without classes.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets
import numpy as np

from looc_ldm.images.source import SPLIT_NAMES, Source, Stored
from looc_ldm.utils.errors import DataError
from looc_ldm.utils.files import make_folder, renamed_when_complete

KEYS_AT_ONCE = 100_000  # Python objects that are held at a time


def find_lmdbs(folder: Path) -> dict[str, Path] | None:
    """Return the LMDB of each split of a folder, which is one itself or holds them as sub-folders; None without any.

    The split is the word of a folder's name that is one (`bedroom_val_lmdb`: `validation`); without one it is `train`.

    Raises:
        DataError: Several LMDBs have one split, for example if there are several scenes.
    """
    if (folder / "data.mdb").is_file():
        return {"train": folder}
    splits: dict[str, Path] = {}
    for place in sorted(file.parent for file in folder.glob("*/data.mdb")):
        words = [SPLIT_NAMES.get(word) for word in place.name.lower().split("_")]
        split = next(filter(None, words), "train")
        if split in splits:
            raise DataError(
                f"{folder} holds two LMDBs of the split {split}, {splits[split].name} and {place.name}: put each scene "
                "into its own folder, or give one LMDB as data.path."
            )
        splits[split] = place
    return splits or None


class LmdbSource(Source):
    """Images of one LMDB, in the order of its keys, read when they are asked for.

    The keys are listed once and kept beside the prepared data sets of `datasets`, and all processes map the same
    memory (bedroom: 3 million keys of 40 bytes). Each process opens the database itself.

    Raises:
        DataError: The package `lmdb` is missing, or the file is damaged or cut off.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self._keys = _keys(self.folder)

    def __len__(self) -> int:
        return len(self._keys)

    def __reduce__(self):
        return LmdbSource, (self.folder,)

    def read(self, index: int) -> Stored:
        key = bytes(self._keys[index])
        with _environment(self.folder).begin() as transaction:
            content = transaction.get(key)
        return Stored(content, f"{key.decode(errors='backslashreplace')} of {self.folder}", -1)


_open: dict[Path, tuple[int, object]] = {}  # the process that opened it, and lmdb's environment


def _environment(folder: Path):
    """Return the open database of this process. LMDB forbids to open one twice, and to use one across a fork."""
    owner, environment = _open.get(folder, (None, None))
    if owner == os.getpid():
        return environment
    if environment is not None:  # inherited; closing it here leaves the parent's as it is
        environment.close()
    environment = _opened(folder)
    _open[folder] = (os.getpid(), environment)
    return environment


def _opened(folder: Path):
    try:
        import lmdb
    except ImportError:
        raise DataError(f'reading {folder} needs the package lmdb: pip install "looc-ldm[lsun]"') from None
    try:
        # Nothing is written, not even a lock file: the disk may be read-only. Images are read in random order.
        environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise DataError(f"cannot read {folder}: {error}") from error
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size = (folder / "data.mdb").stat().st_size
    if size < needed:  # reading behind its end would kill the process without a word
        environment.close()
        raise DataError(f"{folder / 'data.mdb'} is cut off: it has {size:,} of {needed:,} bytes.")
    return environment


def _keys(folder: Path) -> np.ndarray:
    """Return all keys in their order, `(n,)` bytes, mapped from a file, which is written if it is not there."""
    place = Path(datasets.config.HF_DATASETS_CACHE) / "lsun"
    state = (folder / "data.mdb").stat()
    name = hashlib.sha256(f"{folder}\0{state.st_size}\0{state.st_mtime_ns}".encode()).hexdigest()[:32]
    file = place / f"{name}.npy"
    if file.is_file():
        return np.load(file, mmap_mode="r")
    make_folder(place)
    # A name of its own for each process that may be listing them now; all write the same.
    own = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
    with renamed_when_complete(file, own) as partial, partial.open("wb") as opened:
        np.save(opened, np.concatenate(list(_key_arrays(folder))))
    return np.load(file, mmap_mode="r")


def _key_arrays(folder: Path) -> Iterator[np.ndarray]:
    yield np.empty(0, "S1")
    with _environment(folder).begin() as transaction:
        keys = iter(transaction.cursor().iternext(keys=True, values=False))
        while some := list(islice(keys, KEYS_AT_ONCE)):
            yield np.array(some)
