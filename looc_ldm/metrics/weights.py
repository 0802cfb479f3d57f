"""Weight files of feature networks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file, as `sha256sum` and the hub state it."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def downloaded_weights(url: str, download: Callable[[], object]) -> Path:
    """Return the file that torch.hub keeps for this address, after `download` if it is not there yet."""
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.is_file():
        download()
    return file
