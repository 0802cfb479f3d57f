"""Writing files so that a half-written one is never seen."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from looc_ldm.errors import UserError


def check_folder(folder: Path) -> None:
    """Refuse, before any work, a folder that cannot be made or written to. Makes nothing."""
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write to {str(folder)!r}: {str(nearest)!r} is not a folder.")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write to {str(folder)!r}: no permission.")


def replace_text(file: Path, text: str) -> None:
    """Write a UTF-8 text file beside its place and rename it."""
    with renamed_when_complete(file) as partial:
        partial.write_text(text, encoding="utf-8")


def replace_bytes(file: Path, content: bytes) -> None:
    """Write a file beside its place and rename it."""
    with renamed_when_complete(file) as partial:
        partial.write_bytes(content)


def write_image(image: Image.Image, file: Path) -> None:
    """Write a PNG beside its place and rename it."""
    with renamed_when_complete(file) as partial:
        image.save(partial, format="PNG")


def copy_file(source: Path, file: Path) -> None:
    """Copy a file beside its place and rename it."""
    with renamed_when_complete(file) as partial:
        shutil.copyfile(source, partial)


@contextmanager
def renamed_when_complete(file: Path) -> Iterator[Path]:
    """The path beside `file` to write to; it is renamed to `file` at the end, or removed where an error ends it."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
