"""Precision, input and weight files of all feature networks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def in_float32(device: torch.device | str) -> Iterator[None]:
    """Compute in float32 on this device: without autocast, and without TF32 in convolutions.

    cuDNN has TF32 on by default; the features of a GPU and a CPU would then differ in the fourth digit.
    """
    backend = torch.backends.cudnn
    settings = {name: getattr(backend, name) for name in ("enabled", "benchmark", "deterministic")}
    with torch.autocast(torch.device(device).type, enabled=False), backend.flags(**settings, allow_tf32=False):
        yield


def as_rgb(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images `(B, 1 or 3, H, W)` as `(B, 3, H, W)`. Raises ValueError for anything else."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            "images must be uint8 tensors of shape (batch, 1 or 3, height, width), "
            f"got {images.dtype} of shape {tuple(images.shape)}."
        )
    return images.expand(-1, 3, -1, -1)


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file, as `sha256sum` and the hub state it."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def downloaded_weights(url: str, download: Callable[[], object]) -> Path:
    """Return the file in which torch.hub keeps the download of an address. If it is missing, call `download` first."""
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.is_file():
        download()
    return file
