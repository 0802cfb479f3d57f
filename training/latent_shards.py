"""What one process does of encoding a data set: its shards, one after the other.

What is in a shard depends on the images and the batch size alone: any number of processes writes the same bytes
(of networks whose arithmetic does not change: on CPUs, with one number of threads a process).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from looc_ldm.autoencoder import LooCVQModel
from looc_ldm.errors import DataError, ModelError, UnreadableImage, UserError
from looc_ldm.images import to_float
from looc_ldm.training.data import ImageSet
from looc_ldm.training.latent_cache import UNREADABLE, Shards, write_shard
from looc_ldm.training.moments import Moments
from looc_ldm.training.reports import too_many, write_unreadable

# Of a batch. A CPU is fastest while activations stay in its caches, a GPU once they fill it.
CPU_PIXELS, GPU_PIXELS = 2**16, 2**20
MOMENTS_AT_ONCE = 256  # latents as float64
POLL_SECONDS = 2.0  # between two looks at what other processes have written


def encode_shards(
    model: LooCVQModel,
    images: ImageSet,
    shards: Shards,
    numbers: list[int],
    shape: tuple[int, int, int],
    about: dict,
    batch_size: int | None,
    progress: Progress,
) -> None:
    """Encode and write shards, given by their numbers; see `cache_latents`."""
    fitting = (CPU_PIXELS if model.device.type == "cpu" else GPU_PIXELS) // images.config.resolution**2
    batch_size = batch_size or max(1, fitting)
    # Batches end with their shard, so that they do not depend on which others are encoded.
    batches = {number: _cut(shards.span(number), batch_size) for number in numbers}
    loaded = iter(_loader(images, [batch for of_shard in batches.values() for batch in of_shard], model.device))
    unreadable: list[str] = []
    for number, of_shard in batches.items():
        parts = [_no_rows(shape, images.config.flip)]
        unreadable_here: list[tuple[int, str]] = []
        for indices in of_shard:
            pixels, rows, unread = next(loaded)
            if len(pixels):
                with _one_line_if_out_of_memory(batch_size):
                    parts.append(rows | _encode(model, pixels, about["precision"], images.config.flip))
            unreadable_here += unread
            progress.update(len(indices))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        _check_finite(tensors)
        found = {"unreadable": unreadable_here, "moments": vars(_moments(tensors))}
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        write_shard(shards.file(number), arrays, about | found)
        unreadable += [name for _, name in unreadable_here]
        check_unreadable(images, shards.folder, unreadable)  # of this process alone, but early


def check_unreadable(images: ImageSet, folder: Path, names: list[str]) -> None:
    """Raises DataError for more than are allowed, as in training."""
    problem = too_many(len(names), len(images), images.config.max_unreadable_share, folder / UNREADABLE)
    if problem is not None:
        write_unreadable(folder / UNREADABLE, names)
        raise DataError(problem)


def _no_rows(shape: tuple[int, int, int], flip: bool) -> dict[str, torch.Tensor]:
    rows = {name: torch.empty(0, dtype=torch.int64) for name in ("indices", "labels")}
    return rows | {name: torch.empty(0, *shape, dtype=torch.float16) for name in ("latents", "flipped")[: 1 + flip]}


@torch.no_grad()
def _encode(model: LooCVQModel, pixels: torch.Tensor, precision: str, flip: bool) -> dict[str, torch.Tensor]:
    """`latents` and, if asked for, `flipped`, float16 `(B, c, h, w)` on the CPU, of uint8 pixels `(B, C, H, W)`."""
    batch = to_float(pixels).to(model.device, model.dtype)
    dtype = getattr(torch, precision)
    encoded = {}
    with torch.autocast(model.device.type, dtype, enabled=dtype != model.dtype):
        for name, images in (("latents", batch), ("flipped", batch.flip(-1))) if flip else (("latents", batch),):
            encoded[name] = model.encode(images).latents.half().cpu()
    return encoded


def _check_finite(tensors: dict[str, torch.Tensor]) -> None:
    for name in {"latents", "flipped"} & set(tensors):
        finite = tensors[name].isfinite().flatten(1).all(1)
        if not finite.all():
            index = tensors["indices"][~finite][0]
            raise ModelError(
                f"the latents of image {index} are not finite, or larger than half precision holds (65504); the "
                "autoencoder cannot be one whose training went well."
            )


def _moments(tensors: dict[str, torch.Tensor]) -> Moments:
    """Of what is stored, mirrored images included."""
    stored = [tensors[name] for name in ("latents", "flipped") if name in tensors]
    return sum((Moments.of(some) for latents in stored for some in latents.split(MOMENTS_AT_ONCE)), start=Moments())


@contextmanager
def _one_line_if_out_of_memory(batch_size: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device's memory does not suffice to encode {batch_size} images at a time: give "
            "`looc-ldm cache-latents` a smaller --batch-size."
        ) from error


# Reading --------------------------------------------------------------------------------------------------------------


def _cut(span: range, batch_size: int) -> list[range]:
    return [span[first : first + batch_size] for first in range(0, len(span), batch_size)]


def _loader(images: ImageSet, batches: list[range], device: torch.device) -> DataLoader:
    return DataLoader(
        _AsTheyAre(images),
        batch_sampler=batches,
        num_workers=min(images.config.num_workers, len(batches)),
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        # Its own: a loader that is made draws a number, which would change the training that follows.
        generator=torch.Generator(),
    )


class _AsTheyAre(Dataset):
    """Items `(index, pixels, label, None)`, or `(index, None, None, name)` where the image cannot be read."""

    def __init__(self, images: ImageSet):
        self.images = images

    def __getitem__(self, index: int) -> tuple:
        try:
            return index, *self.images.read(index), None
        except UnreadableImage as error:
            return index, None, None, error.name


def _collate(items: list[tuple]) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[tuple[int, str]]]:
    """Pixels of the images that can be read, their `indices` and `labels`, and the others' indices and names."""
    readable = [(index, pixels, label) for index, pixels, label, name in items if name is None]
    unreadable = [(index, name) for index, _, _, name in items if name is not None]
    indices, stack, labels = zip(*readable, strict=True) if readable else ((), (), ())
    rows = {"indices": torch.tensor(indices, dtype=torch.int64), "labels": torch.tensor(labels, dtype=torch.int64)}
    return torch.stack(stack) if readable else torch.empty(0), rows, unreadable


class Progress:
    """A bar over the images of all processes, on the main one: what it encodes itself, and what it sees of others."""

    def __init__(self, shards: Shards, missing: list[int], mine: list[int], shown: bool):
        to_do = sum(len(shards.span(number)) for number in missing)
        self.bar = tqdm(
            total=shards.images,
            initial=shards.images - to_do,
            desc="encoding latents",
            unit="img",
            unit_scale=True,
            mininterval=1 if sys.stderr.isatty() else 60,  # a line in a file
            disable=not shown,
        )
        self.folder = shards.folder
        self.of_others = {shards.file(number).name: len(shards.span(number)) for number in set(missing) - set(mine)}
        self.looked_at = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, error_type, *_) -> None:
        if error_type is None and not self.bar.disable:
            self._look()
        self.bar.close()

    def update(self, images: int) -> None:
        """So many more, encoded here."""
        self.bar.update(images)
        if not self.bar.disable and time.monotonic() - self.looked_at > POLL_SECONDS:
            self._look()

    def _look(self) -> None:
        self.looked_at = time.monotonic()
        for name in self.of_others.keys() & set(os.listdir(self.folder)):
            self.bar.update(self.of_others.pop(name))
