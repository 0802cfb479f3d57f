"""Sets of images to measure: drawn from a model, from a data set, or from an .npz.

Each has a length, `labels` (int64 `(n,)` or None), `classes` (names of the labels; may be empty), and
`batches(shares)`: uint8 images `(B, C, H, W)` for each range of places. Stored ones also have `shape` (C, H, W), `key`
(everything that their features depend on) and `about` (for the record).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """Images of a data set, all or `count` at even distances, read ahead in threads.

    With `at_own_size` they are taken as they are stored, and must have one size.
    """

    def __init__(self, images: ImageSet, count: int | None = None, at_own_size: bool = False):
        self.images = images
        self.chosen = spread(len(images), count or len(images)).tolist()
        self.classes: Mapping[int, str] = dict(enumerate(images.classes))
        self.labels = torch.tensor(images.labels())[self.chosen] if images.classes else None
        self._first = images.open(self.chosen[0]) if at_own_size else None

    def __len__(self) -> int:
        return len(self.chosen)

    def batches(self, shares: list[range]) -> Iterator[torch.Tensor]:
        """Yield the images of each share. Raises DataError for one that is unreadable or of a different size."""
        # At least a whole batch: it is read while the network is busy with the previous one.
        ahead = max(2 * READERS, *map(len, shares), 0)
        reading = read_ahead((self.chosen[place] for place in chain.from_iterable(shares)), self._read, ahead)
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
        (image, stored), (first, stored_first) = self.images.open(index), self._first
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
    """Images that a pipeline draws on demand, one per label (None for no class), on any number of processes."""

    def __init__(self, pipe: LooCLDMPipeline, labels: list[int | None], sampling: SamplingOptions, progress: bool):
        self.pipe, self.sampling, self.progress = pipe, sampling, progress
        self.drawn_as = labels
        self.labels = None if None in labels else torch.tensor(labels)
        self.classes: Mapping[int, str] = dict(pipe.config.id2label or {})

    def __len__(self) -> int:
        return len(self.drawn_as)

    def batches(self, shares: list[range]) -> Iterator[torch.Tensor]:
        """Yield the images of each share. All shares but the last have `batch_size` images."""
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
        next(drawn, None)  # finds nothing, and completes the bar


def is_npz(name: str) -> bool:
    return Path(name).suffix == ".npz"
