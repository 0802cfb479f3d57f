"""Finding out what `data.path` names: a folder of images, tables, shards, LMDBs, or a data set on the hub."""

from __future__ import annotations

import logging
import os
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path

import datasets
import pyarrow as pa

import looc_ldm
from looc_ldm.errors import DataError
from looc_ldm.training import lsun
from looc_ldm.training.config import DataConfig
from looc_ldm.training.source import IMAGE_SUFFIXES, SPLIT_NAMES, FileSource, Source
from looc_ldm.training.tables import open_tables

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}  # of datasets, by the suffix of shards
BUNDLED = Path(looc_ldm.__file__).resolve().parent / "data"  # one folder of parquet files a data set

logger = logging.getLogger(__name__)


def names_of_split(name: str | None) -> tuple[str, ...]:
    """Return the names that a split may have: as a setting says, or the usual one (`validation` for `val`)."""
    return tuple(dict.fromkeys((name, SPLIT_NAMES.get(name.lower(), name)))) if name else ()


def split_name(splits: Iterable[str], setting: str, config: DataConfig) -> str:
    """Return the split that `data.split` or `data.validation_split` names.

    Raises:
        DataError: There is none.
    """
    name = getattr(config, setting)
    for called in names_of_split(name):
        if called in splits:
            return called
    raise DataError(f"data.{setting}={name!r}: {config.path} has the splits {', '.join(splits)}.")


def open_sources(config: DataConfig, wanted: Collection[str] | None = None) -> dict[str, Source]:
    """Return the splits of what `data.path` names.

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
            check_tar_end(Path(file))  # `datasets` would leave out the rest of it without a word
        return open_tables(datasets.load_dataset(builder, data_files=files), config, wanted)
    lmdbs = lsun.find_lmdbs(folder)
    if lmdbs is not None:
        return {split: lsun.LmdbSource(lmdb) for split, lmdb in lmdbs.items()}
    return _image_folder(folder, split_folders, config)


def folder_of(config: DataConfig) -> Path | None:
    """Return the folder that `data.path` names; None if it is the id of a data set on the hub.

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
    """Find the parquet files or WebDataset shards of a folder: the builder of `datasets` for them, and files by split.

    They lie in sub-folders that are splits, or if there are none, in the folder or in its `data` (as on the hub).
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
    """Raise DataError for a tar on this machine that is cut off, which the archive's reader may take for its end."""
    if file.suffix == ".tar" and file.is_file():
        with file.open("rb") as tar:
            tar.seek(max(file.stat().st_size - tarfile.BLOCKSIZE, 0))
            if any(tar.read()):
                raise DataError(f"cannot read {file}: the archive is cut off, as it does not end in zeros.")


def _image_folder(folder: Path, split_folders: list[tuple[Path, str]], config: DataConfig) -> dict[str, Source]:
    """Treat a folder of images like a table with the columns `image` and `label`, the latter if there are classes."""
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
    """Return paths, relative to the folder, of the images in it and below it, sorted; hidden ones are left out."""
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
    """Find the sub-folders that are splits, and the names of these."""
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
