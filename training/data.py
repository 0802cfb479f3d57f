"""Images from folders, parquet files or the hub, as an endless stream that any process can enter anywhere.

Training order and augmentation are functions of (seed, position in the stream) alone. A run that resumes at position p,
or that is divided over another number of processes, sees the same images with the same flips.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from looc_ldm.errors import ConfigError, DataError, UnreadableImage
from looc_ldm.images import to_float
from looc_ldm.training.config import DataConfig
from looc_ldm.training.sources import Source, Stored, names_of_split, open_sources
from looc_ldm.training.stopping import leave_signals_to_the_trainer
from looc_ldm.training.transforms import CENTRE, decode, mode_of, to_pixels, to_square

logger = logging.getLogger(__name__)

SUBSTITUTES = 1000  # images in a row that may be unreadable; the share of the whole run is the run's affair

# Streams of random numbers of one seed must not overlap: each use has its own number.
ORDER, FLIP, NOISE, CROP, SUBSTITUTE, SHARDS, BLOCKS = range(7)


def random_at(seed: int, use: int, position: int) -> np.random.Generator:
    """The random numbers that belong to one position of the stream, for one use of them."""
    return np.random.Generator(np.random.Philox(key=[(seed << 8) + use, position]))


@dataclass
class Report:
    """What a loader's worker has to say besides its tensors.

    Attributes:
        unreadable (`list[str]`): Names of images that could not be read; others took their places.
        cursor (`tuple[int, ...]`, *optional*): Where the lane of a streamed data set goes on after this batch.
    """

    unreadable: list[str] = field(default_factory=list)
    cursor: tuple[int, ...] | None = None


class ImageSet(Dataset):
    """The images of one split, brought to one size.

    Item i is `(image, label)`: a uint8 tensor `(channels, resolution, resolution)` and an int, -1 without classes.
    `fit="random_crop"` is a centre crop here.

    Args:
        source (`Source`): The images, encoded.
        config (`DataConfig`): Their settings.
        channels (`int`): 1 (grey) or 3.
        skip_unreadable (`bool`, default False): Give, as an item that cannot be read, the next one that can, and log
            its name. Otherwise reading it raises `UnreadableImage`.

    Attributes:
        classes (`list[str]`): Names of the classes; empty where the data has none.
        content_size (`tuple[int, int]`, *optional*): Height and width of the images inside their padding, where `fit`
            is `pad`; metrics are measured there.
    """

    def __init__(self, source: Source, config: DataConfig, channels: int, skip_unreadable: bool = False):
        self.source = source
        self.config = config
        self.mode = mode_of(channels)
        self.skip_unreadable = skip_unreadable
        self._warned_of: set[str] = set()
        self.classes = source.classes
        self.content_size: tuple[int, int] | None = None
        if config.fit == "pad" and len(source):
            width, height = self._readable(self.open, 0)[0].size
            self.content_size = (height, width)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._readable(self.read, range(len(self))[int(index)])  # IndexError ends a loop over the images

    def read(self, index: int) -> tuple[torch.Tensor, int]:
        """Item `index` itself.

        Raises:
            UnreadableImage: It cannot be read.
            DataError: `fit` is `pad`, and its size is not that of the others.
        """
        image, stored = self.open(index)
        return bring_to_size(image, self, stored.name), stored.label

    def open(self, index: int) -> tuple[Image.Image, Stored]:
        """Image `index` at its own size, and how it is stored. Raises UnreadableImage."""
        stored = self.source.read(index)
        return decode(stored.content, self.mode, stored.name), stored

    def labels(self) -> np.ndarray:
        """All labels, int64 `(len,)`; -1 without classes."""
        return self.source.labels()

    def pixels(self) -> Sequence[torch.Tensor]:
        """The images alone, without labels, read when they are asked for."""
        return _Pixels(self)

    def _readable(self, read: Callable, index: int):
        if not self.skip_unreadable:
            return read(index)
        last = None
        for offset in range(min(SUBSTITUTES, len(self))):
            try:
                return read((index + offset) % len(self))
            except UnreadableImage as error:
                if error.name not in self._warned_of:
                    self._warned_of.add(error.name)
                    logger.warning("%s; the next image takes its place", error)
                last = error
        raise too_many_unreadable(self.config, min(SUBSTITUTES, len(self)), last)


def bring_to_size(image: Image.Image, images, name: str, place: tuple[float, float] = CENTRE) -> torch.Tensor:
    """The uint8 tensor `(C, resolution, resolution)` that an image of a set becomes.

    Args:
        image: At its own size.
        images (`ImageSet` or `StreamedSet`): The set, for its `config` and `content_size`.
        name: What the image is called in errors.
        place: Where it is cropped; see `to_square`.

    Raises:
        DataError: `fit` is `pad`, and its size is not that of the others.
    """
    if images.content_size not in (None, image.size[::-1]):
        height, width = images.content_size
        raise DataError(
            f"{name} is {image.width}x{image.height}: fit=pad needs images of one size, and the first is "
            f"{width}x{height}."
        )
    return to_pixels(to_square(image, images.config.fit, images.config.resolution, name, place))


def augment(image: Image.Image, images, seed: int, position: int, name: str) -> torch.Tensor:
    """`bring_to_size` for training: cropped at the place, and mirrored if, the position in the stream says so."""
    place = CENTRE
    if images.config.fit == "random_crop":
        across, down = random_at(seed, CROP, position).random(2)
        place = (across, down)
    pixels = bring_to_size(image, images, name, place)
    mirrored = images.config.flip and random_at(seed, FLIP, position).random() < 0.5
    return pixels.flip(-1) if mirrored else pixels


def too_many_unreadable(config: DataConfig, count: int, last: UnreadableImage) -> DataError:
    """The error for so many unreadable images one after the other, with what is wrong with the last of them."""
    return DataError(f"{count} images of {config.path} in a row cannot be read. The last: {last}")


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
    splits = open_sources(config, names_of_split(config.split) or None)
    if not config.split:
        held_out = [name for name in ("test", "validation") if name in splits]
        config = replace(config, split=[*held_out, *splits][0])
    return ImageSet(_split(splits, "split", config), config, channels)


def load_image_sets(config: DataConfig, channels: int):
    """The training images (`ImageSet`, or where they are streamed, `streaming.StreamedSet`) and the validation images.

    An image of either that cannot be read is replaced by the next one.

    Raises:
        DataError: No such data, a folder without images, an unknown split or column.
    """
    if config.streaming:
        from looc_ldm.training.streaming import open_streamed

        return open_streamed(config, channels)
    splits = open_sources(config, [*names_of_split(config.split), *names_of_split(config.validation_split)])
    images = _split(splits, "split", config)
    if config.validation_split is not None:
        held_out = _split(splits, "validation_split", config)
        held_out = held_out.select(spread(len(held_out), config.validation_images))
    else:
        if config.validation_images >= len(images):
            raise DataError(
                f"{config.path} has {len(images)} images: data.validation_images={config.validation_images} leaves "
                f"none to train on; at most {len(images) - 1} can be held out."
            )
        chosen = spread(len(images), config.validation_images)
        held_out = images.select(chosen)
        images = images.select(np.setdiff1d(np.arange(len(images)), chosen))
    return ImageSet(images, config, channels, True), ImageSet(held_out, config, channels, True)


def split_name(splits: Iterable[str], setting: str, config: DataConfig) -> str:
    """The split that `data.split` or `data.validation_split` names.

    Raises:
        DataError: There is none.
    """
    name = getattr(config, setting)
    for called in names_of_split(name):
        if called in splits:
            return called
    raise DataError(f"data.{setting}={name!r}: {config.path} has the splits {', '.join(splits)}.")


def _split(splits: dict[str, Source], setting: str, config: DataConfig) -> Source:
    name = split_name(splits, setting, config)
    return splits[name]


def spread(length: int, count: int) -> np.ndarray:
    """Up to `count` of `length` positions at even distances: of a set sorted by class, as many of each."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))


class Stream(Dataset):
    """An endless, shuffled repetition of a data set, indexed by position.

    Position p belongs to epoch p // n, whose order depends on the seed and the epoch only.
    """

    def __init__(self, length: int, seed: int):
        self.length = length
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __getitems__(self, positions: list[int]) -> list[tuple]:
        """The items of one batch; what a loader's worker calls."""
        return [self[position] for position in positions]

    def index_at(self, position: int) -> int:
        """The item of the data set that stands at a position of the stream."""
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            self._order = random_at(self.seed, ORDER, epoch).permutation(self.length)
            self._epoch = epoch
        return int(self._order[place])


class ImageStream(Stream):
    """Training images: item p is `(image, label, report)` with the image a uint8 tensor `(C, H, W)`.

    Loops turn it into numbers in [-1, 1] (`looc_ldm.images.to_float`) on their device: what workers send is small.

    An image that cannot be read is replaced by one that is drawn for that position, and reported.
    """

    def __init__(self, images: ImageSet, seed: int):
        super().__init__(len(images), seed)
        self.images = images

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int, Report]:
        unreadable: list[str] = []
        index = self.index_at(position)
        last = None
        instead = None  # random numbers, made where they are needed
        while len(unreadable) < SUBSTITUTES:
            try:
                image, stored = self.images.open(index)
            except UnreadableImage as error:
                unreadable.append(error.name)
                last = error
                instead = instead or random_at(self.seed, SUBSTITUTE, position)
                index = int(instead.integers(self.length))
                continue
            pixels = augment(image, self.images, self.seed, position, stored.name)
            return pixels, stored.label, Report(unreadable)
        raise too_many_unreadable(self.images.config, SUBSTITUTES, last)


def make_stream(
    images, seed: int, batches: StreamBatches, num_workers: int, cursors: dict[int, tuple[int, ...]] | None = None
) -> Stream:
    """The stream of training images of a map-style or a streamed set.

    Args:
        images (`ImageSet` or `StreamedSet`): The training images.
        seed: Of order, flips and crops.
        batches: The batches of this process.
        num_workers: Of the loader that will read the stream.
        cursors: Streamed sets only: lane -> where it goes on, from the newest checkpoint. Replaced, in place, by the
            cursors of all lanes of this run, so that the next checkpoint's are complete.
    """
    if isinstance(images, ImageSet):
        return ImageStream(images, seed)
    from looc_ldm.training.streaming import StreamedImages

    stream = StreamedImages(images, seed, batches, num_workers, cursors or {})
    if cursors is not None:
        cursors.clear()
        cursors.update(stream.cursors)
    return stream


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
    """A loader over the batches of this process. It is not to be prepared by Accelerate: it is divided already.

    Items of the stream are tuples that end with a `Report`, and so are the batches: stacked tensors and one report.
    """
    return DataLoader(
        stream,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        # Its own: a loader that is made draws a number, which would part a resumed run from an uninterrupted one.
        generator=torch.Generator(),
    )


def collate(items: list[tuple]) -> tuple:
    """Items `(*values, report)` as one batch: the values stacked, the reports joined, the last cursor kept."""
    *values, reports = zip(*items, strict=True)
    unreadable = [name for report in reports for name in report.unreadable]
    return *default_collate(list(zip(*values, strict=True))), Report(unreadable, reports[-1].cursor)


def float_batches(images: ImageSet | Subset, batch_size: int = 64, num_workers: int = 0) -> DataLoader:
    """Batches `(B, C, H, W)` in [-1, 1], in order, not augmented."""
    return DataLoader(
        images,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_float_pixels,
        worker_init_fn=leave_signals_to_the_trainer,  # which may be measuring
        generator=torch.Generator(),  # its own, as in `stream_loader`
    )


def _float_pixels(rows: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    return to_float(torch.stack([pixels for pixels, _ in rows]))
