"""What one process does for all, or each of them, where all stop together: none waits for another that has gone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from safetensors import SafetensorError

from looc_ldm.errors import TrainingError, UserError

# torch.save reports what the disk refuses as a RuntimeError with one of these in it.
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos", "iostream")


def write_together(
    accelerator: Accelerator,
    what: str,
    folder: Path,
    write: Callable[[], object],
    undo: Callable[[], object] = lambda: None,
    main_only: bool = False,
) -> None:
    """Call `write` on every process, or on the first one alone; where it fails on one, all of them stop. Collective.

    With FSDP the writing can itself be a collective: there a process that fails ends at once, and the launcher ends
    the others, which wait for it.

    Args:
        accelerator: Knows the processes.
        what: What is written, for the message.
        folder: Where to, for the message.
        write: Writes it.
        undo: Called on the first process when all have ended writing, and it failed on one.
        main_only: Write on the first process only.

    Raises:
        TrainingError: The disk is full or refuses something else, here or on another process.
    """
    error = None
    if accelerator.is_main_process or not main_only:
        try:
            write()
        except Exception as caught:
            error = caught
    problem = None if error is None else disk_problem(error, folder)  # before space is made again
    alone = error is not None and accelerator.distributed_type == DistributedType.FSDP
    failed = [True] if alone else gather_object([error is not None])
    if not any(failed):
        return
    if accelerator.is_main_process:
        undo()
    if error is None:
        raise TrainingError(f"stopped, because process {failed.index(True)} cannot write {what}.")
    if problem is None:
        raise error
    raise TrainingError(f"cannot write {what} in {str(folder)!r}: {problem}.") from error


def disk_problem(error: BaseException, folder: Path) -> str | None:
    """One line for an error of writing to `folder`; None for any other error.

    Writers hide the system's error in errors of their own: safetensors in a SafetensorError, torch.save in a
    RuntimeError that does not say what happened.
    """
    cause = error.__cause__ or error.__context__
    if isinstance(error, OSError):
        return error.strerror or " ".join(str(error).split())
    if isinstance(error, SafetensorError):
        return " ".join(str(error).split())
    if isinstance(cause, OSError) and isinstance(error, RuntimeError | UserError):
        return disk_problem(cause, folder)
    if isinstance(error, RuntimeError) and any(word in str(error) for word in _TORCH_WRITER):
        free = shutil.disk_usage(folder).free / 2**20
        return f"a file could not be written to its end ({free:,.0f} MiB are free)"
    return None
