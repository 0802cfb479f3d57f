"""`Run`, shared by both training loops: counting, checkpoints, stopping and resuming.

A run is resumed by repeating its command. It owns its output folder, which all processes must see:

    config.yaml           the resolved settings
    run.lock              locked by the process that runs, which it names
    checkpoints/*/        Accelerate's state, by the number of images; see `training/checkpoints.py`
    metrics.jsonl         one line per log interval, cut back to the checkpoint on resuming
    previews/*.png        image grids, by the number of images
    upload.partial/       the model that is being uploaded, with `push_to_hub`
    logs/, wandb/         the tracker's files; wandb_id.txt names the W&B run to resume
    model/ or pipeline/   the result, written at the end; training.json has its number of images

The log line of a step, its grid and its evaluation are written before its checkpoint. If a run is killed in between,
the resumed run writes them again.

Methods marked *collective* must be called by every process.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader

from looc_ldm.images.unreadable import UnreadableImages
from looc_ldm.training.checkpoints import Checkpoints, passes
from looc_ldm.training.checks import warn_of_late_settings
from looc_ldm.training.config import OptimizerConfig, RunConfig
from looc_ldm.training.data import StreamBatches
from looc_ldm.training.ema import EMA
from looc_ldm.training.engine import make_training_accelerator
from looc_ldm.training.log import RunLog
from looc_ldm.training.optimization import learning_rate_at
from looc_ldm.training.pushing import WAIT_AT_END_SECONDS, Pusher
from looc_ldm.training.run_folder import RunFolder
from looc_ldm.training.stopping import StopSignals
from looc_ldm.utils.cpu import SpeedWatch, use_fastest_threads
from looc_ldm.utils.distributed import on_main, wait_for_gloo
from looc_ldm.utils.errors import Terminated, TrainingError

logger = logging.getLogger(__name__)

# Several processes ask each other every N optimizer steps whether a signal came: a tiny collective.
STOP_CHECK_STEPS = 4


class Run:
    """One training run in its output folder.

    Args:
        config (`RunConfig`): The settings. Refused if the folder holds a run with others.
        result (`str`): Name of the folder the finished model is written to.

    Attributes:
        folder (`RunFolder`): The output folder.
        accelerator (`Accelerator`): Devices, processes, precision, accumulation.
        log (`RunLog`): Log lines, evaluations and image grids.
        record (`Callable`): Adds scalars of one forward pass to the next log line, without waiting for the device.
        images_seen (`int`): Progress, in images.
        skipped_steps (`int`): Optimizer steps that were left out because a gradient was not finite.
        channels_last (`bool`): Whether the trained network's weights have their channels last.
        cursors (`dict`): For streamed data: the cursor of each lane. Known after `resume`.

    Raises:
        ConfigError: The folder holds the checkpoints of a different run, or cannot be written; or training does not
            support Accelerate's engine.
    """

    def __init__(self, config: RunConfig, result: str):
        self.config = config
        self.accelerator = make_training_accelerator(config)
        self.folder = RunFolder(config, result)
        if not self.folder.finished:
            on_main(self.accelerator, self.folder.lock)
        on_cpu = self.accelerator.device.type == "cpu"
        self.channels_last = not on_cpu if config.channels_last is None else config.channels_last
        self.images_seen = 0
        self.skipped_steps = 0
        self._threads: int | None = None  # in the checkpoint
        self._trial: Callable[[], None] | None = None
        self._watch: SpeedWatch | None = None
        self._skipped_in_a_row = 0
        self.log = RunLog(config, self.folder.path, self.accelerator)
        self.record = self.log.means.record
        self.checkpoints = Checkpoints(self.folder.checkpoints, self.accelerator, config)
        self.cursors: dict[int, tuple[int, ...]] = {}
        self._unreadable = UnreadableImages(config.data.max_unreadable_share)
        self._unreadable_count = 0  # over all processes, at the last log line
        self._stop = StopSignals()
        self._pusher = None
        if config.push_to_hub and self.accelerator.is_main_process:
            self._pusher = Pusher(config.push_to_hub, config.push_private)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def resume(self, provenance: Callable[[], dict[str, dict]] | None = None, ema: EMA | None = None) -> None:
        """Load the newest checkpoint, if there is one. Collective; after `accelerator.prepare`.

        The number of processes may differ from before: the count of images and the schedule continue. Additional
        processes draw their random numbers (dropout, random anchors) from new seeds.

        Args:
            provenance: Returns what the run depends on, on the main process: `latent_fingerprint.run_fingerprint`.
            ema: Averaged weights that checkpoints are to hold.

        Raises:
            ConfigError, TrainingError: See `Checkpoints.load_newest`.
        """
        # Models are made by now, equal on all processes; dropout and random anchors must not be.
        self._seed(0)
        if provenance is not None:
            self.checkpoints.provenance = on_main(self.accelerator, provenance)
        self.checkpoints.ema = ema
        state = self.checkpoints.load_newest(before_load=self._seed)
        self.accelerator.wait_for_everyone()  # all have compared their config with the one that is replaced here
        if self.accelerator.is_main_process:
            if state is not None:
                self.folder.warn_of_changes()
            warn_of_late_settings(self.config)
            self.folder.write_settings()
        means = None
        if state is not None:
            self.images_seen, self.skipped_steps = state["images_seen"], state["skipped_steps"]
            self._threads = state.get("threads")
            self.cursors = {int(lane): tuple(cursor) for lane, cursor in state["cursors"].items()}
            if len(state.get("sums", [])) == self.accelerator.num_processes:
                means = state["sums"][self.accelerator.process_index]
        begins = "a new run" if state is None else f"resuming from checkpoint {self.images_seen}"
        count, precision = self.accelerator.num_processes, self.accelerator.mixed_precision
        logger.info("%s, processes: %d, %s, precision: %s", begins, count, self.accelerator.device.type, precision)
        self.log.start(self.images_seen, means)

    def _seed(self, images_seen: int) -> None:
        # NumPy's seeds end at 2**32, and the number of the process is added.
        set_seed((self.config.seed + images_seen) % 2**31, device_specific=True)

    def save_checkpoint(self) -> None:
        """Write a checkpoint, unless there is one of this moment, or steps are being skipped. Collective."""
        if self.skipping or self.checkpoints.newest == self.images_seen:
            return
        with self.log.pause_timer():
            means = gather_object([self.log.means.state()])
            # A process knows old cursors of the others' lanes from its start; lanes only go forward.
            known = sorted(cursor for part in gather_object([self.cursors]) for cursor in part.values())
            cursors = {cursor[0]: cursor for cursor in known}
            threads = torch.get_num_threads()
            state = {"skipped_steps": self.skipped_steps, "threads": threads, "sums": means, "cursors": cursors}
            self.checkpoints.save(self.images_seen, state)

    # The loop --------------------------------------------------------------------------------------------------------

    def stream_batches(self) -> StreamBatches:
        """Return the positions of the batches that are left to this process. After `resume`."""
        config, accelerator = self.config, self.accelerator
        length = (self.images_seen, config.total_images, config.batch_size, config.gradient_accumulation_steps)
        return StreamBatches(*length, accelerator.process_index, accelerator.num_processes)

    def use_fastest_threads(self, trial: Callable[[], None]) -> None:
        """On a CPU, compute with the number of threads that was asked for, or is fastest. After `resume`.

        A resumed run keeps its number of threads: a different number changes the last bits of sums. Steps that become
        far slower (`SpeedWatch`) have the threads timed again: see `keep_speed`.

        Args:
            trial: The work of a training step, which changes nothing.
        """
        config, accelerator = self.config, self.accelerator
        if accelerator.device.type != "cpu" or accelerator.num_processes > 1:
            return
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        elif "OMP_NUM_THREADS" in os.environ or config.compile:  # compiled code is for one number of threads
            return
        else:
            self._trial, self._watch = trial, SpeedWatch(self.log.training_clock)
            if self._threads is not None:
                torch.set_num_threads(self._threads)
            else:
                self._time_threads()

    def _time_threads(self) -> None:
        with torch.random.fork_rng(devices=[]):
            use_fastest_threads(self._trial)

    def keep_speed(self) -> None:
        """Time the numbers of threads again if steps have become far slower. After an optimizer step."""
        if self._watch is not None and self._watch.collapsed():
            logger.info("training has become far slower: timing CPU threads again")
            self._time_threads()

    def watch(self, loader: DataLoader) -> Iterator[list[torch.Tensor]]:
        """Yield the tensors of each batch unchanged. Measure the time waited for data, and keep the reports.

        Args:
            loader (`DataLoader`): Yields tuples of tensors that end with a `looc_ldm.images.image_set.Report`.
        """
        size = getattr(loader.dataset, "length", None)
        self._unreadable = UnreadableImages(self.config.data.max_unreadable_share, self.images_seen, size)
        started_at, first_step = self.images_seen, True
        batches = iter(loader)
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.log.waited += time.monotonic() - began
            if batch is None:
                return
            *tensors, report = batch
            self._unreadable.add(report.unreadable)
            if report.cursor is not None:
                self.cursors[report.cursor[0]] = tuple(report.cursor)
            yield tensors
            if first_step and self.images_seen > started_at:
                first_step = False
                self.log.exclude_first_step(self.images_seen)

    def learning_rate(self, optimizer: OptimizerConfig) -> float:
        """Return the rate for the step that starts now."""
        return learning_rate_at(optimizer, self.images_seen, self.config.total_images)

    def after_step(self, finite: bool) -> None:
        """Count an optimizer step, made or skipped.

        Args:
            finite: Whether all gradients were; else the step was skipped. The same on all processes.

        Raises:
            TrainingError: More than `max_skipped_steps` steps in a row were skipped.
        """
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        self.skipped_steps += not finite
        if self._skipped_in_a_row > self.config.max_skipped_steps:
            raise TrainingError(
                f"{self._skipped_in_a_row} steps in a row, up to step {self.images_seen // self.config.batch_size + 1} "
                f"({self.images_seen} images seen), were skipped because of what was not finite: "
                f"{', '.join(self.log.means.not_finite())}; the last good checkpoint: {self.checkpoints.newest}."
            )
        self.images_seen += self.config.batch_size
        if self.log.bar is not None:
            self.log.bar.update(self.config.batch_size)
        self.log.show_progress(self.images_seen)

    @property
    def skipping(self) -> bool:
        """Whether the last step was skipped: the run may be diverging, and its weights are not worth keeping."""
        return self._skipped_in_a_row > 0

    def due(self, interval: int | None) -> bool:
        """Whether the last optimizer step reached or passed a multiple of `interval` images; never if it is None."""
        return interval is not None and passes(self.images_seen, self.config.batch_size, interval)

    @contextmanager
    def training(self, description: str) -> Iterator[None]:
        """Show a progress bar, and turn Ctrl-C and SIGTERM into a checkpoint after the step; see `stop_if_asked`.

        A second signal, a second or more after the first, ends the process at once.
        """
        try:
            with self._stop, self.log.progress_bar(description, self.images_seen):
                yield
        except BaseException:
            if self._pusher is not None:
                self._pusher.wait(0)
            wait_for_gloo(self.accelerator)
            raise

    def stop_if_asked(self) -> None:
        """Save and stop, after an optimizer step, if a signal came to any process. Collective.

        Several processes ask each other every `STOP_CHECK_STEPS` steps.

        Raises:
            KeyboardInterrupt: After SIGINT; `Terminated`, which is one, after SIGTERM.
            TrainingError: Too many images are unreadable.
        """
        if problem := self._unreadable.too_many(self._unreadable_count, self.images_seen):
            self.save_checkpoint()
            raise TrainingError(problem)
        received = self._stop.received
        if self.accelerator.num_processes > 1:
            if self.images_seen // self.config.batch_size % STOP_CHECK_STEPS:
                return
            asked = torch.tensor([received], device=self.accelerator.device)
            received = int(self.accelerator.gather(asked).max())
        if received:
            self.save_checkpoint()
            self.accelerator.wait_for_everyone()  # a launcher ends the others when the first one has ended
            self.accelerator.end_training()
            newest = self.checkpoints.newest
            place = f"checkpoint {newest}" if newest else "the beginning"
            message = f"stopped at {self.images_seen} images; run the same command again to resume from {place}"
            raise KeyboardInterrupt(message) if received == signal.SIGINT else Terminated(message)

    def write_log(self, **extra: float) -> None:
        """Write a log line with the means since the last one, and `extra`. Collective; waits for the device."""
        self.log.write(self.images_seen, **extra, skipped_steps=self.skipped_steps)
        self._unreadable_count = sum(gather_object([self._unreadable.count]))

    # The hub ---------------------------------------------------------------------------------------------------------

    def push(self, save: Callable[[Path], None]) -> None:
        """Upload a model to `push_to_hub`, in the background. Main process only; does nothing without that setting.

        Does nothing while an upload is under way, or after the last step, when the result is uploaded soon.

        Args:
            save: Writes the model as it is now into a folder that does not exist yet.
        """
        if self._pusher is None or self.images_seen >= self.config.total_images:
            return
        if self._pusher.busy:
            logger.info("not pushed, because the last upload still runs: %s", self._commit_message)
            return
        with self.log.pause_timer():
            shutil.rmtree(self.folder.upload, ignore_errors=True)
            save(self.folder.upload)
            self._pusher.push(self.folder.upload, self._commit_message)

    @property
    def _commit_message(self) -> str:
        return f"{self.folder.result.name.capitalize()} after {self.images_seen:,} images"

    def finish(self) -> None:
        """Upload the written result, wait for that some minutes, and end the trackers. Collective."""
        if self._pusher is not None:
            self._pusher.push(self.folder.result, f"{self._commit_message}, the end of training")
            logger.info("waiting for the upload to %s, at most %d s", self.config.push_to_hub, WAIT_AT_END_SECONDS)
            if not self._pusher.wait():
                logger.warning("not pushed: try `looc-ldm push %s %s`", self.folder.result, self.config.push_to_hub)
            shutil.rmtree(self.folder.upload, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        wait_for_gloo(self.accelerator)
        self.accelerator.end_training()
