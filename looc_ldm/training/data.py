"""Endless streams of training images, which can start anywhere, and their loaders."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from looc_ldm.images.config import DataConfig
from looc_ldm.images.image_set import NOISE, ORDER, ImageSet, Report, random_at, spread
from looc_ldm.images.open import names_of_split, open_sources, split_name
from looc_ldm.images.pixels import to_float
from looc_ldm.images.streaming import StreamedImages, StreamedSet, open_streamed
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.loading import training_record
from looc_ldm.training.config import DiffusionConfig
from looc_ldm.training.stopping import start_worker
from looc_ldm.utils.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def load_image_sets(
    config: DataConfig, channels: int, needs_labels: bool = False
) -> tuple[ImageSet | StreamedSet, ImageSet]:
    """Return the training images and the validation images. An unreadable image is replaced by the next one.

    Args:
        channels: 1 (grey) or 3.
        needs_labels: Count images without a label as unreadable, if there are classes.

    Raises:
        DataError: No such data, a folder without images, an unknown split or column.
    """
    train, held_out = open_streamed(config, channels) if config.streaming else _open_image_sets(config, channels)
    train.needs_labels = needs_labels and bool(train.classes)
    return train, held_out


def _open_image_sets(config: DataConfig, channels: int) -> tuple[ImageSet, ImageSet]:
    splits = open_sources(config, [*names_of_split(config.split), *names_of_split(config.validation_split)])
    images = splits[split_name(splits, "split", config)]
    if config.validation_split is not None:
        every = splits[split_name(splits, "validation_split", config)]
        held_out = every.select(spread(len(every), config.validation_images))
    else:
        every = images
        if config.validation_images >= len(images):
            raise DataError(
                f"{config.path} has {len(images)} images: data.validation_images={config.validation_images} leaves "
                f"none to train on; at most {len(images) - 1} can be held out."
            )
        chosen = spread(len(images), config.validation_images)
        held_out = images.select(chosen)
        images = images.select(np.setdiff1d(np.arange(len(images)), chosen))
    for source, split in ((images, config.split), (held_out, config.validation_split)):
        if not len(source):
            raise DataError(f"{config.path} has no images in the split {split}.")
    if images.classes:
        untrained = [every.classes[label] for label in np.setdiff1d(every.labels(), [*images.labels(), -1])]
        if untrained:
            logger.warning("%s: validation images of %s, but no training images", config.path, ", ".join(untrained))
    return ImageSet(images, config, channels, True), ImageSet(held_out, config, channels, True)


def with_stage_1_images(config: DiffusionConfig, vqvae: LooCVQModel) -> DiffusionConfig:
    """Return a config with resolution and fit of the autoencoder's training, unless it gives its own."""
    trained = training_record(vqvae).get("data", {})
    fit = trained.get("fit", "crop").replace("random_crop", "crop")  # not for latents that are encoded once
    taken = {"resolution": vqvae.config.sample_size, "fit": fit}
    taken = {name: value for name, value in taken.items() if getattr(config.data, name) is None}
    if taken:
        words = ", ".join(f"data.{name}={value}" for name, value in taken.items())
        logger.info("%s, as in the autoencoder's training", words)
    return replace(config, data=replace(config.data, **taken))


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
        """Return the items of one batch; called by a loader's worker."""
        return [self[position] for position in positions]

    def index_at(self, position: int) -> int:
        """Return the index in the data set that belongs to a position of the stream."""
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            self._order = random_at(self.seed, ORDER, epoch).permutation(self.length)
            self._epoch = epoch
        return int(self._order[place])


class ImageStream(Stream):
    """Training images: item p is `(image, label, report)` with the image a uint8 tensor `(C, H, W)`.

    Loops turn it into numbers in [-1, 1] (`images.pixels.to_float`) on their device: what workers send is small.
    """

    def __init__(self, images: ImageSet, seed: int):
        super().__init__(len(images), seed)
        self.images = images

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int, Report]:
        images = self.images
        candidates = images.indices_from(self.index_at(position))
        item, problems = images.first_readable(candidates, partial(images.read, at=(self.seed, position)))
        return *item, Report(problems[:1])  # the problems after the first one have positions of their own


class OnlineLatentStream(Dataset):
    """Training examples of stage 2 that are encoded in the loop.

    Item p is `(image, label, noise, time, dropout, report)`: the image (uint8), label and report of `stream`, and the
    numbers that `latents.LatentStream` gives at that position. `latent_shape` is c, h, w of the latents.
    """

    def __init__(self, stream: Dataset, latent_shape: tuple[int, int, int], seed: int):
        self.stream, self.latent_shape, self.seed = stream, tuple(latent_shape), seed
        self.length = getattr(stream, "length", None)  # unknown if images are streamed

    def __getitems__(self, positions: list[int]) -> list[tuple]:
        """Return the items of one batch; called by a loader's worker."""
        return [
            (image, label, *draws_at(self.seed, position, self.latent_shape), report)
            for position, (image, label, report) in zip(positions, self.stream.__getitems__(positions), strict=True)
        ]


def draws_at(seed: int, position: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, np.float32, np.float32]:
    """Return noise of a shape, and two uniform numbers in [0, 1), that belong to one position of the stream."""
    random = random_at(seed, NOISE, position)
    time, dropout = random.random(2, dtype=np.float32)
    return torch.from_numpy(random.standard_normal(shape, dtype=np.float32)), time, dropout


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


def make_stream(
    images: ImageSet | StreamedSet,
    seed: int,
    batches: StreamBatches,
    num_workers: int,
    cursors: dict[int, tuple[int, ...]] | None = None,
) -> ImageStream | StreamedImages:
    """Return the stream of training images.

    Args:
        num_workers: Workers of the loader that will read the stream.
        cursors: For a streamed set: the cursor of each lane from the newest checkpoint. Replaced, in place, by the
            cursors of all lanes of this run, so that the next checkpoint's are complete.
    """
    if isinstance(images, ImageSet):
        return ImageStream(images, seed)
    processes = batches.stride // batches.per_forward
    stream = StreamedImages(images, seed, batches.per_forward, processes, num_workers, cursors or {})
    if cursors is not None:
        cursors.clear()
        cursors.update(stream.cursors)
    return stream


def stream_loader(stream: Dataset, batches: StreamBatches, num_workers: int, pin_memory: bool) -> DataLoader:
    """Return a loader over the batches of this process. Do not let Accelerate prepare it: it is divided already.

    Items of the stream are tuples that end with a `Report`, and so are the batches: stacked tensors and one report.
    """
    return DataLoader(
        stream,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        worker_init_fn=start_worker,
        # Its own: a loader draws a number when it is made, which would part a resumed run from an uninterrupted one.
        generator=torch.Generator(),
    )


def collate(items: list[tuple]) -> tuple:
    """Make items `(*values, report)` one batch: the values stacked, the reports joined, the last cursor kept."""
    *values, reports = zip(*items, strict=True)
    unreadable = [problem for report in reports for problem in report.unreadable]
    return *default_collate(list(zip(*values, strict=True))), Report(unreadable, reports[-1].cursor)


class _FloatBatches(DataLoader):
    """Batches in [-1, 1]. Workers send uint8, a quarter of the bytes, which this process converts."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return map(to_float, super().__iter__())


def float_batches(images: ImageSet | Subset, batch_size: int = 64, num_workers: int = 0) -> DataLoader:
    """Return batches `(B, C, H, W)` in [-1, 1], in order, not augmented."""
    return _FloatBatches(
        images,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_stacked_pixels,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # its own, as in `stream_loader`
    )


def _stacked_pixels(items: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    return default_collate([pixels for pixels, _ in items])
