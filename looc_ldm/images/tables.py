"""Tables of images, as `datasets` reads them from parquet files, WebDataset shards and the hub, as sources."""

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
    images: tuple[str, ...] = (),
) -> dict[str, Source]:
    """The splits of a data set. The classes of labels that are text are those of all splits together.

    Args:
        splits: Their rows.
        config: Settings of the data.
        wanted: Names of the splits that need labels; all if not given. Others are not refused for theirs.
        images: Columns of which each row has its image in one; the config says if empty.

    Raises:
        DataError: No such column of images, or a label that is none of the classes.
    """
    columns = {split: find_columns(rows.features, config, images) for split, rows in splits.items()}
    text = [split for split in splits if is_text(columns[split].feature)]
    named = sorted(set().union(*(columns[split].names(splits[split]) for split in text)))
    classes: dict[str, list[str]] = {}  # by the feature: that there are none is logged once, not for every split
    for column in columns.values():
        key = repr(column.feature)
        if key not in classes:
            classes[key] = named if is_text(column.feature) else class_names(column.feature, config)
    sources: dict[str, Source] = {}
    for split, rows in splits.items():
        own = classes[repr(columns[split].feature)] if wanted is None or split in wanted else []
        sources[split] = TableSource(rows, columns[split], own, f"{config.path} ({split})")
    return sources


class TableSource(Source):
    """Rows of a `datasets.Dataset`.

    Args:
        rows: The rows.
        columns: Where the image and the class are in a row.
        classes: Names of the classes; empty without.
        name: What the split is called in messages.

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
        used = [image for image in columns.images if rows.data.column(image).null_count < len(rows)]
        images = rows.select_columns(used or list(columns.images[:1]))
        for image in images.column_names:
            images = images.cast_column(image, datasets.Image(decode=False))
        self._images = images.with_format("arrow")

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Stored:
        row = self._images[index]
        return stored_image([column[0].as_py() for column in row.columns], index, self.name, int(self._labels[index]))

    def labels(self) -> np.ndarray:
        return self._labels

    def sizes(self) -> np.ndarray | None:
        sizes = []
        for rows in self._images.iter(1000):  # as Arrow keeps the lengths apart, no image is read
            lengths = [pa.compute.binary_length(pa.compute.struct_field(column, "bytes")) for column in rows.columns]
            sizes.append(pa.compute.coalesce(*lengths).to_numpy())
        sizes = np.concatenate([np.empty(0), *sizes])
        return None if np.isnan(sizes).any() else sizes.astype(np.int64)  # not of images that are only named


class Columns(NamedTuple):
    """Where the image and the class are in a row of a table.

    Attributes:
        images (`tuple[str, ...]`): Columns of which each row has its image in one.
        label (`tuple[str, ...]`): Column of the class, and where that holds fields, the field; empty without classes.
        feature: What `datasets` knows of the label; None without classes.
    """

    images: tuple[str, ...]
    label: tuple[str, ...]
    feature: Any

    def label_in(self, row: dict) -> Any:
        """The class as a row holds it, a number or a name."""
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
        """The classes that the rows name, where the label is text."""
        return {value for value in self._values(rows).unique().to_pylist() if value is not None}

    def _values(self, rows: datasets.Dataset) -> pa.Array:
        values = rows.select_columns([self.label[0]]).with_format("arrow")[:].column(0).combine_chunks()
        return pa.compute.struct_field(values, list(self.label[1:])) if len(self.label) > 1 else values


def label_error(image: str, label: Any, classes: list[str]) -> str:
    """What is wrong with a label that is none of the classes."""
    return f"{image} has the label {label!r}: the {len(classes)} classes are {classes[0]!r} to {classes[-1]!r}."


def stored_image(images: list[dict | None], index: int, place: str, label: int) -> Stored:
    """Return the image of a row of the table `place`, from the columns that may hold it."""
    image = next(filter(None, images), {"bytes": None, "path": None})
    content = image["path"] if image["bytes"] is None else image["bytes"]
    return Stored(content, image["path"] or f"image {index} of {place}", label)


def find_columns(features: datasets.Features, config: DataConfig, images: tuple[str, ...] = ()) -> Columns:
    """Where a table has its images and classes: in the columns that the config names.

    WebDataset's files are columns named by their suffixes; there, the only image and `cls`, or a field of `json`, are
    found by themselves.

    Raises:
        DataError: No such column of images.
    """
    image, label = config.image_column, (config.label_column,)
    if "__key__" in features:  # WebDataset
        typed = tuple(name for name, feature in features.items() if isinstance(feature, datasets.Image))
        if not images and len(typed) == 1:
            images = typed
        fields = features.get("json")
        if label[0] not in features:
            label = ("json", label[0]) if isinstance(fields, dict) and label[0] in fields else ("cls",)
    if image in features:
        images = (image,)
    if not images:
        raise DataError(f"data.image_column={image!r}: {config.path} has {', '.join(features)}.")
    if isinstance(features[images[0]], list | datasets.List | datasets.LargeList):
        raise DataError(f"data.image_column={image!r}: {config.path} has a list there, not one image per row.")
    feature: Any = features
    for name in label:
        feature = feature.get(name) if isinstance(feature, dict) else None
    return Columns(images, label if feature is not None else (), feature)


def is_text(feature: Any) -> bool:
    """Whether a label is the name of a class."""
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def class_names(feature: Any, config: DataConfig) -> list[str]:
    """Names of the classes of a label that is a number; none where nothing names them, which is logged."""
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    is_number = isinstance(feature, datasets.Value) and re.match("u?int", feature.dtype)
    if is_number and config.num_classes is not None:
        return [str(index) for index in range(config.num_classes)]
    if is_number:
        logger.warning(
            "%s: the labels are numbers without names, so there are no classes; data.num_classes makes them classes.",
            config.path,
        )
    elif feature is not None:
        logger.warning("%s: the label column is neither numbers nor text, so there are no classes.", config.path)
    return []
