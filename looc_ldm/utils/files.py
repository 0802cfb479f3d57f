"""Writing files so that a half-written one is never seen, and reading JSON."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from PIL import Image

from looc_ldm.utils.errors import UserError

NAME_BYTES, PATH_BYTES = 255, 4096  # of the usual file systems; paths with the NUL that ends them


def check_folder(folder: Path) -> None:
    """Refuse, before any work, a folder that cannot be made or written to. Makes nothing."""
    nearest = next(place for place in (folder, *folder.parents) if os.path.lexists(place))  # dangling links too
    if not nearest.is_dir():
        raise UserError(f"cannot write to {str(folder)!r}: {str(nearest)!r} is not a folder.")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write to {str(folder)!r}: no permission.")


def check_name(file: Path) -> None:
    """Refuse, before any work, a file or folder whose name, or that of the partial one beside it, is impossible."""
    if "\0" in str(file):
        raise UserError(f"cannot write {str(file)!r}: there is a NUL in its name.")
    partial = partial_of(file)
    if any(len(os.fsencode(part)) > NAME_BYTES for part in partial.parts):
        spare = NAME_BYTES - len(os.fsencode(partial.name)) + len(os.fsencode(file.name))
        raise UserError(
            f"cannot write {str(file)!r}: names of folders may have {NAME_BYTES} bytes, of files {spare}, which leaves "
            "some for the name beside it that is written to first."
        )
    if len(os.fsencode(partial.absolute())) >= PATH_BYTES:
        raise UserError(f"cannot write {str(file)!r}: paths may have {PATH_BYTES - 1} bytes.")


def is_relative_name(name: str) -> bool:
    """Whether a name with `/` from elsewhere names a file inside the folder that it is put into, on any system."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or not path.name or "\\" in name or ":" in path.parts[0])


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are not there. Raises UserError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {str(folder)!r}: {error.strerror}.") from error


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
def renamed_when_complete(file: Path, partial: Path | None = None) -> Iterator[Path]:
    """The path beside `file` to write to; it is renamed to `file` at the end, or removed where an error ends it.

    Args:
        file: What is written.
        partial: That path; `partial_of(file)` if not given.

    Raises:
        UserError: The system refused something, for instance because the disk is full.
    """
    partial = partial_of(file) if partial is None else partial
    try:
        yield partial
        _to_disk(partial)  # else a power cut can leave the name without all of the content
        os.replace(partial, file)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to see
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            # Of another file, such as the source of a copy, it has the name.
            own = error.filename is None or Path(os.fsdecode(error.filename)) in (partial, file)
            reason = error.strerror if own and error.strerror else " ".join(str(error).split())
            raise UserError(f"cannot write {str(file)!r}: {reason}.") from error
        raise


def replace_folder(partial: Path, folder: Path) -> None:
    """Rename a complete folder, in place of an older one if there is one.

    All of it reaches the disk before the name does: after a power cut, too, what has the name is complete.
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
    """The path beside `file` that is written to first."""
    return file.with_name(f".{file.name}.partial")


def read_json(file: Path) -> dict:
    """Return the JSON object in a file.

    Raises:
        UserError: The file cannot be read, or holds something else.
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
