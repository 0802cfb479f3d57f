"""A folder of checkpoints. Each is written atomically; older ones are removed.

    000123000/           complete: its files have the sizes and SHA-256 in its `run.json`
    000124000.partial/   being written, or left over from a process that was killed meanwhile

Checkpoints are only unpickled by `torch.load(weights_only=True)`. Methods marked *collective* must be called
by every process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

from looc_ldm.training.config import RunConfig
from looc_ldm.training.ema import EMA
from looc_ldm.training.latent_fingerprint import provenance_mismatch
from looc_ldm.utils.distributed import on_main, writing
from looc_ldm.utils.errors import ConfigError, TrainingError, UserError, one_line
from looc_ldm.utils.files import read_json, replace_folder

logger = logging.getLogger(__name__)

RUN_FILE, EMA_FILE = "run.json", "ema.safetensors"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder (`Path`): Their folder, seen by all processes.

    Attributes:
        ema (`EMA`, *optional*): Averaged weights, saved and loaded with the rest.
        newest (`int`, *optional*): Images of the one that was loaded or saved last.
        provenance (`dict`, *optional*): All that the run depends on besides settings, written with each checkpoint; see
            `looc_ldm.training.latent_fingerprint.run_fingerprint`.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, config: RunConfig):
        self.folder = folder
        self.accelerator = accelerator
        self.config = config
        self.ema: EMA | None = None
        self.newest: int | None = None
        self.provenance: dict[str, dict] | None = None

    def load_newest(self, before_load: Callable[[int], None]) -> dict | None:
        """Load the newest checkpoint that is not damaged. Collective.

        Args:
            before_load: Called with the images of the checkpoint before it is loaded. What it seeds remains on a
                process that was not there when the checkpoint was written, and so has no random state in it.

        Returns:
            `dict`, *optional*: The content of `run.json`; None if there are no checkpoints.

        Raises:
            ConfigError: The run that wrote the checkpoint had different `fixed_settings` or `provenance`.
            TrainingError: The checkpoint cannot be loaded, or all checkpoints are damaged.
        """
        if self.accelerator.is_main_process:
            for left_over in self.folder.glob("*.partial/"):
                shutil.rmtree(left_over)
        path, state = on_main(self.accelerator, self._find_newest)
        if path is None:
            return None
        before_load(images_of(path))
        try:
            self.accelerator.load_state(str(path))
            if self.ema is not None:
                self.ema.load_state_dict(load_file(path / EMA_FILE))
                self.ema.earlier_images = state.get("earlier_images", 0)
        except Exception as error:  # weights of other names or shapes show in many kinds of errors
            raise TrainingError(f"checkpoint {str(path)!r} cannot be loaded: {one_line(error)[:300]}.") from error
        self.newest = images_of(path)
        if self.accelerator.is_main_process:
            self._remove_old()  # if the process was killed before it came to that
        return state

    @property
    def fixed_settings(self) -> dict[str, str]:
        """Return settings that a run must keep besides its config: sharding, and the precision `auto` resolved to."""
        divided = self.accelerator.distributed_type == DistributedType.FSDP
        return {"distributed": "FSDP" if divided else "DDP", "mixed_precision": self.accelerator.mixed_precision}

    def _find_newest(self) -> tuple[Path, dict] | tuple[None, None]:
        """Return the newest checkpoint that is not damaged, and its `run.json`. See `load_newest` for the errors."""
        paths = sorted(checkpoints_in(self.folder), key=images_of, reverse=True)
        for path in paths:
            try:
                state = read_state(path)
            except UserError as error:
                logger.warning("checkpoint %s is damaged, an older one is looked for: %s", path, error)
                continue
            for name, now in self.fixed_settings.items():
                if state[name] != now:
                    raise ConfigError(f"checkpoint '{path}' has {name}={state[name]}, not {now}: resume as before.")
            if mismatch := provenance_mismatch(state["made_from"], self.provenance):
                raise ConfigError(f"checkpoint {str(path)!r} {mismatch}.")
            return path, state
        if paths:
            raise TrainingError(
                f"all checkpoints in {str(self.folder)!r} are damaged: delete the folder to start from the beginning."
            )
        return None, None

    def save(self, images: int, state: dict) -> None:
        """Write a checkpoint atomically, and then remove older ones. Collective.

        Args:
            images: Images seen; its name.
            state: The content of `run.json`, besides that number, the `fixed_settings`, provenance and files.

        Raises:
            TrainingError: The disk is full or another write fails. Older checkpoints are unchanged.
        """
        partial = self.folder / f"{images:09d}.partial"
        try:
            with writing(f"checkpoint {images}", self.folder):
                self.accelerator.save_state(str(partial))
                averages = self.ema.state_dict() if self.ema is not None else None  # a collective under FSDP
                self.accelerator.wait_for_everyone()  # until all have written their random states
                if self.accelerator.is_main_process:
                    if averages is not None:
                        save_file(averages, partial / EMA_FILE)
                        state = {**state, "earlier_images": self.ema.earlier_images}
                    own = {"images_seen": images, **self.fixed_settings, "made_from": self.provenance}
                    write_state(partial, own | state)
                    replace_folder(partial, self.folder / partial.stem)
                    self.newest = images
                    self._remove_old()
        except TrainingError:
            shutil.rmtree(partial, ignore_errors=True)  # makes room again
            raise
        self.newest = images

    def _remove_old(self) -> None:
        # Newer ones than `newest` are damaged and do not count; the run replaces them.
        paths = [path for path in checkpoints_in(self.folder) if images_of(path) <= self.newest]
        for path in sorted(paths, key=images_of)[: -self.config.keep_last]:
            every = self.config.keep_every_images
            if every is None or not passes(images_of(path), self.config.batch_size, every):
                shutil.rmtree(path)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder under their final names."""
    return [path for path in folder.glob("*/") if path.name.isdigit()]


def images_of(checkpoint: Path) -> int:
    """Return the number of images after which a checkpoint was written."""
    return int(checkpoint.name)


def passes(images: int, batch_size: int, interval: int) -> bool:
    """Whether the optimizer step that ended at `images` reached or passed a multiple of `interval`."""
    return images // interval > (images - batch_size) // interval


def write_state(checkpoint: Path, state: dict) -> None:
    """Write `run.json`: the state, size and SHA-256 of every other file, and the SHA-256 of all this."""
    files = [file for file in checkpoint.rglob("*") if file.is_file() and file.name != RUN_FILE]
    state = {**state, "files": {str(file.relative_to(checkpoint)): _fingerprint(file) for file in files}}
    (checkpoint / RUN_FILE).write_text(json.dumps({"sha256": _digest(state), **state}))


def read_state(checkpoint: Path) -> dict:
    """Return the `run.json` of a checkpoint. Raises UserError if anything of the checkpoint is missing or damaged."""
    state = read_json(checkpoint / RUN_FILE)
    if state.pop("sha256", None) != _digest(state):
        raise TrainingError(f"{RUN_FILE} does not have the SHA-256 that it states.")
    for name, fingerprint in state["files"].items():
        file = checkpoint / name
        if not file.is_file() or _fingerprint(file) != fingerprint:
            raise TrainingError(f"{name} is missing, or does not have the size and SHA-256 in {RUN_FILE}.")
    return state


def _fingerprint(file: Path) -> list:
    with file.open("rb") as content:
        return [file.stat().st_size, hashlib.file_digest(content, "sha256").hexdigest()]


def _digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()
