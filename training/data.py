"""Images from folders, parquet files or the hub, as an endless stream that any process can enter anywhere.

Training order and augmentation are functions of (seed, position in the stream) alone. A run that resumes at position p,
or that is divided over another number of processes, sees the same images with the same flips.
"""

from __future__ import annotations

import glob
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

import looc_ldm
from looc_ldm.errors import ConfigError, DataError
from looc_ldm.images import to_float
from looc_ldm.training.config import DataConfig

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
MODES = {1: "L", 3: "RGB"}
BUNDLED = Path(looc_ldm.__file__).resolve().parent / "data"  # one folder of parquet files a data set

# Streams of random numbers of one seed must not overlap: each use has its own number.
ORDER, FLIP, NOISE = range(3)


def random_at(seed: int, use: int, position: int) -> np.random.Generator:
    """The random numbers that belong to one position of the stream, for one use of them."""
    return np.random.Generator(np.random.Philox(key=[(seed << 8) + use, position]))


class ImageSet(Dataset):
    """The images of one split, brought to one size.

    Item i is `(image, label)`: a uint8 tensor `(channels, resolution, resolution)` and an int, -1 without classes.

    Attributes:
        classes (`list[str]`): Names of the classes; empty where the data has none.
        content_size (`tuple[int, int]`, *optional*): Height and width of the images inside their padding, where `fit`
            is `pad`; metrics are measured there.
    """

    def __init__(self, rows: datasets.Dataset, config: DataConfig, channels: int):
        self.config = config
        if channels not in MODES:
            raise ConfigError(f"images have 1 (grey) or 3 channels, the model asks for {channels}.")
        self.mode = MODES[channels]
        feature = rows.features.get(config.label_column)
        self.classes = list(feature.names) if isinstance(feature, datasets.ClassLabel) else []
        # Undecoded, so that an image that cannot be read can be named.
        self.rows = rows.cast_column(config.image_column, datasets.Image(decode=False))
        self.content_size = None
        if config.fit == "pad" and len(rows):
            width, height = self._open(self.rows[0], 0).size
            self.content_size = (height, width)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = self.rows[int(index)]  # older versions of datasets know no NumPy integers
        image = self._square(self._open(row, index), index)
        pixels = np.asarray(image).reshape(*image.size, -1)  # (side, side, channels)
        label = row[self.config.label_column] if self.classes else -1
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1), label

    def labels(self) -> np.ndarray:
        """All labels, int64 `(len,)`; -1 without classes."""
        if not self.classes:
            return np.full(len(self), -1)
        return np.asarray(self.rows.with_format(None)[self.config.label_column])

    def pixels(self) -> Sequence[torch.Tensor]:
        """The images alone, without labels, read when they are asked for."""
        return _Pixels(self)

    def _open(self, row: dict, index: int) -> Image.Image:
        stored = row[self.config.image_column]
        if stored is None:
            raise DataError(f"image {index} of {self.config.path} is missing.")
        name = stored["path"] or f"image {index} of {self.config.path}"
        try:
            with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]) as image:
                if image.mode.startswith("I;16"):  # which convert() would clip at 255
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return ImageOps.exif_transpose(image).convert(self.mode)
        except (OSError, SyntaxError, UnidentifiedImageError) as error:
            raise DataError(f"cannot read {name}: {' '.join(str(error).split())}") from None

    def _square(self, image: Image.Image, index: int) -> Image.Image:
        side = self.config.resolution
        if self.config.fit == "crop":
            return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
        size = f"image {index} of {self.config.path} is {image.width}x{image.height}"
        if max(image.size) > side:
            raise DataError(f"{size}: fit=pad needs images of at most {side}x{side} (the resolution).")
        if image.size[::-1] != self.content_size:
            height, width = self.content_size
            raise DataError(f"{size}: fit=pad needs images of one size, and the first is {width}x{height}.")
        canvas = Image.new(self.mode, (side, side))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return canvas


class _Pixels(Sequence):
    def __init__(self, images: ImageSet):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index][0]


def load_image_set(config: DataConfig, channels: int) -> ImageSet:
    """The images of `config.split`, or where that is empty, of the test, validation or only split there is.

    Raises:
        DataError: No such data, a folder without images, an unknown split or column.
    """
    splits = _load(config)
    if not config.split:
        held_out = [name for name in ("test", "validation") if name in splits]
        config = replace(config, split=[*held_out, *splits][0])
    _check_names(config, splits)
    return ImageSet(splits[config.split], config, channels)


def load_image_sets(config: DataConfig, channels: int) -> tuple[ImageSet, ImageSet]:
    """The training and the validation images that a config describes.

    Raises:
        DataError: No such data, a folder without images, an unknown split or column.
    """
    splits = _load(config)
    _check_names(config, splits)
    rows = splits[config.split]
    if config.validation_split is not None:
        held_out = splits[config.validation_split]
        held_out = held_out.select(spread(len(held_out), config.validation_images))
    else:
        if config.validation_images >= len(rows):
            raise DataError(
                f"{config.path} has {len(rows)} images: data.validation_images={config.validation_images} leaves none "
                f"to train on; at most {len(rows) - 1} can be held out."
            )
        chosen = spread(len(rows), config.validation_images)
        held_out = rows.select(chosen)
        rows = rows.select(np.setdiff1d(np.arange(len(rows)), chosen))
    return ImageSet(rows, config, channels), ImageSet(held_out, config, channels)


def spread(length: int, count: int) -> np.ndarray:
    """Up to `count` of `length` positions at even distances: of a set sorted by class, as many of each."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))


def _load(config: DataConfig) -> dict[str, datasets.Dataset]:
    try:
        return _load_unchecked(config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot load data.path={config.path!r}: {_first_line(error)}") from error


def _load_unchecked(config: DataConfig) -> dict[str, datasets.Dataset]:
    folder = BUNDLED / config.path if (BUNDLED / config.path).is_dir() else Path(config.path)
    if folder.is_dir():
        parquet = sorted(folder.glob("*.parquet"))
        if parquet:
            files: dict[str, list[str]] = {}
            for file in parquet:  # "train.parquet", or the hub's "train-00000-of-00002.parquet"
                files.setdefault(file.stem.split("-")[0], []).append(str(file))
            return datasets.load_dataset("parquet", data_files=files)
        if not any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.rglob("*")):
            raise DataError(f"no images in the folder {folder} (looked for {', '.join(IMAGE_SUFFIXES)}).")
        # Named here: left to itself, the loader also takes words in file names ("ILSVRC2012_val_00000293") for splits.
        places = [entry for entry in folder.iterdir() if entry.is_dir() and entry.name.lower() in SPLIT_FOLDERS]
        splits = {SPLIT_FOLDERS[place.name.lower()]: place for place in places} or {"train": folder}
        files = {split: f"{glob.escape(str(place.resolve()))}/**" for split, place in splits.items()}
        return datasets.load_dataset("imagefolder", data_files=files)
    bundled = ", ".join(sorted(entry.name for entry in BUNDLED.iterdir()))
    if folder.exists() or folder.is_absolute() or config.path.count("/") != 1:
        raise DataError(
            f"data.path={config.path!r} is neither bundled ({bundled}), a folder, nor a hub id (user/name)."
        )
    return datasets.load_dataset(config.path)


def _check_names(config: DataConfig, splits: dict[str, datasets.Dataset]) -> None:
    for setting in ("split", "validation_split"):
        name = getattr(config, setting)
        if name is not None and name not in splits:
            raise DataError(f"data.{setting}={name!r}: {config.path} has the splits {', '.join(splits)}.")
    columns = splits[config.split].column_names
    if config.image_column not in columns:
        raise DataError(f"data.image_column={config.image_column!r}: {config.path} has {', '.join(columns)}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


class Stream(Dataset):
    """An endless, shuffled repetition of a data set, indexed by position.

    Position p belongs to epoch p // n, whose order depends on the seed and the epoch only.
    """

    def __init__(self, length: int, seed: int):
        self.length = length
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def index_at(self, position: int) -> int:
        """The item of the data set that stands at a position of the stream."""
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            self._order = random_at(self.seed, ORDER, epoch).permutation(self.length)
            self._epoch = epoch
        return int(self._order[place])


class ImageStream(Stream):
    """Training images: item p is `(image, label)` with the image a float tensor `(C, H, W)` in [-1, 1]."""

    def __init__(self, images: ImageSet, seed: int):
        super().__init__(len(images), seed)
        self.images = images

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        image, label = self.images[self.index_at(position)]
        if self.images.config.flip and random_at(self.seed, FLIP, position).random() < 0.5:
            image = image.flip(-1)
        return to_float(image), label


class StreamBatches:
    """Positions of the batches of one process: a batch sampler that can start at any image.

    Every `batch_size` positions make an optimizer step. They are dealt out in runs of one forward pass, first over the
    processes, then over the accumulation steps.
    """

    def __init__(self, start: int, total: int, batch_size: int, accumulation: int, rank: int, world_size: int):
        if batch_size % (accumulation * world_size):
            raise ConfigError(
                f"batch_size={batch_size} must be a multiple of gradient_accumulation_steps={accumulation} "
                f"times the number of processes, {world_size}."
            )
        self.start, self.total, self.batch_size = start, total, batch_size
        self.per_forward = batch_size // (accumulation * world_size)
        self.offset, self.stride = rank * self.per_forward, world_size * self.per_forward

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.total, self.batch_size):
            for first in range(step + self.offset, step + self.batch_size, self.stride):
                yield list(range(first, first + self.per_forward))

    def __len__(self) -> int:
        return -(-(self.total - self.start) // self.batch_size) * (self.batch_size // self.stride)


def stream_loader(stream: Stream, batches: StreamBatches, num_workers: int, pin_memory: bool) -> DataLoader:
    """A loader over the batches of this process. It is not to be prepared by Accelerate: it is divided already."""
    return DataLoader(
        stream,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Its own: a loader that is made draws a number, which would part a resumed run from an uninterrupted one.
        generator=torch.Generator(),
    )
