"""A folder of checkpoints: written beside and renamed, checked before they are used, the older ones removed.

    000123000/           complete: everything that its `run.json` lists is there, with the SHA-256 that it states
    000124000.partial/   being written, or left over from a process that was killed meanwhile

Nothing of a checkpoint is unpickled but by `torch.load(weights_only=True)`. Methods marked *collective* must be called
by every process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors.torch import load_file, save_file

from looc_ldm.training.config import RunConfig
from looc_ldm.training.ema import EMA
from looc_ldm.training.latent_fingerprint import provenance_mismatch
from looc_ldm.utils.distributed import any_problem, write_or_stop_all
from looc_ldm.utils.errors import ConfigError, TrainingError
from looc_ldm.utils.files import replace_folder

logger = logging.getLogger(__name__)

RUN_FILE, EMA_FILE = "run.json", "ema.safetensors"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder (`Path`): Where they are, seen by all processes.
        accelerator (`Accelerator`): Saves and loads what was prepared by it.
        config (`RunConfig`): Says which of them are kept.

    Attributes:
        ema (`EMA`, *optional*): Averaged weights, saved and loaded with the rest.
        newest (`int`, *optional*): Images of the one that was loaded or saved last.
        provenance (`dict`, *optional*): What the run depends on beside its settings, written with each checkpoint; see
            `looc_ldm.training.latent_fingerprint.run_fingerprint`.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, config: RunConfig):
        self.folder = folder
        self.accelerator = accelerator
        self.config = config
        self.ema: EMA | None = None
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
            for path in self.folder.glob("*.partial/"):  # of processes that were killed
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
                if self.accelerator.is_main_process:
                    self._remove_old()  # where the process was killed before it came to that
                return read_state(path)
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
            now, then = self.fixed_settings, read_state(path)
            if then["distributed"] != now["distributed"]:
                return f"was written under {then['distributed']}, this start is under {now['distributed']}"
            if then["mixed_precision"] != now["mixed_precision"]:
                return (
                    f"was trained with mixed_precision={then['mixed_precision']}, this start has "
                    f"{now['mixed_precision']}: give --mixed_precision {then['mixed_precision']}"
                )
            return provenance_mismatch(then["made_from"], self.provenance)

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
            if self.ema is not None:
                self.ema.load_state_dict(load_file(path / EMA_FILE))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # weights of other names or shapes show in many kinds of errors
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
            state: What its `run.json` holds, besides that number, the `fixed_settings` and the list of files.

        Raises:
            TrainingError: The disk is full or refuses something else, on any process. What was there is as it was.
        """
        partial = self.folder / f"{images:09d}.partial"

        def save() -> None:
            self.accelerator.save_state(str(partial))
            if self.ema is not None:
                averages = self.ema.state_dict()  # a collective under FSDP
                if self.accelerator.is_main_process:
                    save_file(averages, partial / EMA_FILE)

        def complete() -> None:
            files = {str(file.relative_to(partial)): _size_and_digest(file) for file in _files(partial)}
            own = {"images_seen": images, **self.fixed_settings, "made_from": self.provenance, "files": files}
            write_state(partial, own | state)
            replace_folder(partial, self.folder / f"{images:09d}")  # instead of one that could not be used

        remove = lambda: shutil.rmtree(partial, ignore_errors=True)  # noqa: E731
        write_or_stop_all(self.accelerator, f"checkpoint {images}", self.folder, save, remove)
        write_or_stop_all(self.accelerator, f"checkpoint {images}", self.folder, complete, remove, main_only=True)
        self.newest = images
        if self.accelerator.is_main_process:
            self._remove_old()

    def _remove_old(self) -> None:
        """Newer ones than `newest` could not be used when the run was resumed: they are not counted."""
        paths = [path for path in checkpoints_in(self.folder) if int(path.name) <= self.newest]
        for path in paths[: -self.config.keep_last]:
            every = self.config.keep_every_images
            if every is None or not passes(int(path.name), self.config.batch_size, every):
                shutil.rmtree(path)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints under their final names, oldest first."""
    complete = [path for path in folder.glob("*/") if path.name.isdigit()]
    return sorted(complete, key=lambda path: int(path.name))


def passes(images: int, batch_size: int, interval: int) -> bool:
    """Whether the optimizer step that ended at `images` reached or passed a multiple of `interval`."""
    return images // interval > (images - batch_size) // interval


def write_state(checkpoint: Path, state: dict) -> None:
    """Write the `run.json` of a checkpoint, with a digest of itself."""
    state = json.loads(json.dumps(state))  # as it is read
    (checkpoint / RUN_FILE).write_text(json.dumps({"sha256": _digest(state), **state}))


def read_state(checkpoint: Path) -> dict:
    """Return the `run.json` of a checkpoint. Raises ValueError if it is damaged or of an earlier version."""
    state = json.loads((checkpoint / RUN_FILE).read_bytes())
    if not isinstance(state, dict) or state.pop("sha256", None) != _digest(state):
        raise ValueError(f"{RUN_FILE} does not have the SHA-256 that it states")
    return state


def problem_of(checkpoint: Path) -> str | None:
    """Return what is missing or damaged in a checkpoint, in words; None if nothing is."""
    try:
        files = read_state(checkpoint)["files"]
    except FileNotFoundError:
        return f"it has no {RUN_FILE}"
    except ValueError:
        return f"its {RUN_FILE} is damaged, or of an earlier version"
    for name, (size, digest) in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _size_and_digest(file)[1] != digest:
            return f"{name} is damaged: its SHA-256 is another one"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _size_and_digest(file: Path) -> tuple[int, str]:
    with file.open("rb") as stream:
        return file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()
