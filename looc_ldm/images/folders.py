"""Open folders of image files, with or without classes."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from looc_ldm.images.config import DataConfig
from looc_ldm.images.source import IMAGE_SUFFIXES, SPLIT_NAMES, FileSource, Source
from looc_ldm.images.tables import label_error
from looc_ldm.utils.errors import DataError

MOST_CLASSES = 1_000_000  # larger labels are probably not class numbers
LABEL_FILES = ("dataset.json", "metadata.csv", "metadata.jsonl", "metadata.parquet")
ALL = "all"  # the split that holds all images of a folder, whatever its sub-folders are called

logger = logging.getLogger(__name__)


def files_in(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[str]:
    """Return paths, relative to the folder, of the files with some suffixes in it and below it, sorted.

    Links are followed. Hidden files and `__MACOSX` are left out. One
    warning counts files with other suffixes, and one counts label files in sub-folders.
    """
    found, unused, others = [], [], Counter()
    for name in _walk(folder):
        suffix = os.path.splitext(name)[1].lower()
        if suffix in suffixes:
            found.append(name)
        elif name in LABEL_FILES:
            pass  # read by `_stated_labels`
        elif os.path.basename(name) in LABEL_FILES:
            unused.append(name)
        else:
            others[suffix or "none"] += 1
    if unused:
        count, first = len(unused), min(unused)
        logger.warning("%s: %d label files in sub-folders are not used; the first is %s", folder, count, first)
    if found and others:
        counts = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common())
        logger.warning("%s: %d files with other suffixes are not read (%s)", folder, others.total(), counts)
    return sorted(found)


def first_image(folder: Path, leave_out: Collection[str] = ()) -> str | None:
    """Return the path of any image in or below a folder. Entries named in `leave_out` (lower case) are skipped."""
    return next((name for name in _walk(folder, leave_out) if name.lower().endswith(IMAGE_SUFFIXES)), None)


def _walk(
    folder: Path | str, leave_out: Collection[str] = (), below: str = "", above: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yield the relative path of each file."""
    place = os.path.realpath(folder)
    if place in above:  # a link that leads back
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX" or entry.name.lower() in leave_out:
                continue
            name = os.path.join(below, entry.name)
            # Links in a circle are an error to `entry.is_dir()`.
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                yield from _walk(entry.path, (), name, (*above, place))
            else:
                yield name


def split_folders_of(folder: Path) -> list[tuple[Path, str]]:
    """Return (sub-folder, split) for each sub-folder with the name of a split."""
    with os.scandir(folder) as entries:  # a flat folder may have millions: only a handful become objects that are kept
        found = sorted(entry.name for entry in entries if entry.name.lower() in SPLIT_NAMES and entry.is_dir())
    places: dict[str, Path] = {}
    for name in found:
        split = SPLIT_NAMES[name.lower()]
        if split in places:
            raise DataError(f"{folder} has two folders of the split {split}: {places[split].name} and {name}.")
        places[split] = (folder / name).resolve()
    return [(place, split) for split, place in places.items()]


def image_folder(folder: Path, split_folders: list[tuple[Path, str]], config: DataConfig) -> dict[str, Source]:
    """Open a folder of images. Sub-folders with the names of splits are splits; others are classes.

    Labels in `dataset.json` (EDM, StyleGAN), or in `metadata.csv`, `.jsonl` or `.parquet` (imagefolder of `datasets`),
    take precedence over sub-folders.

    Raises:
        DataError: There are no images, or a sub-folder may be either a split or a class.
    """
    if config.image_column != "image":
        raise DataError(f"data.image_column={config.image_column!r}: {config.path} has the columns image and label.")
    if split_folders:
        _check_beside(folder, [place.name for place, _ in split_folders])
        for file in filter(Path.is_file, (folder / name for name in LABEL_FILES)):
            logger.warning("%s is not used: each split may have one in its own folder", file)
    whole = ALL if config.split == ALL else "train"
    places = {split: place for place, split in split_folders} or {whole: folder.resolve()}
    files = {split: found for split, place in places.items() if (found := files_in(place))}
    if not files:
        raise DataError(
            f"no images in the folder {folder} (looked for {', '.join(IMAGE_SUFFIXES)}). Uncompressed "
            "shards (.tar, .parquet) may be in it, in its sub-folder data, or in sub-folders named like splits."
        )
    labels = {split: _labels(places[split], names, config) for split, names in files.items()}
    known = {label for of_split in labels.values() for label in of_split if label is not None}
    numbered = bool(known) and all(isinstance(label, int) for label in known)
    if numbered and max(known) >= MOST_CLASSES:
        raise DataError(f"{folder}: a label is {max(known)}; class numbers start at 0 and go up to {MOST_CLASSES - 1}.")
    if numbered:
        classes = [str(number) for number in range(config.num_classes or max(known) + 1)]
    else:
        classes = sorted(map(str, known))
    index = {name: number for number, name in enumerate(classes)}
    sources: dict[str, Source] = {}
    for split, names in files.items():
        paths = [os.path.join(places[split], name) for name in names]
        if len(classes) < 2 or all(label is None for label in labels[split]):
            sources[split] = FileSource(paths)
            continue
        for path, label in zip(paths, labels[split], strict=True):
            if label is not None and str(label) not in index:
                raise DataError(label_error(path, label, classes))
        own = [-1 if label is None else index[str(label)] for label in labels[split]]
        sources[split] = FileSource(paths, own, classes)
    return sources


def _check_beside(folder: Path, splits: list[str]) -> None:
    beside = first_image(folder, leave_out=SPLIT_NAMES)
    if beside is None:
        return
    if len(splits) == 1:
        raise DataError(
            f"{folder} has a folder {splits[0]}, named like a split, beside other images, such as {beside}: "
            f"data.split=all takes every sub-folder as a class; data.path={folder / splits[0]} takes that one alone."
        )
    message = "%s: images beside the splits (%s) are left out, such as %s; data.split=all: sub-folders are classes"
    logger.warning(message, folder, ", ".join(splits), beside)


def _labels(place: Path, names: list[str], config: DataConfig) -> list[int | str | None]:
    """Return the label of each image of a split: from a label file, or its first sub-folder if all have one."""
    if not config.label_column:
        return [None] * len(names)
    stated = _stated_labels(place, config)
    if stated:
        labels = [stated.get(name.replace(os.sep, "/")) for name in names]
        if not any(name.replace(os.sep, "/") in stated for name in names):
            first = next(iter(stated))
            logger.warning("%s: the label file lists other files, such as %s: there are no classes", place, first)
        labels = [None if label in ("", -1) else label for label in labels]
        if any(label is not None for label in labels) and len(set(labels) - {None}) == 1:
            logger.warning("%s: the only label is %s, so there are no classes", place, *(set(labels) - {None}))
        return labels
    beside = [name for name in names if os.sep not in name]
    if config.label_column != "label" or len(beside) == len(names):
        return [None] * len(names)
    if beside:
        inside, count, first = len(names) - len(beside), len(beside), beside[0]
        message = "%s: %d images lie in sub-folders and %d beside them, the first of which is %s: there are no classes"
        logger.warning(message, place, inside, count, first)
        return [None] * len(names)
    return [name.split(os.sep)[0] for name in names]


def _stated_labels(place: Path, config: DataConfig) -> dict[str, Any]:
    file = place / "dataset.json"
    if file.is_file() and config.label_column == "label":
        content = json.loads(file.read_text())
        try:
            stated = dict((content.get("labels") if isinstance(content, dict) else None) or [])
        except (TypeError, ValueError):
            raise DataError(f"{file}: labels must be a list of [file name, label].") from None
        if any(type(label) not in (int, str) for label in stated.values()):
            raise DataError(f"{file}: labels must be numbers or names; data.label_column='' reads without labels.")
        return stated
    readers = (pyarrow.csv.read_csv, pyarrow.json.read_json, pyarrow.parquet.read_table)
    for name, read in zip(LABEL_FILES[1:], readers, strict=True):
        file = place / name
        if file.is_file():
            table = read(file)
            if all(table.column_names.count(column) == 1 for column in ("file_name", config.label_column)):
                files, labels = (table[column].to_pylist() for column in ("file_name", config.label_column))
                if any(type(label) not in (int, float, str, type(None)) for label in labels):
                    raise DataError(f"{file}: labels must be numbers or names; data.label_column='' reads without.")
                return dict(zip((os.path.normpath(str(name)) for name in files), labels, strict=True))
            logger.warning("%s is not used: it lacks one column file_name and one %s", file, config.label_column)
    return {}
