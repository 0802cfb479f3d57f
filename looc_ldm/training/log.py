"""Write the log of a run: one line per log interval to `metrics.jsonl` and the tracker, one every 30 s to stderr."""

from __future__ import annotations

import json
import logging
import math
import sys
import textwrap
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from looc_ldm.training.config import RunConfig
from looc_ldm.training.config_parsing import to_dict
from looc_ldm.utils.distributed import writing
from looc_ldm.utils.errors import is_first_process
from looc_ldm.utils.files import replace_bytes, replace_text, write_image

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 30  # between two lines on stderr; the first comes sooner
FIRST_PROGRESS_SECONDS = 10
FIRST_PREVIEW_SECONDS = 45
# These depend on the machine and the time, so an interrupted and resumed run has different ones.
VOLATILE_KEYS = ("images_per_second", "data_wait", "other_seconds", "memory_gib")


def show_log_lines() -> None:
    """Show the log of training on stderr. Processes other than the first show only warnings and errors."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    if is_first_process():
        logging.getLogger("looc_ldm").setLevel(logging.INFO)


class _LogLines:
    """A stream whose lines go to the log."""

    def write(self, text: str) -> None:
        if text.strip():
            logger.info(text.strip())

    def flush(self) -> None: ...


def progress(items: Iterable, description: str, unit: str = "batch", shown: bool = True) -> tqdm:
    """Return the items behind a bar on terminals, and elsewhere with a log line every 30 s that has the time left."""
    if not shown or sys.stderr.isatty():
        return tqdm(items, description, unit=unit, mininterval=1, disable=not shown)
    seconds = dict.fromkeys(("mininterval", "maxinterval", "delay"), PROGRESS_SECONDS)
    bar_format = "{desc}: {n_fmt}/{total_fmt}, {remaining} left"
    return tqdm(items, description, unit=unit, file=_LogLines(), bar_format=bar_format, **seconds)


class Means:
    """Means of scalars that are recorded at every step. Values that are not finite are left out.

    Sums stay on the device, so that recording does not wait for it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._sums: dict[str, torch.Tensor] = {}  # sum and count, float32 (2,)
        self._latest: dict[str, torch.Tensor] = {}

    def record(self, **values: torch.Tensor | float) -> None:
        """Add the scalars of one forward pass."""
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach().reshape(())
            finite = value.isfinite()
            added = torch.stack([torch.where(finite, value, 0), finite.float()])
            self._sums[name] = self._sums[name] + added if name in self._sums else added
            self._latest[name] = value

    def not_finite(self) -> list[str]:
        """Return the names of the scalars whose latest value is not finite. Waits for the device."""
        return [name for name, value in self._latest.items() if not math.isfinite(value)]

    def state(self) -> dict[str, list[float]]:
        """Return sum and count of what was recorded since the last `reset`. Waits for the device."""
        return {name: sums.tolist() for name, sums in self._sums.items()}

    def reset(self, state: dict[str, list[float]] | None = None) -> None:
        """Clear the recorded sums, or restore them from a `state`."""
        self._sums = {name: torch.tensor(sums, device=self.device) for name, sums in (state or {}).items()}


def means_of(states: list[dict[str, list[float]]]) -> dict[str, float]:
    """Return the means over the `Means.state` of all processes. Scalars that were never finite are left out."""
    means = {}
    for name in dict.fromkeys(name for state in states for name in state):
        total, count = map(sum, zip(*(state[name] for state in states if name in state), strict=True))
        if count:
            means[name] = total / count
    return means


class RunLog:
    """Scalars, speed, log lines and image grids of a run.

    Attributes:
        means (`Means`): Scalars recorded since the last line.
        waited (`float`): Seconds that training has waited for data since the last line.
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
        self._started_at = self._shown_at = self._written_at
        self._next_progress = math.inf  # until the first step, which says nothing about the speed, is over
        self._means: dict[str, float] = {}  # in the last line
        # Since the last line, of this process, in seconds:
        self.waited = 0.0  # for data, while training
        self._other = 0.0  # seconds of anything but training since the last line
        self._paused = 0.0  # the same, of the whole run

    def start(self, images_seen: int, means: dict | None) -> None:
        """Start or resume at `images_seen` images, with the scalars recorded since the last line. On every process."""
        if self.accelerator.is_main_process:
            cut_lines(self.file, images_seen)
        self.means.reset(means)
        self._start_tracker(images_seen)
        self._written_at = self._started_at = (images_seen, time.monotonic())

    def _start_tracker(self, images_seen: int) -> None:
        if self.config.tracker == "tensorboard":
            # It hides values logged after the checkpoint.
            self.accelerator.init_trackers("logs", init_kwargs={"tensorboard": {"purge_step": images_seen + 1}})
        elif self.config.tracker == "wandb":
            settings = {}
            if self.accelerator.is_main_process:
                id_file = self.folder / "wandb_id.txt"  # so that W&B resumes the same run after an interruption
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
            disable=None if self.accelerator.is_main_process else True,  # None: hidden unless on a terminal
        )
        with self.bar, nullcontext() if self.bar.disable else logging_redirect_tqdm():
            yield

    @contextmanager
    def pause_timer(self) -> Iterator[None]:
        """Exclude a block that is not training, such as a grid or an evaluation, from speed and waiting time."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self._other += seconds
        self._paused += seconds

    def training_clock(self) -> float:
        """Return seconds that do not pass while the timer is paused."""
        return time.monotonic() - self._paused

    def exclude_first_step(self, images_seen: int) -> None:
        """Exclude the first step from images/s: it also starts workers, compiles and picks kernels."""
        if self._written_at[0] != images_seen:  # the log line of this step is already written
            then = self._written_at[1]
            self._written_at = (images_seen, then)
            self.waited, self._other = 0.0, time.monotonic() - then
        self._started_at = self._shown_at = (images_seen, time.monotonic())
        self._next_progress = time.monotonic() + FIRST_PROGRESS_SECONDS

    def show_progress(self, images_seen: int) -> None:
        """Print progress, speed and remaining time to stderr every 30 s. Main process only."""
        now = time.monotonic()
        if now < self._next_progress or not self.accelerator.is_main_process:
            return
        self._next_progress = now + PROGRESS_SECONDS
        (first, started), (before, then), total = self._started_at, self._shown_at, self.config.total_images
        self._shown_at = (images_seen, now)
        minutes = (total - images_seen) * (now - started) / (images_seen - first) / 60
        parts = [
            f"{images_seen:,}/{total:,} images",
            f"{(images_seen - before) / (now - then):.4g} images/s",
            f"{minutes:.1f} min left" if minutes < 90 else f"{minutes / 60:.1f} h left",
        ]
        parts += [f"{name} {value:.4g}" for name, value in self._means.items()]
        logger.info(", ".join(parts))

    # Lines -----------------------------------------------------------------------------------------------------------

    def write(self, images_seen: int, **extra: float) -> None:
        """Write a line: the means since the last line, over all processes. Collective; waits for the device.

        Speed and waiting time cover training only. They exclude the first step after a start, unless it is the only
        step of the line. `other_seconds` is the remaining time.
        """
        images, then = self._written_at
        now = time.monotonic()
        self._written_at = (images_seen, now)
        trained = now - then - self._other
        device = self.accelerator.device
        on_gpu = device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
        parts = gather_object([(self.means.state(), trained, self.waited, self._other, memory)])
        self.means.reset()
        self.waited = self._other = 0.0
        states, trained, waits, others, memory = zip(*parts, strict=True)
        seconds = min(trained)  # other processes also count the time they wait while the main process evaluates
        means = means_of(states)
        values = {
            "images_per_second": (images_seen - images) / seconds,
            "data_wait": min(1.0, max(waits) / seconds),  # the slowest process holds up the others
            "other_seconds": max(others),
            "memory_gib": max(memory) / 2**30,  # peak on a GPU, current on a CPU
            **means,
            **extra,
        }
        if self.accelerator.is_main_process:
            self._append(images_seen, values)
        self._means = means
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in means.items() if name.startswith("loss")})

    def write_evaluation(self, images_seen: int, figures: dict) -> None:
        """Write the figures of an evaluation, with the prefix `val_`. Does nothing except on the main process."""
        if self.accelerator.is_main_process:
            line = {f"val_{name}": value for name, value in figures.items()}
            self._append(images_seen, line)
            words = [f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in line.items()]
            logger.info(", ".join([f"after {images_seen:,} images", *words]))

    def _append(self, images_seen: int, values: dict) -> None:
        # JSON and trackers cannot store NaN.
        line = {key: value for key, value in values.items() if not isinstance(value, float) or math.isfinite(value)}
        self.accelerator.log(line, step=images_seen)
        with writing("the log", self.folder), self.file.open("a") as file:
            file.write(json.dumps({"images": images_seen, **line}, allow_nan=False) + "\n")

    # Grids -----------------------------------------------------------------------------------------------------------

    def first_preview_due(self) -> bool:
        """Whether training has run for 45 s and the run's folder has no image grid yet."""
        waited = time.monotonic() - self._started_at[1] > FIRST_PREVIEW_SECONDS
        return waited and not any((self.folder / "previews").glob("*.png"))

    def write_preview(self, images_seen: int, image: Image.Image, caption: str) -> None:
        """Write an image grid with its caption and hand it to the tracker. Main process only."""
        file = self.folder / "previews" / f"{images_seen:09d}.png"
        file.parent.mkdir(exist_ok=True)
        image = with_caption(image, caption)
        write_image(image, file)
        logger.info("image grid: %s", file)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                pixels = np.asarray(image.convert("RGB"))[None]
                tracker.log_images({"preview": pixels}, step=images_seen, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"preview": [image]}, step=images_seen)


def with_caption(image: Image.Image, text: str) -> Image.Image:
    """Return an RGB image with small text below it."""
    font = ImageFont.load_default(max(11, image.width // 60))
    characters = int(image.width / font.getlength("n"))
    text = "\n".join(textwrap.wrap(text, characters))
    _, _, _, bottom = ImageDraw.Draw(image).multiline_textbbox((2, image.height + 2), text, font)
    captioned = Image.new("RGB", (image.width, int(bottom) + 4), "white")
    captioned.paste(image)
    ImageDraw.Draw(captioned).multiline_text((2, image.height + 2), text, "black", font)
    return captioned


def cut_lines(file: Path, images: int) -> None:
    """Remove the lines after `images` images, and an incomplete last line of a killed process."""
    content = file.read_bytes() if file.is_file() else b""
    kept = []
    for line in content.splitlines(keepends=True):
        with suppress(ValueError):
            if line.endswith(b"\n") and json.loads(line)["images"] <= images:
                kept.append(line)
    if b"".join(kept) != content:
        replace_bytes(file, b"".join(kept))


def data_line(images, held_out, classes: list[str], model: torch.nn.Module) -> str:
    """Return one line that describes the network and the data of a run."""
    count = f"{images.num_shards} shards of images" if hasattr(images, "num_shards") else f"{len(images):,} images"
    return (
        f"{count}, {len(held_out):,} held out, {len(classes) or 'no'} classes; "
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.3g} M parameters"
    )
