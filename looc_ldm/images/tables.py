"""Open tables of images, which `datasets` reads from parquet files, WebDataset shards and the hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute

from looc_ldm.images.config import DataConfig
from looc_ldm.images.source import Source, Stored
from looc_ldm.utils.errors import DataError

logger = logging.getLogger(__name__)


def open_tables(
    splits: dict[str, datasets.Dataset],
    config: DataConfig,
    wanted: Collection[str] | None = None,
) -> dict[str, Source]:
    """Return the splits of a data set. If labels are text, every split has the classes of all splits together.

    Args:
        splits: Their rows.
        wanted: Names of the splits that need labels; all if not given. Others are not refused for theirs.

    Raises:
        DataError: No such column of images, or a label that is none of the classes.
    """
    columns = {split: find_columns(rows.features, config) for split, rows in splits.items()}
    text = [split for split in splits if is_text(columns[split].feature)]
    named = sorted(set().union(*(columns[split].names(splits[split]) for split in text)))
    sources: dict[str, Source] = {}
    for split, rows in splits.items():
        classes = []
        if wanted is None or split in wanted:
            classes = named if split in text else class_names(columns[split].feature, config)
        sources[split] = TableSource(rows, columns[split], classes, f"{config.path} ({split})")
    return sources


class TableSource(Source):
    """Rows of a `datasets.Dataset`.

    Args:
        classes: Names of the classes; empty without.
        name: Name of the split in messages.

    Raises:
        DataError: A label that is none of the classes.
    """

    def __init__(self, rows: datasets.Dataset, columns: Columns, classes: list[str], name: str):
        self.name = name
        self.classes = classes
        self._labels = columns.labels(rows, classes, name)
        if self._labels is None:
            self.classes, self._labels = [], np.full(len(rows), -1)
        # Undecoded, so that an image that cannot be read can be named. As Arrow's tables, which are read without the
        # detours of rows as dictionaries.
        images = rows.select_columns([columns.image]).cast_column(columns.image, datasets.Image(decode=False))
        self._images = images.with_format("arrow")

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Stored:
        row = self._images[index]
        return stored_image(row.column(0)[0].as_py(), index, self.name, int(self._labels[index]))

    def labels(self) -> np.ndarray:
        return self._labels

    def sizes(self) -> np.ndarray | None:
        sizes = []
        for rows in self._images.iter(1000):  # as Arrow keeps the lengths apart, no image is read
            sizes.append(pa.compute.binary_length(pa.compute.struct_field(rows.column(0), "bytes")).to_numpy())
        sizes = np.concatenate([np.empty(0), *sizes])
        return None if np.isnan(sizes).any() else sizes.astype(np.int64)  # not of images that are only named


class Columns(NamedTuple):
    """The columns of a table that hold the image and the class.

    Attributes:
        image (`str`): Column of the image.
        label (`tuple[str, ...]`): Column of the class, and the field in it if it has fields; empty without classes.
        feature: The label's type in `datasets`; None without classes.
    """

    image: str
    label: tuple[str, ...]
    feature: Any

    def label_in(self, row: dict) -> Any:
        """Return the class as a row holds it, a number or a name."""
        for name in self.label:
            row = None if row is None else row[name]
        return row

    def labels(self, rows: datasets.Dataset, classes: list[str], name: str) -> np.ndarray | None:
        """Return all labels as indices of the classes, int64 `(len,)`, -1 if one is missing; None if there are none.

        Raises:
            DataError: A label that is none of the classes.
        """
        if not classes or not len(rows):
            return None
        values = self._values(rows)
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            known = {value: index for index, value in enumerate(classes)}
            unlabelled = values.null_count == len(values)
            labels = np.array([known.get(value, -1) for value in values.to_pylist()], np.int64)
        else:
            labels = values.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
            unlabelled = (labels == -1).all()
        if unlabelled:  # as the hub's test splits are
            return None
        wrong = np.flatnonzero((labels < -1) | (labels >= len(classes)))
        if len(wrong):
            raise DataError(label_error(f"image {wrong[0]} of {name}", values[int(wrong[0])].as_py(), classes))
        return labels

    def names(self, rows: datasets.Dataset) -> set[str]:
        """Return the class names that occur in the rows. Only for a label column of text."""
        return {value for value in self._values(rows).unique().to_pylist() if value is not None}

    def _values(self, rows: datasets.Dataset) -> pa.Array:
        values = rows.select_columns([self.label[0]]).with_format("arrow")[:].column(0).combine_chunks()
        return pa.compute.struct_field(values, list(self.label[1:])) if len(self.label) > 1 else values


def label_error(image: str, label: Any, classes: list[str]) -> str:
    """Return the message for a label that is none of the classes."""
    return f"{image} has the label {label!r}: the {len(classes)} classes are {classes[0]!r} to {classes[-1]!r}."


def stored_image(image: dict | None, index: int, place: str, label: int) -> Stored:
    """Return the image in row `index` of the table `place`."""
    image = image or {"bytes": None, "path": None}
    content = image["path"] if image["bytes"] is None else image["bytes"]
    return Stored(content, image["path"] or f"image {index} of {place}", label)


def find_columns(features: datasets.Features, config: DataConfig) -> Columns:
    """Return the columns that the config names.

    WebDataset's columns are named by the suffixes of its files: if the config names none of them, they are the only
    image, and `cls` or a field of `json`.

    Raises:
        DataError: No such column of images.
    """
    image, label = config.image_column, (config.label_column,)
    if "__key__" in features:  # WebDataset
        typed = [name for name in features if name == "image" or isinstance(features[name], datasets.Image)]
        if image not in features and len(typed) == 1:
            image = typed[0]
        fields = features.get("json")
        if label[0] not in features:
            label = ("json", label[0]) if isinstance(fields, dict) and label[0] in fields else ("cls",)
    if image not in features:
        raise DataError(f"data.image_column={image!r}: {config.path} has the columns {', '.join(features)}.")
    if isinstance(features[image], list | datasets.List | datasets.LargeList):
        raise DataError(f"data.image_column={image!r}: it holds lists in {config.path}, not one image per row.")
    feature: Any = features
    for name in label:
        feature = feature.get(name) if isinstance(feature, dict) else None
    return Columns(image, label if feature is not None else (), feature)


def is_text(feature: Any) -> bool:
    """Whether a label is the name of a class."""
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def class_names(feature: Any, config: DataConfig) -> list[str]:
    """Return the names of the classes of a label that is a number; none, with a warning, if nothing names them."""
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    is_number = isinstance(feature, datasets.Value) and re.match("u?int", feature.dtype)
    if is_number and config.num_classes is not None:
        return [str(index) for index in range(config.num_classes)]
    if feature is not None:
        logger.warning(
            "%s: the labels have no names, so there are no classes; data.num_classes makes numbers classes.",
            config.path,
        )
    return []
