"""Weight files of feature networks: their SHA-256, and reading them without executing a pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file


def weights_identity(files: Iterable[Path]) -> str:
    """SHA-256 of a file of weights, or of several, as 64 hexadecimal digits.

    That of a single file is the file's, as `sha256sum` and the hub state it; that of several is taken of the lines
    `sha256sum` prints for them in order of their names, without folders. A file is read once in a process, and anew
    where it has changed.
    """
    digests = {file.name: _sha256(file.resolve(), *_state(file)) for file in files}
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def downloaded_weights(url: str, download: Callable[[], object]) -> Path:
    """Return the file that torch.hub keeps for this address, after `download` if it is not there yet."""
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.is_file():
        download()
    return file


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@cache
def _sha256(file: Path, modified: int, size: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .safetensors file or of a .pth state dict, on the CPU. Nothing else is unpickled.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is not a file of tensors by name.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r}: no such file.")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a pickle of something else, or no pickle at all, leads to
        # A KeyError of the unpickler is a byte that it does not know, and says nothing to anybody.
        reason = "" if isinstance(error, KeyError) else (str(error).strip() or "it is empty").splitlines()[0]
        kind = f": {type(error).__name__}: {reason}" if reason else ", neither .safetensors nor what torch.save writes."
        raise ValueError(f"{str(file)!r} is not a file of weights{kind}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError(f"{str(file)!r} is not a file of weights: it holds more than tensors by name.")
    return tensors
