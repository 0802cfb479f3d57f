"""Errors that the command line shows as one line, with the wrong value and what is allowed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

# Errors of bad input or a failing network that are neither OSError nor ValueError.
FOREIGN_ERRORS = (("yaml", "YAMLError"), ("wandb", "Error"))


class UserError(ValueError):
    """Bad input. The message is one line that names the value and what is allowed."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(UserError):
    """Images are missing or cannot be read."""


class UnreadableImage(DataError):
    """One image cannot be decoded."""


class ModelError(UserError):
    """A folder or id is not a model of the right kind."""


class TrainingError(UserError):
    """A run cannot continue. Its checkpoints are unchanged."""


class Terminated(KeyboardInterrupt):
    """SIGTERM ended a run, after it was saved."""


def one_line(error: BaseException, named: Path | None = None) -> str:
    """Return the message of an error on one line; an OSError's with its file, unless that is `named` already."""
    message = getattr(error, "strerror", None)
    if not message:
        return " ".join(str(error).split()) or type(error).__name__
    file = getattr(error, "filename", None)
    is_named = file is None or isinstance(file, int) or (named is not None and Path(os.fsdecode(file)) == named)
    return message if is_named else f"{message}: {os.fsdecode(file)!r}"


def is_first_process() -> bool:
    """Whether this is the first, or the only one, of the processes that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def print_once(text, file: TextIO | None = None) -> None:
    """Print text that all processes share, on the first one only."""
    if is_first_process():
        print(text, file=file)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Run a command line: bad input ends in one line and exit status 2, Ctrl-C in one line and status 130.

    Bad input is a UserError, OSError, ValueError (such as UnicodeError), one of `FOREIGN_ERRORS`, or a loader's worker
    process that ended for lack of memory. SIGTERM during training ends in one line and status 143.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        with suppress(OSError):  # the terminal may be closed
            print_once(f"\n{str(interrupt) or 'interrupted'}", file=sys.stderr)
        sys.exit(143 if isinstance(interrupt, Terminated) else 130)
    except Exception as error:
        # Base classes of packages' errors, if they have been imported.
        theirs = [getattr(sys.modules.get(package), name, ()) for package, name in FOREIGN_ERRORS]
        message = str(error).strip() or type(error).__name__
        if isinstance(error, RuntimeError) and re.search(r"DataLoader worker \(pid|shared memory", message):
            message = (
                "a process that loads images ended. Most often memory or /dev/shm is too small: give "
                "--data.num_workers 0 or a smaller batch, or make /dev/shm larger (docker run --shm-size 8g)."
            )
        elif not isinstance(error, (OSError, ValueError, *theirs)):
            raise
        # From a loader's worker process the message comes with the worker's traceback in front.
        if message.startswith("Caught "):
            message = re.sub(r"^[\w.]+: ", "", message.splitlines()[-1])
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
