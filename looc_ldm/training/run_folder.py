"""The output folder of a run: the settings it was started with, and the result at its end."""

from __future__ import annotations

import fcntl
import logging
import os
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from looc_ldm.training.checkpoints import checkpoints_in
from looc_ldm.training.config import RunConfig
from looc_ldm.training.config_parsing import config_text, flatten, read_settings, to_dict
from looc_ldm.utils.errors import ConfigError
from looc_ldm.utils.files import check_folder, folder_when_complete, read_json, replace_text

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
# Settings that may change when a run is resumed.
RESUMABLE = {
    # Length and reports
    *("total_images", "log_every_images", "preview_every_images", "checkpoint_every_images", "keep_last"),
    *("keep_every_images", "max_skipped_steps", "push_to_hub", "push_private", "tracker", "data.num_workers"),
    *("data.max_unreadable_share", "evaluation.every_images", "evaluation.images", "evaluation.fid"),
    *("evaluation.inception_weights", "evaluation.feature_layer", "preview_steps", "preview_guidance_scale"),
    # These only change the last bits of sums
    *("threads", "channels_last"),
    # Compared by content elsewhere: `auto` may be replaced by the precision it resolved to, and files may have moved
    *("mixed_precision", "output_dir", "latents", "data.path", "autoencoder", "loss.lpips_weights"),
}


class RunFolder:
    """The output folder of one run.

    Args:
        result (`str`): Name of the folder that the finished model is written to.

    Attributes:
        path (`Path`): The output folder.
        checkpoints (`Path`): Folder of the checkpoints.
        result (`Path`): Folder of the finished model.
        upload (`Path`): Folder of the model that is being uploaded.

    Raises:
        ConfigError: The folder holds a run with different settings, or cannot be written.
    """

    def __init__(self, config: RunConfig, result: str):
        self.config = config
        self.path = Path(config.output_dir)
        self.checkpoints = self.path / "checkpoints"
        self.result = self.path / result
        self.upload = self.path / "upload.partial"
        for folder in (self.checkpoints, self.path / "previews", self.result):
            check_folder(folder)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"cannot write to output_dir={str(self.path)!r}: {error.strerror}.") from None
        file = self.path / "config.yaml"
        self._stored = read_settings(file) if file.is_file() else {}
        if self._stored and (checkpoints_in(self.checkpoints) or self.result.is_dir()):
            changed = differences(self._stored, to_dict(config))
            if changed:
                raise ConfigError(
                    f"output_dir={str(self.path)!r} holds a run with other settings ({'; '.join(changed)}); "
                    "give another output_dir, or delete this one. A new output_dir starts from the weights of this one "
                    f"with --init-from {shlex.quote(str(self.path))}"
                )

    def lock(self) -> None:
        """Keep other runs out of the folder until this object or the process ends. Main process only.

        Raises:
            ConfigError: A different process has locked it. The message names it.
        """
        try:
            # Not flock: the loader's workers would inherit it, and keep it for seconds when this process is killed.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # it depends on the system which
            self._lock.seek(0)
            raise ConfigError(
                f"output_dir={str(self.path)!r} is in use by {self._lock.read().strip()}: wait for it, stop it, "
                "or give another output_dir."
            ) from None
        except OSError as error:  # some clusters' file systems have no locks
            logger.warning("%s cannot be locked (%s): start no other run in it", self.path, error.strerror)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    @property
    def finished(self) -> bool:
        """Whether the result exists and was trained on `total_images` images."""
        file = self.result / "training.json"
        if not file.is_file():
            return False
        images = read_json(file).get("images_seen")
        if not isinstance(images, int):
            raise ConfigError(f"{str(file)!r} is damaged: delete its folder, and the same command writes it again.")
        return images >= self.config.total_images

    def warn_of_changes(self) -> None:
        """Warn if the number of images has changed and the learning rate depends on it."""
        before, now = self._stored.get("total_images"), self.config.total_images
        if before != now and self.config.optimizer.schedule == "cosine":
            logger.warning("total_images was %s and is %s: the learning rate follows a different cosine", before, now)

    def write_settings(self) -> None:
        """Write the settings of this start as `config.yaml`."""
        replace_text(self.path / "config.yaml", config_text(self.config))

    @contextmanager
    def writing_result(self) -> Iterator[Path]:
        """Yield a folder to write the finished model to, and rename it into its place. Main process only."""
        with folder_when_complete(self.result) as partial:
            yield partial
            usual = (partial / "training.json").stat().st_mode
            for file in partial.rglob("*.safetensors"):
                file.chmod(usual)  # safetensors 0.8 keeps what it writes from other users


def differences(old: dict, new: dict) -> list[str]:
    """Return the changed settings that may not change when a run is resumed, each as `name: old -> new`."""
    old, new = flatten(old), flatten(new)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name) and name not in RESUMABLE]
    return [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names]
