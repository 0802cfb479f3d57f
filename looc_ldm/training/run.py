"""The part that both training loops share: counting, checkpoints, stopping and resuming.

A run is resumed by repeating its command. It owns its output folder, which all processes must see:

    config.yaml           the resolved settings
    run.lock              locked by the process that runs, which it names
    checkpoints/000123/   Accelerate's state after that many images; see `training/checkpoints.py`
    metrics.jsonl         one line per log interval, cut back to the checkpoint on resuming
    previews/000123.png   image grids
    logs/, wandb/         the tracker's files; wandb_id.txt names the run that W&B goes on with
    model/ or pipeline/   the result, written at the end; its training.json says after how many images

The log line of a step comes before its checkpoint. Its grid and evaluation, which take long, come after it: a run that
was killed meanwhile makes up for them when it goes on (`Run.evaluation_pending`).

Methods marked *collective* must be called by every process.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch.utils.data import DataLoader

from looc_ldm.images.unreadable import UnreadableImages
from looc_ldm.training.checkpoints import Checkpoints, passes
from looc_ldm.training.config import OptimizerConfig, RunConfig
from looc_ldm.training.data import StreamBatches
from looc_ldm.training.ema import EMA
from looc_ldm.training.engine import make_training_accelerator
from looc_ldm.training.log import RunLog
from looc_ldm.training.optimization import learning_rate_at
from looc_ldm.training.pushing import Pusher
from looc_ldm.training.run_folder import RunFolder
from looc_ldm.training.stopping import StopSignals, stopped_by
from looc_ldm.utils.distributed import on_main, wait_for_gloo
from looc_ldm.utils.errors import TrainingError

logger = logging.getLogger(__name__)

# With several processes, they ask each other every so many optimizer steps whether a signal came: a tiny collective.
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
        cursors (`dict`): For streamed data: lane -> where it goes on. Known after `resume`.
        evaluation_pending (`bool`): Whether the checkpoint that the run goes on from lacks a grid or an evaluation that
            was due there. Known after `resume`, and the same on all processes.

    Raises:
        ConfigError: The folder holds another run's checkpoints, or cannot be written; or training does not support
            Accelerate's engine.
    """

    def __init__(self, config: RunConfig, result: str):
        self.config = config
        self.accelerator = make_training_accelerator(config)
        self.folder = RunFolder(config, result)
        if not self.folder.finished:
            on_main(self.accelerator, self.folder.lock)
        self.images_seen = 0
        self.skipped_steps = 0
        self.evaluation_pending = False
        self._skipped_in_a_row = 0
        self.log = RunLog(config, self.folder.path, self.accelerator)
        self.record = self.log.means.record
        self.checkpoints = Checkpoints(self.folder.checkpoints, self.accelerator, config)
        self.cursors: dict[int, tuple[int, ...]] = {}
        self._unreadable = UnreadableImages(config.data.max_unreadable_share)
        self._unreadable_count = 0  # of all processes, at the last log line
        self._stop = StopSignals()
        self._pusher = None
        if config.push_to_hub and self.accelerator.is_main_process:
            self._pusher = Pusher(self.folder.path / "upload.partial", config.push_to_hub, config.push_private)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def resume(self, provenance: Callable[[], dict[str, dict]] | None = None, ema: EMA | None = None) -> None:
        """Load the newest checkpoint that is complete, if there is one. Collective; after `accelerator.prepare`.

        With a different number of processes than before, the count of images and the schedule go on. Processes that
        were not there before draw their random numbers (dropout, random anchors) from seeds of their own.

        Args:
            provenance: Returns what the run depends on, on the main process: `latent_fingerprint.run_fingerprint`.
            ema: Averaged weights that checkpoints are to hold.

        Raises:
            ConfigError: The checkpoint is of another precision, or of DDP where this is FSDP, or the other way round;
                or the data or the first stage are not what they were.
            TrainingError: There are checkpoints, and none of them can be used.
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
            self.folder.write_settings()
        means = None
        if state is not None:
            self.images_seen, self.skipped_steps = state["images_seen"], state["skipped_steps"]
            self.cursors = {int(lane): tuple(cursor) for lane, cursor in state["cursors"].items()}
            if len(state["means"]) == self.accelerator.num_processes:
                means = state["means"][self.accelerator.process_index]
        self._log_start(state is not None)
        self.log.start(self.images_seen, means)
        pending = self.accelerator.is_main_process and state is not None and self._lacks_evaluation()
        (self.evaluation_pending,) = broadcast_object_list([pending])

    def _log_start(self, resumed: bool) -> None:
        processes, precision = self.accelerator.num_processes, self.accelerator.mixed_precision
        logger.info(
            "%s with %d process%s on %s, precision %s%s",
            f"going on from checkpoint {self.images_seen}" if resumed else "a new run",
            processes,
            "" if processes == 1 else "es",
            self.accelerator.device.type,
            {"no": "float32"}.get(precision, precision),
            " (mixed_precision=auto)" if self.config.mixed_precision == "auto" else "",
        )

    def _lacks_evaluation(self) -> bool:
        """Whether a grid or an evaluation was due at the checkpoint just loaded, and is not there."""
        if self.due(self.config.preview_every_images) and not self.log.preview_file(self.images_seen).is_file():
            return True
        return self.due(self.config.evaluation.every_images) and not self.log.has_evaluation(self.images_seen)

    def _seed(self, images_seen: int) -> None:
        # NumPy's seeds end at 2**32, and the number of the process is added.
        set_seed((self.config.seed + images_seen) % 2**31, device_specific=True)

    def save_checkpoint(self) -> None:
        """Write a checkpoint, unless there is one of this moment, or steps are being skipped. Collective.

        Raises:
            TrainingError: The disk is full or cannot be written, on any process.
        """
        if self.skipping or self.checkpoints.newest == self.images_seen:
            return
        with self.log.pause_timer():
            means = gather_object([self.log.means.state()])
            # A process knows old cursors of the others' lanes from its start; lanes only go forward.
            known = sorted(cursor for part in gather_object([self.cursors]) for cursor in part.values())
            cursors = {cursor[0]: cursor for cursor in known}
            state = {"skipped_steps": self.skipped_steps, "means": means, "cursors": cursors}
            self.checkpoints.save(self.images_seen, state)

    # The loop --------------------------------------------------------------------------------------------------------

    def stream_batches(self) -> StreamBatches:
        """Return the positions of the batches that are left to this process. After `resume`."""
        config, accelerator = self.config, self.accelerator
        return StreamBatches(
            self.images_seen,
            config.total_images,
            config.batch_size,
            config.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
        )

    def batches(self, loader: DataLoader) -> Iterator[list[torch.Tensor]]:
        """Yield the tensors of each batch, on the device; measure the time waited for data and keep the reports.

        Args:
            loader (`DataLoader`): Of tuples of tensors that end with a `looc_ldm.images.image_set.Report`.
        """
        size = getattr(loader.dataset, "length", None)
        self._unreadable = UnreadableImages(self.config.data.max_unreadable_share, self.images_seen, size)
        started_at, first_step = self.images_seen, True
        batches = iter(loader)
        while True:
            with self.log.waiting_for_data():
                batch = next(batches, None)
            if batch is None:
                return
            *tensors, report = batch
            self._unreadable.add(report.unreadable)
            if report.cursor is not None:
                self.cursors[report.cursor[0]] = tuple(report.cursor)
            yield [tensor.to(self.accelerator.device, non_blocking=True) for tensor in tensors]
            if first_step and self.images_seen > started_at:
                first_step = False
                self.log.exclude_first_step(self.images_seen)

    def learning_rate(self, optimizer: OptimizerConfig) -> float:
        """Return the rate for the step that starts now."""
        return learning_rate_at(optimizer, self.images_seen, self.config.total_images)

    def after_step(self, finite: bool) -> None:
        """Count an optimizer step, made or skipped.

        Args:
            finite: Whether all gradients were; else the step was skipped. The same on all processes, since gradients
                are reduced.

        Raises:
            TrainingError: More than `max_skipped_steps` steps in a row were skipped.
        """
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        self.skipped_steps += not finite
        if self._skipped_in_a_row > self.config.max_skipped_steps:
            newest = self.checkpoints.newest
            good = "there is no checkpoint yet" if newest is None else f"checkpoint {newest} is the last good one"
            raise TrainingError(
                f"{self._skipped_in_a_row} steps in a row, up to step {self.images_seen // self.config.batch_size + 1} "
                f"({self.images_seen} images seen), were skipped because of what was not finite: "
                f"{', '.join(self.log.means.not_finite())}; {good}."
            )
        self.images_seen += self.config.batch_size
        if self.log.bar is not None:
            self.log.bar.update(self.config.batch_size)

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
                self._pusher.finish(seconds=0)
            wait_for_gloo(self.accelerator)
            raise

    def stop_if_asked(self) -> None:
        """After an optimizer step: save and stop if a signal came to any process. Collective.

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
            place = "there" if newest == self.images_seen else f"checkpoint {newest}" if newest else "the beginning"
            raise stopped_by(received, f"stopped at {self.images_seen} images; the same command goes on from {place}")

    def write_log(self, **extra: float) -> None:
        """Write a log line with the means since the last one, and `extra`. Collective; waits for the device."""
        self.log.write(self.images_seen, **extra, skipped_steps=self.skipped_steps)
        self._unreadable_count = sum(gather_object([self._unreadable.count]))

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
        name, preview = self.folder.result.name, self.log.preview_file(self.images_seen)

        def snapshot(folder: Path) -> Path:
            """Lay out the folder as that of the run, so that the model card finds the picture."""
            if preview.is_file():
                (folder / "previews").mkdir()
                shutil.copyfile(preview, folder / "previews" / preview.name)
            save(folder / name)
            return folder / name

        with self.log.pause_timer():
            self._pusher.push_snapshot(snapshot, self._commit_message)

    @property
    def _commit_message(self) -> str:
        return f"{self.folder.result.name.capitalize()} after {self.images_seen:,} images"

    def finish(self) -> None:
        """Upload the written result, wait for that some minutes, and end the trackers. Collective."""
        if self._pusher is not None:
            self._pusher.push_result(self.folder.result, f"{self._commit_message}, the end of training")
        self.accelerator.wait_for_everyone()
        wait_for_gloo(self.accelerator)
        self.accelerator.end_training()
