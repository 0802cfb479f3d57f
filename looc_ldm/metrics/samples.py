"""Samples and reference batches as .npz in the layout of ADM's evaluation suite (guided-diffusion), read and written
batch by batch.

`arr_0` holds the images, uint8 `(N, H, W, 3)`; `arr_1`, where there is one, the labels `(N,)`. Reference batches may
also, or only, hold `mu` and `sigma`: mean and covariance of the 2,048 Inception features of a whole training set.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from looc_ldm.files import renamed_when_complete
from looc_ldm.metrics.frechet import FeatureMoments

IMAGES, LABELS = "arr_0", "arr_1"
STATISTICS = ("mu", "sigma")


class NpzSamples:
    """The images of an .npz, which are never all in memory.

    Args:
        file (`Path`): The file.

    Attributes:
        shape (`tuple[int, int, int]` or `None`): C, H, W of every image; None where there are only statistics.
        labels (`torch.Tensor` or `None`): int64 `(N,)`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is not as this module says.
    """

    def __init__(self, file: Path):
        self.file = Path(file)
        if not self.file.is_file():
            raise FileNotFoundError(f"no file {str(file)!r}.")
        self.count, self.shape, self.labels = 0, None, None
        with self._errors_named(), zipfile.ZipFile(self.file) as archive:
            self._names = {name.removesuffix(".npy") for name in archive.namelist()}
            if IMAGES in self._names:
                with archive.open(f"{IMAGES}.npy") as member:
                    self.count, self.shape = _check_images(*_read_header(member))
            elif not self.has_statistics:
                raise ValueError(
                    f"it holds {', '.join(sorted(self._names)) or 'nothing'}, neither {IMAGES} nor mu, sigma"
                )
            if LABELS in self._names:
                self.labels = self._read_labels(archive)

    def __len__(self) -> int:
        return self.count

    @property
    def has_statistics(self) -> bool:
        """Whether it holds `mu` and `sigma`."""
        return set(STATISTICS) <= self._names

    @cached_property
    def statistics(self) -> FeatureMoments:
        """Mean and covariance of Inception features, as `mu` and `sigma` have them."""
        with self._errors_named(), np.load(self.file, allow_pickle=False) as arrays:
            mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in STATISTICS)
            return FeatureMoments.from_mean_and_covariance(mean, covariance)

    def batches(self, shares: Iterable[range]) -> Iterator[torch.Tensor]:
        """Images at some places, uint8 `(B, C, H, W)` for each range.

        Args:
            shares: Places, increasing, as `looc_ldm.metrics.shares.share_of_batches` gives them.
        """
        channels, height, width = self.shape
        size = channels * height * width
        with self._errors_named(), zipfile.ZipFile(self.file) as archive, archive.open(f"{IMAGES}.npy") as member:
            _read_header(member)
            start = member.tell()
            for share in shares:
                member.seek(start + share.start * size)
                content = bytearray(member.read(len(share) * size))
                if len(content) < len(share) * size:
                    raise ValueError("it is cut off")
                pixels = torch.frombuffer(content, dtype=torch.uint8)
                yield pixels.view(len(share), height, width, channels).permute(0, 3, 1, 2)

    def _read_labels(self, archive: zipfile.ZipFile) -> torch.Tensor:
        with archive.open(f"{LABELS}.npy") as member:
            labels = np.lib.format.read_array(member, allow_pickle=False)
        if labels.dtype.kind not in "iu" or labels.shape != (self.count,):
            raise ValueError(f"{LABELS} must be {self.count} integers, got {labels.dtype} of shape {labels.shape}")
        return torch.from_numpy(labels.astype(np.int64))

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:
            raise ValueError(f"cannot read {str(self.file)!r}: {' '.join(str(error).split()).rstrip('.')}.") from error


class NpzWriter:
    """Takes images batch by batch; see `npz_writer`."""

    def __init__(self, archive: zipfile.ZipFile, count: int):
        self._archive, self._count = archive, count
        self._member: BinaryIO | None = None
        self._shape: tuple[int, ...] = ()
        self._written = 0

    def add(self, images: torch.Tensor) -> None:
        """Write uint8 images `(B, 1 or 3, H, W)`, grey ones as RGB. Raises ValueError where their size changes."""
        rows = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
        if self._member is None:
            self._shape = rows.shape[1:]
            self._member = self._archive.open(f"{IMAGES}.npy", "w", force_zip64=True)
            header = {"descr": "|u1", "fortran_order": False, "shape": (self._count, *self._shape)}
            np.lib.format.write_array_header_1_0(self._member, header)
        if rows.shape[1:] != self._shape:
            raise ValueError(f"images of an npz must have one size, got {self._shape} and {rows.shape[1:]}.")
        self._member.write(np.ascontiguousarray(rows).tobytes())
        self._written += len(rows)

    def finish(self, labels: torch.Tensor | None) -> None:
        """Complete the file. Raises ValueError if there were more or fewer images than was said."""
        if self._written != self._count:
            raise ValueError(f"{self._written} images were written to an npz of {self._count}.")
        self._member.close()
        if labels is not None:
            with self._archive.open(f"{LABELS}.npy", "w") as member:
                np.lib.format.write_array(member, labels.cpu().numpy().astype(np.int64))

    def abandon(self) -> None:
        """Let go of a file that will not be complete."""
        if self._member is not None:
            self._member.close()


@contextmanager
def npz_writer(file: Path, count: int, labels: torch.Tensor | None = None) -> Iterator[NpzWriter]:
    """Write an .npz that appears when it is complete.

    Args:
        file (`Path`): Where to.
        count (`int`): How many images will come.
        labels (`torch.Tensor`, *optional*): Their labels, integers `(count,)`.
    """
    with renamed_when_complete(file) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        writer = NpzWriter(archive, count)
        try:
            yield writer
            writer.finish(labels)
        finally:
            writer.abandon()


def _read_header(member: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of an .npy."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


def _check_images(shape: tuple[int, ...], is_fortran: bool, dtype: np.dtype) -> tuple[int, tuple[int, int, int]]:
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or is_fortran or 0 in shape:
        raise ValueError(f"{IMAGES} must be uint8 (images, height, width, 3), got {dtype} of shape {shape}")
    count, height, width, channels = shape
    return count, (channels, height, width)
