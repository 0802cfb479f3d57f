"""Stream data sets in shards (parquet files, WebDataset's tars, the hub) without a copy on the disk.

`looc_ldm.images.lanes` decides which images a process reads, and how it goes on after an interruption. Each worker
holds up to two blocks of `data.shuffle_images` encoded images: the one that is given and the one that is read ahead. A
run that is resumed reads, without decoding, the head of one shard for each worker (1 to 2 seconds for 10,000 JPEGs of
256 pixels on a local disk).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from looc_ldm.images.config import DataConfig
from looc_ldm.images.image_set import ImageReader, ImageSet, Report
from looc_ldm.images.lanes import Cursor, Lane, starting_cursors
from looc_ldm.images.open import check_on_hub, folder_of, split_name
from looc_ldm.images.shards import find_shards, has_images
from looc_ldm.images.source import Source, Stored
from looc_ldm.images.tables import (
    class_names,
    find_columns,
    label_error,
    stored_image,
)
from looc_ldm.utils.errors import ConfigError, DataError, one_line

logger = logging.getLogger(__name__)


class StreamedSet(ImageReader):
    """Shards of one split, on the disk or on the hub. Their images are not counted: there is no length.

    Args:
        rows (`datasets.IterableDataset`): The split.
        shard_names (`list[str]`): Names of its shards, for messages.
        config, channels: See `ImageReader`.

    Attributes:
        classes (`list[str]`): Names of the classes; empty if the data has none.
        num_shards (`int`): Number of shards, which can be read at the same time.

    Raises:
        DataError: No such column of images.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        shard_names: list[str],
        config: DataConfig,
        channels: int,
    ):
        super().__init__(config, channels)
        self.num_shards = rows.num_shards
        self.shard_names = shard_names
        self.columns = find_columns(rows.features or {}, config)
        self.classes = class_names(self.columns.feature, config)
        image = self.columns.image
        used = rows.select_columns([image, *(self.columns.label[:1] if self.classes else ())])
        # Undecoded: images of a shard's head that are only passed over cost nothing, and a broken one can be named.
        self.rows = used.cast_column(image, datasets.Image(decode=False))

    def read(self, shard: int, start: int = 0) -> Iterator[Stored]:
        """Yield the images of a shard, from number `start` on.

        Raises:
            DataError: The shard cannot be read, or a label is not one of the classes.
        """
        name = self.shard_names[shard]
        has_images(Path(name))  # raises an error if it is cut off
        # iter(1): a plain loop would divide the shard among the loader's workers once more, and larger batches of tars
        # fail in datasets 4.0.
        rows = enumerate(self.rows.shard(self.num_shards, shard).iter(batch_size=1))
        while True:
            try:
                index, row = next(rows, (None, None))
            except Exception as error:  # errors of files, archives, parquet and the network have no common base
                raise DataError(f"cannot read {name}: {one_line(error)}") from error
            if row is None:
                return
            if index >= start:
                yield self._stored({column: values[0] for column, values in row.items()}, shard, index)

    def _stored(self, row: dict, shard: int, index: int) -> Stored:
        label = self.columns.label_in(row) if self.classes else None
        label = -1 if label is None else label
        stored = stored_image(row[self.columns.image], index, self.shard_names[shard], label)
        if self.shard_names[shard] not in stored.name:
            stored = stored._replace(name=f"{stored.name} of {self.shard_names[shard]}")
        if self.classes and not -1 <= label < len(self.classes):
            raise DataError(label_error(stored.name, label, self.classes))
        return stored


class InMemory(Source):
    """Encoded images that are held in memory."""

    def __init__(self, images: list[Stored], classes: list[str]):
        self.images, self.classes = images, classes

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Stored:
        return self.images[index]

    def labels(self) -> np.ndarray:
        return np.array([image.label for image in self.images], np.int64)


def open_streamed(config: DataConfig, channels: int) -> tuple[StreamedSet, ImageSet]:
    """Open the training images, streamed, and the first `validation_images` of the validation split, held in memory.

    The validation images are not spread over the split: if it is sorted by class, they are of few classes.

    Raises:
        ConfigError: No validation split is named.
        DataError: There is no such data, split or column, or it is neither on the hub nor in shards.
    """
    if config.validation_split is None:
        raise ConfigError(
            "data.streaming needs data.validation_split: images cannot be held out of what is not counted."
        )
    folder = folder_of(config)
    try:
        if folder is None:
            check_on_hub(config)
            builder = datasets.load_dataset_builder(config.path, config.name, revision=config.revision)
        else:
            shards = find_shards(folder, config)
            if shards is None:
                raise DataError(
                    f"data.streaming=true: {folder} holds neither parquet files nor WebDataset shards (.tar); "
                    "other data is read as it lies without streaming."
                )
            builder = shards.builder()
        splits = builder.as_streaming_dataset()
    except DataError:
        raise
    except Exception as error:  # errors of files, archives, parquet and the network have no common base
        raise DataError(f"cannot load data.path={config.path!r}: {one_line(error)}") from error
    sets = {}
    for setting in ("split", "validation_split"):
        split = split_name(splits, setting, config)
        sets[setting] = StreamedSet(
            splits[split], _shard_names(builder, splits[split], split, config), config, channels
        )
    train, held_out = sets.values()
    every = chain.from_iterable(held_out.read(shard) for shard in range(held_out.num_shards))
    source = InMemory(list(islice(every, config.validation_images)), held_out.classes)
    validation = ImageSet(source, config, channels, skip_unreadable=True)
    train.content_size = validation.content_size
    return train, validation


def _shard_names(builder, rows: datasets.IterableDataset, split: str, config: DataConfig) -> list[str]:
    files = list((builder.config.data_files or {}).get(split, []))
    if len(files) == rows.num_shards:
        return [str(file) for file in files]
    return [f"shard {shard} of {config.path} ({split})" for shard in range(rows.num_shards)]


class StreamedImages(Dataset):
    """Training images of a `StreamedSet`: item p is `(image, label, report)`, the image a uint8 tensor `(C, H, W)`,
    the report with the cursor of the image after it.

    It is read a batch at a time (`__getitems__`), each lane in the order of its positions. Which images come depends on
    the seed, the number of lanes and the cursors; flips and crops on the seed and the position.

    Args:
        images (`StreamedSet`): The shards.
        per_forward (`int`): Images of one forward pass of one process.
        num_workers (`int`): Workers of the loader that reads the stream.
        cursors (`dict[int, Cursor]`): Cursor of each lane from a checkpoint; see `starting_cursors`.

    Attributes:
        cursors (`dict[int, Cursor]`): Start of every lane of this run, also of the lanes of other processes.
    """

    def __init__(
        self,
        images: StreamedSet,
        seed: int,
        per_forward: int,
        processes: int,
        num_workers: int,
        cursors: dict[int, Cursor],
    ):
        self.images = images
        self.seed = seed
        self.per_forward = per_forward
        self.num_lanes = processes * max(num_workers, 1)
        self.read_ahead = num_workers > 0
        self.cursors = starting_cursors(cursors, self.num_lanes)
        self._lanes: dict[int, Lane] = {}  # opened by the process that reads

    def __getitems__(self, positions: list[int]) -> list[tuple[torch.Tensor, int, Report]]:
        """Return the items of one forward pass; called by a loader's worker."""
        number = positions[0] // self.per_forward % self.num_lanes
        if number not in self._lanes:
            self._lanes[number] = Lane(self.images, self.seed, self.num_lanes, self.cursors[number], self.read_ahead)
        return [self._item(self._lanes[number], position) for position in positions]

    def _item(self, lane: Lane, position: int) -> tuple[torch.Tensor, int, Report]:
        read = partial(self.images.to_item, at=(self.seed, position))
        item, problems = self.images.first_readable(lane, read)
        return *item, Report(problems, lane.cursor)
