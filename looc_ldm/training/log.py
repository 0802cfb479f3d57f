"""The log of a run: one line per log interval for people, in `metrics.jsonl` and in the tracker; image grids."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from looc_ldm.training.config import RunConfig
from looc_ldm.training.config_parsing import to_dict
from looc_ldm.training.jsonl import append_line, cut_lines, has_figures
from looc_ldm.training.means import Means, means_of
from looc_ldm.utils.distributed import write_or_stop_all
from looc_ldm.utils.errors import TrainingError, is_first_process
from looc_ldm.utils.files import replace_text, write_image

logger = logging.getLogger(__name__)

# What depends on the machine and the moment, and so is not the same in a run that was interrupted.
VOLATILE_KEYS = ("images_per_second", "data_wait", "other_seconds", "memory_gib")


def show_log_lines() -> None:
    """Show the log of training on stderr. Of several processes only the first one shows more than warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    if is_first_process():
        logging.getLogger("looc_ldm").setLevel(logging.INFO)


class RunLog:
    """Scalars, speed, log lines and image grids of a run.

    Args:
        config (`RunConfig`): The settings of the run.
        folder (`Path`): The folder of the run.
        accelerator (`Accelerator`): The processes and their trackers.

    Attributes:
        means (`Means`): Scalars recorded since the last line.
        bar (`tqdm`, *optional*): The progress bar, over images.
    """

    def __init__(self, config: RunConfig, folder: Path, accelerator: Accelerator):
        self.config = config
        self.folder = folder
        self.file = folder / "metrics.jsonl"
        self.accelerator = accelerator
        self.means = Means(accelerator.device)
        self.bar: tqdm | None = None
        self._written_at = (0, time.monotonic())  # images seen, and when
        # Since the last line, of this process, in seconds:
        self._waited = 0.0  # for data, while training
        self._other = 0.0  # anything but training
        self._paused = False  # whether that goes on now

    def start(self, images_seen: int, means: list[dict] | None) -> None:
        """Go on after `images_seen` images, with what was recorded since the last line. On every process."""
        if self.accelerator.is_main_process:
            cut_lines(self.file, images_seen)
        self.means.reset(means)
        self._start_tracker(images_seen)
        self._written_at = (images_seen, time.monotonic())

    def _start_tracker(self, images_seen: int) -> None:
        if self.config.tracker == "tensorboard":
            # It hides what was logged after the checkpoint.
            self.accelerator.init_trackers("logs", init_kwargs={"tensorboard": {"purge_step": images_seen + 1}})
        elif self.config.tracker == "wandb":
            settings = {}
            if self.accelerator.is_main_process:
                id_file = self.folder / "wandb_id.txt"  # the same run again after an interruption
                if not id_file.is_file():
                    replace_text(id_file, uuid.uuid4().hex[:8] + "\n")
                settings = {
                    "id": id_file.read_text().strip(),
                    "resume": "allow",
                    "name": self.folder.resolve().name,
                    "dir": str(self.folder),
                    "config": to_dict(self.config),
                }
            self.accelerator.init_trackers("looc-ldm", init_kwargs={"wandb": settings})

    # Time ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def progress_bar(self, description: str, images_seen: int) -> Iterator[None]:
        """Show a bar over images, on the main process if stderr is a terminal. Log lines are written above it."""
        self.bar = tqdm(
            total=self.config.total_images,
            initial=images_seen,
            desc=description,
            unit="img",
            unit_scale=True,
            mininterval=0.5,
            disable=None if self.accelerator.is_main_process else True,  # None: unless it is a terminal
        )
        with self.bar, nullcontext() if self.bar.disable else logging_redirect_tqdm():
            yield

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Measure the time that training waits for its data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextmanager
    def pause_timer(self) -> Iterator[None]:
        """Exclude a block that is no training, such as a grid or an evaluation, from speed and waiting."""
        if self._paused:  # within another block
            yield
            return
        began, self._paused = time.monotonic(), True
        try:
            yield
        finally:
            self._other += time.monotonic() - began
            self._paused = False

    def exclude_first_step(self, images_seen: int) -> None:
        """Exclude the first step from images/s: it also starts workers, compiles and picks kernels.

        Not if a line was written after that step.
        """
        if self._written_at[0] != images_seen:
            then = self._written_at[1]
            self._written_at = (images_seen, then)
            self._waited, self._other = 0.0, time.monotonic() - then

    # Lines -----------------------------------------------------------------------------------------------------------

    def write(self, images_seen: int, **extra: float) -> None:
        """Write a line: the means since the last one, over all processes. Collective; waits for the device.

        Speed and waiting are those of training alone, without the first step after a start if the line has another;
        the rest is `other_seconds`.
        """
        images, then = self._written_at
        now = time.monotonic()
        self._written_at = (images_seen, now)
        trained = now - then - self._other
        memory = memory_gib(self.accelerator.device)
        parts = gather_object([(self.means.state(), trained, self._waited, self._other, memory)])
        self.means.reset()
        self._waited = self._other = 0.0
        states, trained, waits, others, memory = zip(*parts, strict=True)
        seconds = min(trained)  # others take it for training when they wait for the main process and its evaluation
        means = means_of(states)
        values = {
            "images_per_second": (images_seen - images) / seconds,
            "data_wait": min(1.0, max(waits) / seconds),  # the slowest process holds up the others
            "other_seconds": max(others),
            "memory_gib": max(memory),
            **means,
            **extra,
        }
        append = partial(self._append, images_seen, values)
        write_or_stop_all(self.accelerator, "the log", self.folder, append, main_only=True)
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in means.items() if name.startswith("loss")})

    def write_evaluation(self, images_seen: int, figures: dict) -> None:
        """Write figures of an evaluation, with the prefix `val_`. Does nothing on other processes than the main one."""
        if self.accelerator.is_main_process:
            try:
                self._append(images_seen, {f"val_{name}": value for name, value in figures.items()})
            except OSError as error:
                raise TrainingError(f"cannot write the log in {str(self.folder)!r}: {error.strerror}.") from error

    def _append(self, images_seen: int, values: dict) -> None:
        # JSON and trackers have no place for NaN.
        line = {key: value for key, value in values.items() if not isinstance(value, float) or math.isfinite(value)}
        self.accelerator.log(line, step=images_seen)
        append_line(self.file, {"images": images_seen, **line})
        logger.info(progress_line(images_seen, self.config.total_images, line))

    # Grids -----------------------------------------------------------------------------------------------------------

    def preview_file(self, images_seen: int) -> Path:
        """Return the file of the image grid after `images_seen` images."""
        return self.folder / "previews" / f"{images_seen:09d}.png"

    def write_preview(self, images_seen: int, image: Image.Image) -> None:
        """Write an image grid and hand it to the tracker. Main process only."""
        file = self.preview_file(images_seen)
        file.parent.mkdir(exist_ok=True)
        write_image(image, file)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                pixels = np.asarray(image.convert("RGB"))[None]
                tracker.log_images({"preview": pixels}, step=images_seen, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"preview": [image]}, step=images_seen)

    def has_evaluation(self, images_seen: int) -> bool:
        """Whether the log holds figures of an evaluation after `images_seen` images."""
        return has_figures(self.file, images_seen, "val_")


def memory_gib(device: torch.device) -> float:
    """Return this process's peak memory on its GPU so far, or its present memory on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def progress_line(images: int, total: int, values: dict) -> str:
    """Return one line for people with what a line of `metrics.jsonl` holds."""
    known = (
        ("images_per_second", lambda value: f"{value:.4g} images/s"),
        ("data_wait", lambda value: f"data wait {value:.1%}"),
        ("other_seconds", lambda value: f"besides {value:.0f} s" if value >= 1 else ""),
        ("memory_gib", lambda value: f"{value:.1f} GiB"),
        ("learning_rate", lambda value: f"learning rate {value:.3g}"),
    )
    parts = [f"{images:,}/{total:,} images"]
    parts += [text(values[name]) for name, text in known if name in values]
    shown = {name: value for name, value in values.items() if name not in dict(known)}
    if not shown.get("skipped_steps"):
        shown.pop("skipped_steps", None)
    words = {name: value if isinstance(value, str) else f"{value:.4g}" for name, value in shown.items()}
    return ", ".join([part for part in parts if part] + [f"{name} {word}" for name, word in words.items()])


def data_line(images, held_out, classes: list[str], model: torch.nn.Module) -> str:
    """Return one line on what a run trains, and on which data."""
    count = f"{images.num_shards} shards of images" if hasattr(images, "num_shards") else f"{len(images):,} images"
    return (
        f"{count}, {len(held_out):,} held out, {len(classes) or 'no'} classes; "
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.3g} M parameters"
    )
