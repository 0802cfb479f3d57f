"""Sets of images that are measured: drawn from a model, of a data set, or of an .npz.

Each has a length, `labels` (int64 `(n,)` or None), `classes` (names of the labels, or none), and `batches(shares)`:
uint8 images `(B, C, H, W)` for each range of places, so that each of several processes asks for its own. Stored ones
also have `shape` (C, H, W), `key` (what their features depend on) and `about` (for the record).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import torch

from looc_ldm.commands.many_files import READERS, read_ahead
from looc_ldm.commands.options import SamplingOptions
from looc_ldm.commands.shared import data_of
from looc_ldm.images.image_set import ImageSet, spread
from looc_ldm.images.pixels import to_pixels
from looc_ldm.metrics.networks import file_sha256
from looc_ldm.metrics.samples import NpzSamples
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.pipelines.sampling import sample_images
from looc_ldm.training.latent_fingerprint import reference_fingerprint
from looc_ldm.utils.errors import DataError


class StoredImages:
    """Images of a data set, read ahead in threads.

    Args:
        images: The data set.
        count: Take only this many, at even distances; all if not given.
        at_own_size: Take images as they are stored, which must be one size, instead of bringing them to the set's size.
    """

    def __init__(self, images: ImageSet, count: int | None = None, at_own_size: bool = False):
        self.images = images
        self.chosen = spread(len(images), count or len(images)).tolist()
        self.classes: Mapping[int, str] = dict(enumerate(images.classes))
        self.labels = torch.tensor(images.labels())[self.chosen] if images.classes else None
        self._first = images.open(self.chosen[0]) if at_own_size else None

    def __len__(self) -> int:
        return len(self.chosen)

    def batches(self, shares: Iterable[range]) -> Iterator[torch.Tensor]:
        """uint8 images `(B, C, H, W)` of each share. Raises DataError for one that is unreadable or of another size."""
        shares = list(shares)
        places = chain.from_iterable(shares)
        # A whole batch: they are read while the network is busy with the one before.
        ahead = max(2 * READERS, *map(len, shares), 0)
        reading = read_ahead((self.chosen[place] for place in places), self._read, ahead)
        for share in shares:
            yield torch.stack([future.result() for _, future in islice(reading, len(share))])

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self._read(self.chosen[0]).shape)

    @cached_property
    def key(self) -> dict:
        subset = {} if len(self) == len(self.images) else {"images": len(self)}
        return reference_fingerprint(self.images) | subset

    @property
    def about(self) -> dict:
        return data_of(self.images)

    def _read(self, index: int) -> torch.Tensor:
        if self._first is None:
            return self.images.read(index)[0]
        image, stored = self.images.open(index)
        first, stored_first = self._first
        if image.size != first.size:
            raise DataError(
                f"{stored.name} is {image.width}x{image.height} and {stored_first.name} {first.width}x{first.height}: "
                "samples must have one size."
            )
        return to_pixels(image)


class NpzImages(NpzSamples):
    """Images of an .npz, whose labels are numbers without names."""

    classes: Mapping[int, str] = {}

    @cached_property
    def key(self) -> dict:
        return {"data": {"sha256": file_sha256(self.file)}}

    @property
    def about(self) -> dict:
        return {"data": str(self.file), "split": None, "fit": None}


class DrawnImages:
    """Images that a pipeline draws when they are asked for; the same ones whatever the number of processes.

    Args:
        pipe: The model.
        labels: The class of each image; None for no class.
        sampling: Steps, guidance, batch size and seed.
        progress: Whether to show a bar.
    """

    def __init__(self, pipe: LooCLDMPipeline, labels: list[int | None], sampling: SamplingOptions, progress: bool):
        self.pipe, self.sampling, self.progress = pipe, sampling, progress
        self.drawn_as = labels
        self.labels = None if None in labels else torch.tensor(labels)
        self.classes: Mapping[int, str] = dict(pipe.config.id2label or {})

    def __len__(self) -> int:
        return len(self.drawn_as)

    def batches(self, shares: Iterable[range]) -> Iterator[torch.Tensor]:
        """uint8 images `(B, C, H, W)` of each share, whose lengths but the last one's are the batch size."""
        shares = list(shares)
        drawn = sample_images(
            self.pipe,
            self.drawn_as,
            seed=self.sampling.seed,
            batch_size=self.sampling.batch_size,
            progress=self.progress,
            indices=list(chain.from_iterable(shares)),
            num_inference_steps=self.sampling.steps,
            guidance_scale=self.sampling.guidance_scale,
        )
        for share in shares:
            yield torch.stack(list(islice(drawn, len(share))))
        next(drawn, None)  # there is none; it completes the bar


def is_npz(name: str) -> bool:
    return Path(name).suffix == ".npz"
