"""A trainer of a handful of weights, with every call that the two real loops make of `Run`; and processes for it.

Run as a script (`runpy`, with the settings as global `SETTINGS`) it is one process of a training run.
"""

import json
import math
import os
import sys
import traceback
from pathlib import Path

import torch

from looc_ldm.images.config import DataConfig
from looc_ldm.images.image_set import Report
from looc_ldm.training.config import AutoencoderConfig, OptimizerConfig
from looc_ldm.training.data import Stream, stream_loader
from looc_ldm.training.optimization import adamw, clip_gradients, set_learning_rate
from looc_ldm.training.run import Run

WIDTH = 32


class Numbers(Stream):
    """64 vectors; those in `unreadable` are reported. With `length` None it looks like a streamed set."""

    def __init__(self, unreadable=(), streamed=False):
        super().__init__(64, seed=0)
        self.unreadable = unreadable
        if streamed:
            del self.length

    def __getitem__(self, position: int):
        index = position * 37 % 64  # every image once an epoch
        names = [f"image {index}"] if index in self.unreadable else []
        return torch.linspace(-1, 1, WIDTH) * index / 64, Report(names, (position // 8 % 3, 0, 0, position))


def config_of(output_dir: Path, **settings) -> AutoencoderConfig:
    """16 steps of 8 images, a log line each second step, a checkpoint each third."""
    data = DataConfig(num_workers=settings.pop("num_workers", 0), max_unreadable_share=settings.pop("share", 0.001))
    optimizer = OptimizerConfig(learning_rate=1e-2, **settings.pop("optimizer", {}))
    defaults = {
        "total_images": 128,
        "batch_size": 8,
        "mixed_precision": "no",
        "log_every_images": 16,
        "checkpoint_every_images": 24,
        "tracker": "none",
    }
    return AutoencoderConfig(str(output_dir), data=data, optimizer=optimizer, **{**defaults, **settings})


def train(config: AutoencoderConfig, stream=None, at_step=lambda run, loss: loss, width: int = WIDTH) -> Run:
    """Train; `at_step(run, loss)` may change the loss, or do something to the run. The model has dropout."""
    torch.manual_seed(0)
    hidden = torch.nn.Linear(WIDTH, width)
    model = torch.nn.Sequential(hidden, torch.nn.Dropout(0.2), torch.nn.Linear(width, 1))
    run = Run(config, "model")
    accelerator = run.accelerator
    optimizer = adamw(model, config.optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    run.resume()
    batches = run.stream_batches()
    loader = stream_loader(stream or Numbers(), batches, config.data.num_workers, pin_memory=False)
    with run.training("tiny"):
        for (batch,) in run.watch(loader):
            with accelerator.accumulate(model):
                loss = (model(batch) - batch.mean(1, keepdim=True)).square().mean()
                loss = at_step(run, loss)
                accelerator.backward(loss)
                run.record(loss=loss)
                rate = run.learning_rate(config.optimizer)
                set_learning_rate(optimizer, rate)
                finite = True
                if accelerator.sync_gradients:
                    norm = clip_gradients(accelerator, model, 1.0)
                    run.record(grad_norm=norm)
                    finite = math.isfinite(norm)
                if finite:
                    optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            run.after_step(finite)
            if run.due(config.log_every_images):
                run.write_log(learning_rate=rate)
            if run.due(config.checkpoint_every_images):
                run.save_checkpoint()
            run.stop_if_asked()
        run.save_checkpoint()
    if accelerator.is_main_process:
        with run.folder.writing_result() as folder:
            torch.save(accelerator.unwrap_model(model).state_dict(), folder / "weights.pt")
            (folder / "training.json").write_text(json.dumps({"images_seen": run.images_seen}))
    run.finish()
    return run


def _process(settings: dict) -> None:
    """One process. What it prints goes to a file, or to a terminal."""
    import multiprocessing
    import resource
    import time

    from looc_ldm.training import log
    from looc_ldm.utils.errors import one_line_errors

    multiprocessing.set_start_method("fork", force=True)  # for its workers; the test's would import all anew
    os.setsid()  # so that its workers can be sent what a terminal or a batch system sends to all of them
    os.environ.update({"ACCELERATE_USE_CPU": "true", **settings["environment"]})
    descriptor = os.open(settings.get("terminal", settings["printed"]), os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if limit := settings.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    torch.set_num_threads(1)
    log.FIRST_PROGRESS_SECONDS = log.PROGRESS_SECONDS = 0  # a line each step
    pause = settings.get("pause", 0.0)

    def at_step(run, loss):
        time.sleep(pause)
        return loss

    try:
        if "command" in settings:
            settings["command"](settings["arguments"])
        else:
            log.show_log_lines()
            with one_line_errors():
                train(settings["config"], at_step=at_step, width=settings.get("width", WIDTH))
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    _process(SETTINGS)  # noqa: F821
