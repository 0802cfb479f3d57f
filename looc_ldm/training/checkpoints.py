"""A folder of checkpoints: written beside and renamed, checked before they are used, the older ones removed.

    000123000/           complete: everything that its `run.json` lists is there
    000124000.partial/   being written, or left over from a process that was killed meanwhile

Methods marked *collective* must be called by every process.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list

from looc_ldm.training.latent_fingerprint import another_origin
from looc_ldm.utils.distributed import any_problem, write_or_stop_all
from looc_ldm.utils.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder (`Path`): Where they are, seen by all processes.
        accelerator (`Accelerator`): Saves and loads what was prepared by it or registered with it.
        batch_size (`int`): Images per optimizer step.
        keep_last (`int`): How many of the newest are kept.
        keep_every_images (`int`, *optional*): The first one after each multiple of this is kept, too.

    Attributes:
        newest (`int`, *optional*): Images of the one that was loaded or saved last.
        provenance (`dict`, *optional*): What the run depends on beside its settings, written with each checkpoint; see
            `looc_ldm.training.latent_fingerprint.run_fingerprint`.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        batch_size: int,
        keep_last: int,
        keep_every_images: int | None = None,
    ):
        self.folder = folder
        self.accelerator = accelerator
        self.batch_size = batch_size
        self.keep_last = keep_last
        self.keep_every_images = keep_every_images
        self.newest: int | None = None
        self.provenance: dict[str, dict] | None = None

    # Loading ---------------------------------------------------------------------------------------------------------

    def load_newest(self, before_load: Callable[[int], None]) -> dict | None:
        """Load the newest checkpoint that is complete; others are named in a warning. Collective.

        Args:
            before_load: Called with the images of a checkpoint before it is loaded. What it seeds remains on a process
                that was not there when the checkpoint was written, and so has no random state in it.

        Returns:
            `dict`, *optional*: What was saved in `run.json`; None if there are no checkpoints.

        Raises:
            ConfigError: It was written by a run of other `fixed_settings`, or one of another `provenance`.
            TrainingError: There are checkpoints, and none can be used; or a disk cannot be read.
        """
        if self.accelerator.is_main_process:
            for path in self.folder.glob("*.partial"):  # of processes that were killed
                shutil.rmtree(path)
        # A copy: the folder itself is the same for all only as long as nobody writes.
        (candidates,) = broadcast_object_list([checkpoints_in(self.folder)])
        for path in reversed(candidates):
            problem = any_problem(self.accelerator, partial(problem_of, path), self.folder, main_only=True)
            if problem is None:
                self._refuse_another_run(path)
                before_load(int(path.name))
                problem = any_problem(self.accelerator, partial(self._load, path), self.folder)
            if problem is None:
                self.newest = int(path.name)
                state = read_state(path)
                if self.accelerator.is_main_process:
                    self._remove_old()  # where the process was killed before it came to that
                return state
            if self.accelerator.is_main_process:
                logger.warning("checkpoint %s cannot be used, an older one is looked for: %s", path, problem)
        if candidates:
            raise TrainingError(
                f"none of the checkpoints in {str(self.folder)!r} can be used; delete the folder to start from the "
                "beginning."
            )
        return None

    @property
    def fixed_settings(self) -> dict[str, str]:
        """Return what a run keeps to beside its config: how weights are divided, the precision that `auto` became."""
        divided = self.accelerator.distributed_type == DistributedType.FSDP
        return {"distributed": "FSDP" if divided else "DDP", "mixed_precision": self.accelerator.mixed_precision}

    def _refuse_another_run(self, path: Path) -> None:
        """Collective: refused on all processes, before one of them waits for the others while it loads."""

        def difference() -> str | None:
            now = self.fixed_settings
            then = {**now, **read_state(path)}
            if then["distributed"] != now["distributed"]:
                return f"was written under {then['distributed']}, this start is under {now['distributed']}"
            if then["mixed_precision"] != now["mixed_precision"]:
                return (
                    f"was trained with mixed_precision={then['mixed_precision']}, this start has "
                    f"{now['mixed_precision']}: give --mixed_precision {then['mixed_precision']}"
                )
            return another_origin(then.get("made_from"), self.provenance)

        found = any_problem(self.accelerator, difference, self.folder, main_only=True)
        if found is not None:
            raise ConfigError(f"checkpoint {str(path)!r} {found}. A run keeps to one of them.")

    def _load(self, path: Path) -> str | None:
        """Load a checkpoint; returns in words what is wrong inside of it.

        Raises:
            TrainingError: The same, under FSDP. Loading is a collective there, in which the others wait for a process
                that has failed: it ends at once, and the launcher ends them.
        """
        try:
            read_state(path)  # which Accelerate does not look at
            self.accelerator.load_state(str(path))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # damage inside of a file shows in many kinds of errors
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if self.accelerator.distributed_type == DistributedType.FSDP:
                raise TrainingError(
                    f"checkpoint {str(path)!r} cannot be loaded ({reason}); if it is damaged, delete it, and the same "
                    "command goes on from the one before."
                ) from error
            if isinstance(error, OSError):
                raise
            return reason
        return None

    # Saving ----------------------------------------------------------------------------------------------------------

    def save(self, images: int, state: dict) -> None:
        """Write a checkpoint beside its place, rename it, and then remove older ones. Collective.

        Args:
            images: Images seen; its name.
            state: What its `run.json` holds, besides that number, the `fixed_settings` and the sizes of all files.

        Raises:
            TrainingError: The disk is full or refuses something else, on any process. What was there is as it was.
        """
        partial = self.folder / f"{images:09d}.partial"

        def write(save: Callable[[], object], **options) -> None:
            remove = lambda: shutil.rmtree(partial, ignore_errors=True)  # noqa: E731
            write_or_stop_all(self.accelerator, f"checkpoint {images}", self.folder, save, remove, **options)

        write(lambda: self.accelerator.save_state(str(partial)))
        write(lambda: self._complete(partial, images, state), main_only=True)
        self.newest = images
        if self.accelerator.is_main_process:
            self._remove_old()

    def _complete(self, partial: Path, images: int, state: dict) -> None:
        files = {path.relative_to(partial).as_posix(): path.stat().st_size for path in _files(partial)}
        described = {
            "images_seen": images,
            **self.fixed_settings,
            "made_from": self.provenance,
            **state,
            "files": files,
        }
        (partial / RUN_FILE).write_text(json.dumps(described))
        # The files reach the disk before the name does: after a power cut, too, what has the name is complete.
        for path in [*_files(partial), *(path for path in partial.rglob("*") if path.is_dir()), partial]:
            _to_disk(path)
        final = self.folder / f"{images:09d}"
        if final.is_dir():  # one that could not be used
            shutil.rmtree(final)
        os.replace(partial, final)
        _to_disk(self.folder)

    def _remove_old(self) -> None:
        """Newer ones than `newest` could not be used when the run was resumed: they are not counted."""
        paths = [path for path in checkpoints_in(self.folder) if int(path.name) <= self.newest]
        for path in paths[: -self.keep_last]:
            if self.keep_every_images is None or not passes(int(path.name), self.batch_size, self.keep_every_images):
                shutil.rmtree(path)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints under their final names, oldest first."""
    complete = [path for path in folder.glob("*") if path.name.isdigit()]
    return sorted(complete, key=lambda path: int(path.name))


def passes(images: int, batch_size: int, interval: int) -> bool:
    """Whether the optimizer step that ended at `images` reached or passed a multiple of `interval`."""
    return images // interval > (images - batch_size) // interval


def read_state(checkpoint: Path) -> dict:
    """Return the `run.json` of a checkpoint."""
    return json.loads((checkpoint / RUN_FILE).read_text())


def problem_of(checkpoint: Path) -> str | None:
    """Return what is missing from a checkpoint, in words; None if nothing is."""
    try:
        files = read_state(checkpoint)["files"]
    except FileNotFoundError:
        return f"it has no {RUN_FILE}"
    except (ValueError, KeyError, TypeError):
        return f"its {RUN_FILE} is damaged"
    for name, size in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
