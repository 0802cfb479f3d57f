"""Weights of metrics, looked at before a long training rather than after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from looc_ldm.errors import UserError


def check_weights(*files: tuple[str, Path | None, Callable[[], object]]) -> None:
    """Look for files of weights, and load them once.

    Args:
        files: Triples of the option that names the file, the file or, for weights that are downloaded, None, and what
            loads it.

    Raises:
        UserError: A file that is not there (all are looked for before one is loaded), or that is none of such weights,
            or weights that could not be downloaded. Names the option.
    """
    for option, file, _ in files:
        if file is not None and not file.is_file():
            raise UserError(f"{option}: no file {str(file)!r}.")
    for option, _, load in files:
        try:
            load()
        except (OSError, ValueError) as error:
            raise UserError(f"{option}: {' '.join(str(error).split())}") from None
