"""Samples and reference batches as .npz in the layout of ADM's evaluation suite (guided-diffusion), read and written
batch by batch.

`arr_0` holds the images, uint8 `(N, H, W, 3)`; `arr_1`, if it is there, the labels `(N,)`. Reference batches may also,
or only, hold `mu` and `sigma`: mean and covariance of the 2,048 Inception features of a whole training set.
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

from looc_ldm.metrics.frechet import FeatureMoments
from looc_ldm.utils.errors import one_line
from looc_ldm.utils.files import renamed_when_complete


class NpzSamples:
    """The images of an .npz, which are never all in memory.

    Attributes:
        shape (`tuple[int, int, int]` or `None`): C, H, W of every image; None if there are only statistics.
        labels (`torch.Tensor` or `None`): int64 `(N,)`.
        has_statistics (`bool`): Whether it holds `mu` and `sigma`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The arrays are not as this module says.
    """

    def __init__(self, file: Path):
        self.file = Path(file)
        if not self.file.is_file():
            raise FileNotFoundError(f"no file {str(file)!r}.")
        self.count, self.shape, self.labels = 0, None, None
        with self._name_file_in_errors(), zipfile.ZipFile(self.file) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            self.has_statistics = {"mu", "sigma"} <= names
            if "arr_0" in names:
                with archive.open("arr_0.npy") as member:
                    self.count, *size, channels = _read_image_header(member)
                self.shape = (channels, *size)
            elif not self.has_statistics:
                raise ValueError(f"it holds {', '.join(sorted(names)) or 'nothing'}, neither arr_0 nor mu, sigma")
            if "arr_1" in names:
                with archive.open("arr_1.npy") as member:
                    labels = np.lib.format.read_array(member, allow_pickle=False)
                if labels.dtype.kind not in "iu" or labels.shape != (self.count,):
                    raise ValueError(f"arr_1 must be {self.count} integers, got {labels.dtype} of shape {labels.shape}")
                self.labels = torch.from_numpy(labels.astype(np.int64))

    def __len__(self) -> int:
        return self.count

    @cached_property
    def statistics(self) -> FeatureMoments:
        """Mean and covariance of Inception features, from `mu` and `sigma`."""
        with self._name_file_in_errors(), np.load(self.file, allow_pickle=False) as arrays:
            mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in ("mu", "sigma"))
            return FeatureMoments.from_mean_and_covariance(mean, covariance)

    def batches(self, shares: Iterable[range]) -> Iterator[torch.Tensor]:
        """Read the images at these places, uint8 `(B, C, H, W)` for each range.

        Args:
            shares: Places, increasing, as `looc_ldm.metrics.shares.share_of_batches` gives them.
        """
        channels, height, width = self.shape
        size = channels * height * width
        with self._name_file_in_errors(), zipfile.ZipFile(self.file) as archive, archive.open("arr_0.npy") as member:
            _read_image_header(member)
            start = member.tell()
            for share in shares:
                member.seek(start + share.start * size)
                content = bytearray(member.read(len(share) * size))
                if len(content) < len(share) * size:
                    raise ValueError("it is cut off")
                pixels = torch.frombuffer(content, dtype=torch.uint8)
                yield pixels.view(len(share), height, width, channels).permute(0, 3, 1, 2)

    @contextmanager
    def _name_file_in_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # errors of zipfile on damaged files have no common base
            raise ValueError(f"cannot read {str(self.file)!r}: {one_line(error).rstrip('.')}.") from error


def _read_image_header(member: BinaryIO) -> tuple[int, int, int, int]:
    """Read the header of `arr_0` and return its shape."""
    np.lib.format.read_magic(member)
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or is_fortran or 0 in shape:
        raise ValueError(f"arr_0 must be uint8 (images, height, width, 3), got {dtype} of shape {shape}")
    return shape


class NpzWriter:
    """Write images batch by batch; see `npz_writer`."""

    def __init__(self, member: BinaryIO, count: int):
        self._member, self._count = member, count
        self._shape: tuple[int, ...] | None = None
        self.written = 0

    def add(self, images: torch.Tensor) -> None:
        """Write uint8 images `(B, 1 or 3, H, W)`, grey ones as RGB. Raises ValueError if their size changes."""
        pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
        if self._shape is None:
            self._shape = pixels.shape[1:]
            header = {"descr": "|u1", "fortran_order": False, "shape": (self._count, *self._shape)}
            np.lib.format.write_array_header_1_0(self._member, header)
        if pixels.shape[1:] != self._shape:
            raise ValueError(f"images of an npz must have one size, got {self._shape} and {pixels.shape[1:]}.")
        self._member.write(pixels.tobytes())
        self.written += len(pixels)


@contextmanager
def npz_writer(file: Path, count: int, labels: torch.Tensor | None = None) -> Iterator[NpzWriter]:
    """Write an .npz, which appears when it is complete.

    Args:
        file (`Path`): The .npz.
        count (`int`): Number of images to come.
        labels (`torch.Tensor`, *optional*): Their labels, integers `(count,)`.

    Raises:
        ValueError: There were more or fewer images than `count`.
    """
    with renamed_when_complete(file) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            writer = NpzWriter(member, count)
            yield writer
        if writer.written != count:
            raise ValueError(f"{writer.written} images were written to an npz of {count}.")
        if labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, labels.cpu().numpy().astype(np.int64))
