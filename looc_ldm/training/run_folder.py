"""The output folder of a run: the settings it was started with, and the result at its end."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from looc_ldm.training.checkpoints import checkpoints_in
from looc_ldm.training.config import RunConfig
from looc_ldm.training.config_parsing import config_text, differences, moves, read_settings, to_dict
from looc_ldm.utils.errors import ConfigError
from looc_ldm.utils.files import replace_text

logger = logging.getLogger(__name__)


class RunFolder:
    """The output folder of one run.

    Args:
        config (`RunConfig`): The settings of the run.
        result (`str`): Name of the folder that the finished model is written to.

    Attributes:
        path, checkpoints, result (`Path`): The folder, that of its checkpoints, and that of the finished model.

    Raises:
        ConfigError: It holds a run with other settings, or cannot be written.
    """

    def __init__(self, config: RunConfig, result: str):
        self.config = config
        self.path = Path(config.output_dir)
        self.checkpoints = self.path / "checkpoints"
        self.result = self.path / result
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".write-test-{os.getpid()}"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to output_dir={str(self.path)!r}: {error.strerror}.") from None
        self._refuse_other_settings()

    @property
    def finished(self) -> bool:
        """Whether the result is there and was trained on as many images as are asked for."""
        file = self.result / "training.json"
        return file.is_file() and json.loads(file.read_text())["images_seen"] >= self.config.total_images

    def _stored_settings(self) -> dict:
        """Return the settings of the run in this folder; nothing if there is none."""
        file = self.path / "config.yaml"
        return read_settings(file) if file.is_file() else {}

    def _refuse_other_settings(self) -> None:
        stored = self._stored_settings()
        if stored and (checkpoints_in(self.checkpoints) or self.result.is_dir()):
            changed = differences(stored, to_dict(self.config))
            if changed:
                raise ConfigError(
                    f"output_dir={str(self.path)!r} holds a run with other settings ({'; '.join(changed)}); "
                    "give another output_dir, or delete this one."
                )

    def warn_of_changes(self) -> None:
        """Name in warnings the changes of settings that are allowed and that matter."""
        stored = self._stored_settings()
        for move in moves(stored, to_dict(self.config)) if stored else ():
            logger.warning("what lies elsewhere now has to be the same as before: %s", move)
        before, now = stored.get("total_images"), self.config.total_images
        if before != now and self.config.optimizer.schedule == "cosine":
            logger.warning(
                "total_images was %s and is %s: from here on the learning rate follows another cosine, and the run is "
                "not the one that it would have been with that number from the start",
                before,
                now,
            )

    def write_settings(self) -> None:
        """Write the settings of this start as `config.yaml`."""
        replace_text(self.path / "config.yaml", config_text(self.config))

    @contextmanager
    def writing_result(self) -> Iterator[Path]:
        """Yield a folder to write the finished model to, and rename it into its place. Main process only."""
        partial = self.result.with_name(self.result.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        usual = (partial / "training.json").stat().st_mode
        for file in partial.rglob("*.safetensors"):
            file.chmod(usual)  # safetensors 0.8 keeps what it writes from other users
        shutil.rmtree(self.result, ignore_errors=True)
        os.replace(partial, self.result)
