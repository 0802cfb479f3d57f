"""Files of JSON lines that survive a full disk and a killed process."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

from looc_ldm.utils.files import replace_bytes

logger = logging.getLogger(__name__)


def append_line(file: Path, values: dict) -> None:
    """Add a JSON object to a file of lines. A disk that is full leaves the file as it was.

    Raises:
        OSError: It could not be written.
    """
    line = (json.dumps(values, allow_nan=False) + "\n").encode()
    with open(file, "ab", buffering=0) as stream:
        start = stream.tell()
        try:
            if stream.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            stream.truncate(start)
            raise


def cut_lines(file: Path, images: int) -> None:
    """Remove the lines of more than `images` images, and one that was half written when the process was killed."""
    if not file.is_file():
        return
    content = file.read_bytes()
    lines = content.splitlines()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["images"] <= images:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                logger.warning("%s: line %d is damaged, and left out", file, number)
    text = b"".join(line + b"\n" for line in kept)
    if text != content:
        replace_bytes(file, text)


def has_figures(file: Path, images: int, prefix: str) -> bool:
    """Whether a line of exactly `images` images has a key with a prefix. For a file that `cut_lines` has cleaned."""
    lines = map(json.loads, file.read_bytes().splitlines()) if file.is_file() else ()
    return any(key.startswith(prefix) for line in lines if line["images"] == images for key in line)
