"""What the two training loops share: the output folder, checkpoints, logs, stopping and resuming.

A run is resumed by repeating its command. It owns its output folder, which all processes must see:

    config.yaml           the resolved settings
    checkpoints/000123/   Accelerate's state after that many images; see `training/checkpoints.py`
    metrics.jsonl         one line a log interval, cut back to the checkpoint on resuming
    unreadable.txt        names of images that could not be read, one a line; cut back likewise
    previews/000123.png   image grids
    logs/, wandb/         the tracker's files; wandb_id.txt names the run that W&B goes on with
    model/ or pipeline/   the result, written at the end; its training.json says after how many images

The log line of a step comes before its checkpoint. Its grid and evaluation, which take long, come after it: a run that
was killed meanwhile makes up for them when it goes on (`Run.look_pending`).

Methods marked *collective* must be called by every process.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from looc_ldm.distributed import WAIT, on_main, wait_for_gloo, write_or_stop_all
from looc_ldm.errors import ConfigError, TrainingError
from looc_ldm.files import replace_text, write_image
from looc_ldm.training import log as logs
from looc_ldm.training import trackers
from looc_ldm.training.checkpoints import Checkpoints, checkpoints_in, passes
from looc_ldm.training.config import OptimizerConfig, RunConfig, config_text, differences, moves, read_settings, to_dict
from looc_ldm.training.log import Means, means_of
from looc_ldm.training.optimization import learning_rate_at, resolve_precision
from looc_ldm.training.pushing import Pusher
from looc_ldm.training.reports import Reports
from looc_ldm.training.stopping import StopSignals, leave_signals_to_the_trainer, stopped_by

logger = logging.getLogger(__name__)

# With several processes, they ask each other every so many optimizer steps whether a signal came: a tiny collective.
STOP_CHECK_STEPS = 4


class Run:
    """One training run in its output folder.

    Args:
        config (`RunConfig`): The settings. Refused if the folder holds a run with others.
        result (`str`): Name of the folder the finished model is written to.

    Attributes:
        accelerator (`Accelerator`): Devices, processes, precision, accumulation.
        images_seen (`int`): Progress, in images.
        skipped_steps (`int`): Optimizer steps that were left out because a gradient was not finite.
        cursors (`dict`): Of streamed data: lane -> where it goes on. Known after `resume`.
        look_pending (`bool`): Whether the checkpoint that the run goes on from lacks a grid or an evaluation that was
            due there. Known after `resume`, and the same on all processes.

    Raises:
        ConfigError: The folder holds another run's checkpoints, or cannot be written.
    """

    def __init__(self, config: RunConfig, result: str):
        self.config = config
        self.folder = Path(config.output_dir)
        self.result = self.folder / result
        self.images_seen = 0
        self.skipped_steps = 0
        self.look_pending = False
        self._make_folder()
        self._check_same_config()
        self.accelerator = Accelerator(
            mixed_precision=resolve_precision(config.mixed_precision),
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=None if config.tracker == "none" else config.tracker,
            project_dir=str(self.folder),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
        )
        self.checkpoints = Checkpoints(
            self._checkpoint_folder, self.accelerator, config.batch_size, config.keep_last, config.keep_every_images
        )
        self._reports = Reports(self.folder / "unreadable.txt", self.accelerator, config.data.max_unreadable_share)
        self._stop = StopSignals()
        self._steps = 0  # of this process since it started
        self._means = Means(self.accelerator.device)
        self._logged_at = (0, time.monotonic())
        # Since the last log line, of this process:
        self._waited = 0.0  # seconds of training in which it waited for data
        self._other = 0.0  # seconds of anything but training
        self._aside = False  # whether that goes on now
        self._skipped_in_a_row: dict[str, int] = {}
        self._skipped_at: int | None = None  # images seen before the step that was counted last
        self._pusher = None
        if config.push_to_hub and self.accelerator.is_main_process:
            self._pusher = Pusher(self.folder / "upload.partial", config.push_to_hub, config.push_private)

    @property
    def cursors(self) -> dict[int, tuple[int, ...]]:
        return self._reports.cursors

    @property
    def finished(self) -> bool:
        """Whether the result is there and was trained on as many images as are asked for."""
        file = self.result / "training.json"
        return file.is_file() and json.loads(file.read_text())["images_seen"] >= self.config.total_images

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def resume(self, made_from: Callable[[], dict[str, dict]] | None = None) -> None:
        """Load the newest checkpoint that is complete, if there is one. Collective; after `accelerator.prepare`.

        With another number of processes than before, the count of images and the schedule go on. Processes that were
        not there before draw their random numbers (dropout, random anchors) from seeds of their own.

        Args:
            made_from: Gives what the run depends on, on the main process: `latent_fingerprint.run_fingerprint`.

        Raises:
            ConfigError: The checkpoint is of another precision, or of DDP where this is FSDP, or the other way round;
                or the data or the first stage are not what they were.
            TrainingError: There are checkpoints, and none of them can be used.
        """
        # Models are made by now, equal on all processes; dropout and random anchors must not be.
        self._seed(0)
        if made_from is not None:
            self.checkpoints.made_from = on_main(self.accelerator, made_from)
        state = self.checkpoints.load_newest(before_load=self._seed)
        self.accelerator.wait_for_everyone()  # all have compared their config with the one that is replaced here
        if self.accelerator.is_main_process:
            if state is not None:
                self._warn_of_changes()
            replace_text(self.folder / "config.yaml", config_text(self.config))
            self._say_how_it_starts(None if state is None else state["images_seen"])
        if state is not None:
            self.images_seen, self.skipped_steps = state["images_seen"], state["skipped_steps"]
            self._reports.load_state(state)
            if len(state["means"]) == self.accelerator.num_processes:
                self._means.reset(state["means"][self.accelerator.process_index])
        if self.accelerator.is_main_process:
            logs.cut_lines(self.folder / "metrics.jsonl", self.images_seen)
            self._reports.write_names()
            self.look_pending = state is not None and self._lacks_a_look()
        (self.look_pending,) = broadcast_object_list([self.look_pending])
        trackers.start(self.accelerator, self.config, self.folder, self.images_seen)
        self._logged_at = (self.images_seen, time.monotonic())

    def _say_how_it_starts(self, images_seen: int | None) -> None:
        processes, precision = self.accelerator.num_processes, self.accelerator.mixed_precision
        chosen = " (mixed_precision=auto)" if self.config.mixed_precision == "auto" else ""
        logger.info(
            "%s with %d process%s on %s, precision %s%s",
            "a new run" if images_seen is None else f"going on from checkpoint {images_seen}",
            processes,
            "" if processes == 1 else "es",
            self.accelerator.device.type,
            {"no": "float32"}.get(precision, precision),
            chosen,
        )

    def say(self, message: str, *values) -> None:
        """A line in the log, from the main process."""
        if self.accelerator.is_main_process:
            logger.info(message, *values)

    def _lacks_a_look(self) -> bool:
        """Whether a grid or an evaluation was due at the checkpoint just loaded, and is not there."""
        if self.due(self.config.preview_every_images) and not self._preview_file.is_file():
            return True
        figures = logs.figures_at(self.folder / "metrics.jsonl", self.images_seen)
        return self.due(self.config.evaluation.every_images) and not any(name.startswith("val_") for name in figures)

    def _seed(self, images_seen: int) -> None:
        # NumPy's seeds end at 2**32, and the number of the process is added.
        set_seed((self.config.seed + images_seen) % 2**31, device_specific=True)

    def save_checkpoint(self) -> None:
        """Write a checkpoint, unless there is one of this moment. Collective.

        Raises:
            TrainingError: The disk is full or cannot be written, on any process; or too many images are unreadable.
        """
        if self.checkpoints.newest == self.images_seen:
            return
        with self.aside():
            state = self._reports.state()
            means = gather_object([self._means.state()])
            self.checkpoints.save(self.images_seen, {"skipped_steps": self.skipped_steps, "means": means, **state})
        self._stop_if_too_many_unreadable()

    # Data ------------------------------------------------------------------------------------------------------------

    def batches(self, loader: DataLoader) -> Iterator[list[torch.Tensor]]:
        """The tensors of each batch, on the device; measures the time waited for data and keeps the reports.

        Args:
            loader (`DataLoader`): Of tuples of tensors that end with a `looc_ldm.training.data.Report`.

        Raises:
            TrainingError: Too many images were unreadable when the run was stopped, and nothing has changed since.
        """
        self._reports.listen(loader)
        self._stop_if_too_many_unreadable()
        loader.worker_init_fn = leave_signals_to_the_trainer
        batches = iter(loader)
        while True:
            asked_at = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - asked_at
            if batch is None:
                return
            *tensors, report = batch
            self._reports.take(report)
            yield [tensor.to(self.accelerator.device, non_blocking=True) for tensor in tensors]

    def _stop_if_too_many_unreadable(self) -> None:
        error = self._reports.too_many(self.images_seen)
        if error is not None:
            raise error

    # The loop's questions --------------------------------------------------------------------------------------------

    def due(self, interval: int | None) -> bool:
        """Whether the last optimizer step reached or passed a multiple of `interval` images; never if it is None."""
        return interval is not None and passes(self.images_seen, self.config.batch_size, interval)

    def learning_rate(self, optimizer: OptimizerConfig) -> float:
        """The rate for the step that starts now."""
        return learning_rate_at(optimizer, self.images_seen, self.config.total_images)

    def gradients_finite(
        self, parameters: Iterable[torch.nn.Parameter], max_norm: float, name: str = "grad_norm"
    ) -> bool:
        """Clip the gradients and say whether the optimizer may step. Waits for the device.

        Gradients are reduced by now, so that all processes come to the same answer without asking each other.

        Args:
            parameters: Of one model that was prepared by the accelerator.
            max_norm: Norm that gradients are clipped to; 0 only measures it.
            name: What the norm is called in the log.

        Raises:
            TrainingError: More than `max_skipped_steps` steps in a row were not finite.
        """
        parameters = list(parameters)
        norm = self.accelerator.clip_grad_norm_(parameters, max_norm or math.inf).item()
        self.record(**{name: norm})
        if math.isfinite(norm):
            self._skipped_in_a_row[name] = 0
            return True
        if self._skipped_at != self.images_seen:  # a step of two networks is one step
            self.skipped_steps += 1
            self._skipped_at = self.images_seen
        in_a_row = self._skipped_in_a_row[name] = self._skipped_in_a_row.get(name, 0) + 1
        if in_a_row > self.config.max_skipped_steps:
            newest = self.checkpoints.newest
            good = "there is no checkpoint yet" if newest is None else f"checkpoint {newest} is the last good one"
            raise TrainingError(
                f"{in_a_row} steps in a row, up to step {self.images_seen // self.config.batch_size + 1} "
                f"({self.images_seen} images seen), were skipped because of what was not finite: "
                f"{', '.join(self._means.not_finite())}; {good}."
            )
        return False

    @contextmanager
    def stopping_cleanly(self):
        """Turn Ctrl-C and SIGTERM into a checkpoint after the step under way; see `stop_if_asked`.

        A second signal, a second or more after the first, ends the process at once.
        """
        try:
            with self._stop:
                yield
        except BaseException:
            if self._pusher is not None:
                self._pusher.finish(seconds=0)
            wait_for_gloo(self.accelerator)
            raise

    def stop_if_asked(self) -> None:
        """After an optimizer step: save and stop if a signal came, to any of the processes. Collective.

        Several processes ask each other every `STOP_CHECK_STEPS` steps.

        Raises:
            KeyboardInterrupt: After SIGINT; `Terminated`, which is one, after SIGTERM.
        """
        self._steps += 1
        if self._steps == 1 and self._logged_at[0] != self.images_seen:
            self._leave_out_first_step()
        received = self._stop.received
        if self.accelerator.num_processes > 1:
            if self._steps % STOP_CHECK_STEPS:
                return
            asked = torch.tensor([received], device=self.accelerator.device)
            received = int(self.accelerator.gather(asked).max())
        if received:
            self.save_checkpoint()
            self.accelerator.wait_for_everyone()  # a launcher ends the others when the first one has ended
            self.accelerator.end_training()
            raise stopped_by(received, f"stopped at {self.images_seen} images; the same command goes on from there")

    @contextmanager
    def progress_bar(self, description: str) -> Iterator[tqdm]:
        """A bar over images, on the main process where stderr is a terminal. Log lines are written above it."""
        bar = tqdm(
            total=self.config.total_images,
            initial=self.images_seen,
            desc=description,
            unit="img",
            unit_scale=True,
            mininterval=0.5,
            disable=None if self.accelerator.is_main_process else True,  # None: unless it is a terminal
        )
        with bar, nullcontext() if bar.disable else logging_redirect_tqdm():
            yield bar

    # Logs ------------------------------------------------------------------------------------------------------------

    def record(self, **values: torch.Tensor | float) -> None:
        """Add scalars of one forward pass to the next log line, without waiting for the device."""
        self._means.record(**values)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is no training, such as a grid or an evaluation. Speed and waiting for data are logged without it."""
        if self._aside:  # within another block
            yield
            return
        began, self._aside = time.monotonic(), True
        try:
            yield
        finally:
            self._other += time.monotonic() - began
            self._aside = False

    def _leave_out_first_step(self) -> None:
        """Of the speed: it starts the loader's workers, compiles, and chooses kernels."""
        then = self._logged_at[1]
        self._logged_at = (self.images_seen, then)
        self._waited, self._other = 0.0, time.monotonic() - then

    def log(self, bar: tqdm, **extra: float) -> None:
        """One line: the means since the last one, over all processes. Collective; waits for the device.

        Scalars that were not finite are left out of the means. Speed and waiting are those of training alone, without
        the first step after a start where a later one is in the same line; the rest is `other_seconds`.
        """
        images, then = self._logged_at
        now = time.monotonic()
        self._logged_at = (self.images_seen, now)
        device = self.accelerator.device
        trained = now - then - self._other
        parts = gather_object([(self._means.state(), trained, self._waited, self._other, logs.memory_gib(device))])
        self._means.reset()
        self._waited = self._other = 0.0
        states, trained, waits, others, memory = zip(*parts, strict=True)
        seconds = min(trained)  # others take it for training when they wait for the first process and its evaluation
        means = means_of(states)
        values = {
            "images_per_second": (self.images_seen - images) / seconds,
            "data_wait": min(1.0, max(waits) / seconds),  # the slowest process holds up the others
            "other_seconds": max(others),
            "memory_gib": max(memory),
            **means,
            **extra,
            "skipped_steps": self.skipped_steps,
        }
        self._reports.gather()
        write_or_stop_all(self.accelerator, "the log", self.folder, lambda: self._append(values), main_only=True)
        bar.set_postfix({name: f"{value:.3g}" for name, value in means.items() if name.startswith("loss")})
        if self._reports.too_many(self.images_seen):
            self.save_checkpoint()  # and stop

    def log_evaluation(self, figures: dict) -> None:
        """Add figures of an evaluation to the log, with the prefix `val_`. Main process only."""
        if self.accelerator.is_main_process:
            try:
                self._append({f"val_{name}": value for name, value in figures.items()})
            except OSError as error:
                raise TrainingError(f"cannot write the log in {str(self.folder)!r}: {error.strerror}.") from error

    def _append(self, values: dict) -> None:
        line = {name: value for name, value in values.items() if _is_sayable(value)}
        self.accelerator.log(line, step=self.images_seen)
        logs.append_line(self.folder / "metrics.jsonl", {"images": self.images_seen, **line})
        logger.info(logs.progress_line(self.images_seen, self.config.total_images, line))

    def save_preview(self, image) -> None:
        """Write a PIL image as this moment's preview, and hand it to the tracker. Main process only."""
        self._preview_file.parent.mkdir(exist_ok=True)
        write_image(image, self._preview_file)
        trackers.log_preview(self.accelerator, image, self.images_seen)

    # The hub ---------------------------------------------------------------------------------------------------------

    def push(self, save: Callable[[Path], None]) -> None:
        """Upload a model to `push_to_hub`, in the background. Does nothing without that, and on other processes.

        It is saved at once and uploaded while training goes on. Nothing is done while an upload still runs, and after
        the last step, when the result is uploaded soon; one that fails is a warning in the log.

        Args:
            save: Writes the model as it is now into a folder that does not exist yet.
        """
        if self._pusher is None or self.images_seen >= self.config.total_images:
            return

        def snapshot(folder: Path) -> Path:
            """As the run's folder, so that the model card finds the picture."""
            if self._preview_file.is_file():
                (folder / "previews").mkdir()
                shutil.copyfile(self._preview_file, folder / "previews" / self._preview_file.name)
            save(folder / self.result.name)
            return folder / self.result.name

        with self.aside():
            self._pusher.push_snapshot(snapshot, self._commit_message)

    @property
    def _commit_message(self) -> str:
        return f"{self.result.name.capitalize()} after {self.images_seen:,} images"

    def finish(self) -> None:
        """At the end, after `writing_result`: upload the result, wait for it some minutes; end trackers. Collective."""
        if self._pusher is not None:
            self._pusher.push_result(self.result, f"{self._commit_message}, the end of training")
        self.accelerator.wait_for_everyone()
        wait_for_gloo(self.accelerator)
        self.accelerator.end_training()

    # The folder ------------------------------------------------------------------------------------------------------

    @property
    def _checkpoint_folder(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def _preview_file(self) -> Path:
        """The grid of this moment."""
        return self.folder / "previews" / f"{self.images_seen:09d}.png"

    def _make_folder(self) -> None:
        try:
            self._checkpoint_folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".write-test-{os.getpid()}"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to output_dir={str(self.folder)!r}: {error.strerror}.") from None

    def _check_same_config(self) -> None:
        old = self._old_settings()
        if old and (checkpoints_in(self._checkpoint_folder) or self.result.is_dir()):
            changed = differences(old, to_dict(self.config))
            if changed:
                raise ConfigError(
                    f"output_dir={str(self.folder)!r} holds a run with other settings ({'; '.join(changed)}); "
                    "give another output_dir, or delete this one."
                )

    def _old_settings(self) -> dict:
        """What the run in this folder was started with; nothing if there is none."""
        file = self.folder / "config.yaml"
        return read_settings(file) if file.is_file() else {}

    def _warn_of_changes(self) -> None:
        old = self._old_settings()
        for move in moves(old, to_dict(self.config)) if old else ():
            logger.warning("what lies elsewhere now has to be the same as before: %s", move)
        before, now = old.get("total_images"), self.config.total_images
        if before != now and self.config.optimizer.schedule == "cosine":
            logger.warning(
                "total_images was %s and is %s: from here on the learning rate follows another cosine, and the run is "
                "not the one that it would have been with that number from the start",
                before,
                now,
            )

    @contextmanager
    def writing_result(self):
        """A folder to write the finished model to, renamed into its place when the block ends. Main process only."""
        partial = self.result.with_name(self.result.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        usual = (partial / "training.json").stat().st_mode
        for file in partial.rglob("*.safetensors"):
            file.chmod(usual)  # safetensors 0.8 keeps what it writes from other users
        shutil.rmtree(self.result, ignore_errors=True)
        os.replace(partial, self.result)


def _is_sayable(value) -> bool:
    """Whether JSON and trackers have a place for a figure."""
    return not isinstance(value, float) or math.isfinite(value)
