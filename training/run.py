"""What the two training loops share: the output folder, checkpoints, logs, stopping and resuming.

A run is resumed by repeating its command. It owns its output folder:

    config.yaml           the resolved settings
    checkpoints/000123/   Accelerate's state after that many images, renamed into place when complete
    metrics.jsonl         one line a log interval, cut back to the checkpoint on resuming
    previews/000123.png   image grids
    logs/                 the tracker's files
    model/ or pipeline/   the result, written at the end; its training.json says after how many images

Methods marked *collective* must be called by every process.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from tqdm.auto import tqdm

from looc_ldm.errors import ConfigError
from looc_ldm.files import replace_text, write_image
from looc_ldm.training.config import OptimizerConfig, RunConfig, config_text, differences, to_dict


class Run:
    """One training run in its output folder.

    Args:
        config (`RunConfig`): The settings. Refused if the folder holds a run with others.
        result (`str`): Name of the folder the finished model is written to.

    Attributes:
        accelerator (`Accelerator`): Devices, processes, precision, accumulation.
        images_seen (`int`): Progress, in images.

    Raises:
        ConfigError: The folder holds another run's checkpoints, or cannot be written.
    """

    def __init__(self, config: RunConfig, result: str):
        self.config = config
        self.folder = Path(config.output_dir)
        self.result = self.folder / result
        self.images_seen = 0
        self._make_folder()
        self._check_same_config()
        self.accelerator = Accelerator(
            mixed_precision=resolve_precision(config.mixed_precision),
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=None if config.tracker == "none" else config.tracker,
            project_dir=str(self.folder),
            # The other processes wait while the first one measures and writes the result.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
        self._stop_signal: int | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._logged_at = (0, time.monotonic())

    @property
    def finished(self) -> bool:
        """Whether the result is there and was trained on as many images as are asked for."""
        file = self.result / "training.json"
        return file.is_file() and json.loads(file.read_text())["images_seen"] >= self.config.total_images

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one. Collective; after `accelerator.prepare`."""
        self.accelerator.wait_for_everyone()  # all have compared their config with the one that is replaced here
        if self.accelerator.is_main_process:
            replace_text(self.folder / "config.yaml", config_text(self.config))
        # Models are made by now, equal on all processes; dropout and random anchors must not be.
        set_seed(self.config.seed, device_specific=True)
        checkpoints = self._checkpoints()
        if checkpoints:
            newest = checkpoints[-1]
            self.accelerator.load_state(str(newest))
            self.images_seen = int(newest.name)
        if self.accelerator.is_main_process:
            self._cut_log()
        if self.config.tracker != "none":
            # TensorBoard hides what was logged after the checkpoint.
            self.accelerator.init_trackers("logs", init_kwargs={"tensorboard": {"purge_step": self.images_seen + 1}})
        self._logged_at = (self.images_seen, time.monotonic())

    def save_checkpoint(self) -> None:
        """Write the state beside its place, then rename it. Collective."""
        folder = self.folder / "checkpoints"
        final = folder / f"{self.images_seen:09d}"
        if final.is_dir():
            return
        partial = folder / f"{final.name}.partial"
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            os.replace(partial, final)
            for old in self._checkpoints()[: -self.config.keep_last]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _checkpoints(self) -> list[Path]:
        complete = [path for path in (self.folder / "checkpoints").glob("*") if path.name.isdigit()]
        return sorted(complete, key=lambda path: int(path.name))

    # The loop's questions --------------------------------------------------------------------------------------------

    def due(self, interval: int) -> bool:
        """Whether the last optimizer step passed a multiple of `interval` images."""
        return self.images_seen // interval > (self.images_seen - self.config.batch_size) // interval

    def learning_rate(self, optimizer: OptimizerConfig) -> float:
        """The rate for the step that starts now."""
        return learning_rate_at(optimizer, self.images_seen, self.config.total_images)

    @contextmanager
    def stopping_cleanly(self):
        """Turn Ctrl-C and SIGTERM into a checkpoint after the step under way, then KeyboardInterrupt.

        With several processes signals arrive at different steps, so there the default handling stays.
        """
        if self.accelerator.num_processes > 1:
            yield
            return

        def remember(number, frame):
            self._stop_signal = number

        previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def stop_if_asked(self) -> None:
        """Save and raise KeyboardInterrupt if a signal came since the last step."""
        if self._stop_signal is not None:
            self.save_checkpoint()
            raise KeyboardInterrupt(f"stopped at {self.images_seen} images; the same command goes on from there")

    def progress_bar(self, description: str) -> tqdm:
        """A bar over images, on the main process."""
        return tqdm(
            total=self.config.total_images,
            initial=self.images_seen,
            desc=description,
            unit="img",
            unit_scale=True,
            mininterval=0.5,
            disable=not self.accelerator.is_main_process,
        )

    # Logs ------------------------------------------------------------------------------------------------------------

    def record(self, **values: torch.Tensor | float) -> None:
        """Add scalars of one forward pass to the next log line, without waiting for the device."""
        for name, value in values.items():
            value = value.detach().float() if isinstance(value, torch.Tensor) else torch.tensor(float(value))
            self._sums[name] = self._sums.get(name, 0) + value.to(self.accelerator.device)
            self._counts[name] = self._counts.get(name, 0) + 1

    def log(self, bar: tqdm, **extra: float) -> None:
        """Write the means since the last line, over all processes. Collective; waits for the device."""
        names = sorted(self._sums)
        means = torch.stack([self._sums[name] / self._counts[name] for name in names])
        means = self.accelerator.reduce(means, reduction="mean").tolist()
        self._sums, self._counts = {}, {}
        images, now = self._logged_at
        self._logged_at = (self.images_seen, time.monotonic())
        values = dict(zip(names, means, strict=True))
        values["images_per_second"] = (self.images_seen - images) / (time.monotonic() - now)
        values.update(extra)
        self.accelerator.log(values, step=self.images_seen)
        if self.accelerator.is_main_process:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"images": self.images_seen, **values}) + "\n")
            bar.set_postfix({name: f"{values[name]:.3g}" for name in names if name.startswith("loss")})

    def save_preview(self, image) -> None:
        """Write a PIL image as this moment's preview, and hand it to the tracker. Main process only."""
        folder = self.folder / "previews"
        folder.mkdir(exist_ok=True)
        write_image(image, folder / f"{self.images_seen:09d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                pixels = np.asarray(image.convert("RGB"))[None]
                tracker.log_images({"preview": pixels}, step=self.images_seen, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"preview": [image]}, step=self.images_seen)

    def _cut_log(self) -> None:
        """Forget lines written after the checkpoint that the run goes on from."""
        file = self.folder / "metrics.jsonl"
        if file.is_file():
            kept = [line for line in file.read_text().splitlines() if json.loads(line)["images"] <= self.images_seen]
            replace_text(file, "".join(line + "\n" for line in kept))

    # The folder ------------------------------------------------------------------------------------------------------

    def _make_folder(self) -> None:
        try:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".write-test-{os.getpid()}"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to output_dir={str(self.folder)!r}: {error.strerror}.") from None

    def _check_same_config(self) -> None:
        file = self.folder / "config.yaml"
        if file.is_file() and (self._checkpoints() or self.result.is_dir()):
            changed = differences(yaml.safe_load(file.read_text()), to_dict(self.config))
            if changed:
                raise ConfigError(
                    f"output_dir={str(self.folder)!r} holds a run with other settings ({'; '.join(changed)}); "
                    "give another output_dir, or delete this one."
                )

    @contextmanager
    def writing_result(self):
        """A folder to write the finished model to, renamed into its place when the block ends. Main process only."""
        partial = self.result.with_name(self.result.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(self.result, ignore_errors=True)
        os.replace(partial, self.result)


def learning_rate_at(optimizer: OptimizerConfig, images_seen: int, total_images: int) -> float:
    """Learning rate after `images_seen` images: linear warm-up, then constant or a cosine to 0."""
    warmup = min(1.0, (images_seen + 1) / optimizer.warmup_images) if optimizer.warmup_images else 1.0
    if optimizer.schedule == "constant":
        return optimizer.learning_rate * warmup
    length = max(1, total_images - optimizer.warmup_images)
    done = min(1.0, max(0, images_seen - optimizer.warmup_images) / length)
    return optimizer.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * done))


def adamw(model: torch.nn.Module, settings: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters that are trained."""
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate is a function of the images seen, so there is no scheduler whose state could part from them."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def resolve_precision(mixed_precision: str) -> str:
    """`auto` is bf16 on GPUs that compute in it and on CPUs with AMX (elsewhere bf16 is emulated, and slower)."""
    if mixed_precision != "auto":
        return mixed_precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return "bf16" if has_amx() else "no"
