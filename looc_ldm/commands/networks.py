"""Checking the weights of feature networks before any work, with errors that name the option to give them by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from looc_ldm.errors import UserError


@contextmanager
def checked(option: str) -> Iterator[None]:
    """Errors of loading weights are shown as one line that names the option which gives them."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:  # with FileNotFoundError and ConnectionError
        raise UserError(f"{option}: {' '.join(str(error).split())}") from error
