"""Sets of images that are measured, wherever they come from: drawn from a model, a data set, or an .npz.

Each has a length, `labels` (int64 `(n,)` or None), `classes` (names of the labels, or none), and `batches(shares)`:
uint8 images `(B, C, H, W)` for each range of places, so that each of several processes asks for its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from itertools import chain, islice
from pathlib import Path

import PIL.Image
import torch

from looc_ldm.commands.many_files import READERS, read_ahead
from looc_ldm.commands.options import SamplingOptions
from looc_ldm.images.image_set import ImageSet
from looc_ldm.images.transforms import to_pixels
from looc_ldm.metrics.samples import NpzSamples
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.pipelines.sampling import sample_images
from looc_ldm.utils.errors import DataError


class StoredImages:
    """Images of a data set, read ahead in threads.

    Args:
        images: The data set.
        chosen: Indices of the images to take; all if not given.
        at_own_size: Take images as they are stored, which must be one size, instead of bringing them to the set's size.
    """

    def __init__(self, images: ImageSet, chosen: Iterable[int] | None = None, at_own_size: bool = False):
        self.images, self.at_own_size = images, at_own_size
        self.chosen = list(range(len(images)) if chosen is None else chosen)
        self.classes: Mapping[int, str] = dict(enumerate(images.classes))
        self.labels = torch.tensor(images.labels())[self.chosen] if images.classes else None
        if at_own_size and self.chosen:
            first, stored = images.open(self.chosen[0])
            self._size, self._first_name = first.size, stored.name

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

    def check_sizes(self) -> None:
        """Raise DataError where images that must have one size have several: by their headers, without decoding."""
        for index in self.chosen:
            stored = self.images.source.read(index)
            try:
                with PIL.Image.open(
                    BytesIO(stored.content) if isinstance(stored.content, bytes) else stored.content
                ) as image:
                    size = image.size
            except Exception:  # what cannot be read is named when it is read
                continue
            if sorted(size) != sorted(self._size):  # upright it may have them the other way round
                raise self._size_mismatch(stored.name, size)

    def _size_mismatch(self, name: str, size: tuple[int, int]) -> DataError:
        return DataError(
            f"{name} is {size[0]}x{size[1]} and {self._first_name} {self._size[0]}x{self._size[1]}: samples must have "
            "one size."
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        return tuple(self._read(self.chosen[0]).shape)

    def _read(self, index: int) -> torch.Tensor:
        if not self.at_own_size:
            return self.images.read(index)[0]
        image, stored = self.images.open(index)
        if image.size != self._size:
            raise self._size_mismatch(stored.name, image.size)
        return to_pixels(image)


class NpzImages(NpzSamples):
    """Images of an .npz, whose labels are numbers without names."""

    classes: Mapping[int, str] = {}


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
