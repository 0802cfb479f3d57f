"""Write files atomically, and read JSON."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from PIL import Image

from looc_ldm.utils.errors import UserError, one_line

NAME_BYTES = 255  # in a name, on the usual file systems


def check_folder(folder: Path) -> None:
    """Raise UserError, before any work, if a folder cannot be made or written to. Makes no folder."""
    nearest = next(place for place in (folder, *folder.parents) if os.path.lexists(place))  # dangling links too
    if not nearest.is_dir():
        raise UserError(f"cannot write to {str(folder)!r}: {str(nearest)!r} is not a folder.")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write to {str(folder)!r}: no permission.")


def is_relative_name(name: str) -> bool:
    """Whether a foreign name with `/` stays inside the folder that it is put into, on any system."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or not path.name or "\\" in name or ":" in path.parts[0])


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents. Raises UserError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {str(folder)!r}: {error.strerror}.") from error


def replace_text(file: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    replace_bytes(file, text.encode())


def replace_bytes(file: Path, content: bytes) -> None:
    """Write a file atomically: under a temporary name in the same folder, and then renamed."""
    with renamed_when_complete(file) as partial:
        partial.write_bytes(content)


def write_image(image: Image.Image, file: Path) -> None:
    """Write a PNG atomically."""
    with renamed_when_complete(file) as partial:
        image.save(partial, format="PNG")


@contextmanager
def renamed_when_complete(file: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield a path beside `file` to write to. It is renamed to `file` at the end, or removed after an error.

    Args:
        file: The file to write.
        partial: The path to yield; `partial_of(file)` if not given.

    Raises:
        UserError: Writing failed, for instance because the disk is full.
    """
    partial = partial_of(file) if partial is None else partial
    try:
        yield partial
        _to_disk(partial)  # otherwise a power cut can leave a file with incomplete content
        os.replace(partial, file)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to see
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {str(file)!r}: {one_line(error, partial)}.") from error
        raise


@contextmanager
def folder_when_complete(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, which replaces it at the end, or is removed after an error.

    Raises:
        UserError: Writing failed.
    """
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)  # a command that was killed left it
    try:
        partial.mkdir(parents=True)
        yield partial
        replace_folder(partial, folder)
    except OSError as error:
        raise UserError(f"cannot write {str(folder)!r}: {one_line(error, partial)}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(partial: Path, folder: Path) -> None:
    """Rename a complete folder; an older one of that name is removed.

    All content reaches the disk before the name does: even after a power cut, a folder of that name is complete.
    """
    for path in [*partial.rglob("*"), partial]:
        _to_disk(path)
    if folder.is_dir():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    _to_disk(folder.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_of(file: Path) -> Path:
    """Return the path beside `file` that is written to first."""
    return file.with_name(f".{file.name}.partial")


def read_json(file: Path) -> dict:
    """Return the JSON object in a file.

    Raises:
        UserError: The file cannot be read, or holds no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {str(file)!r}: {error.strerror}.") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{str(file)!r} is not a JSON object.")
    return value
