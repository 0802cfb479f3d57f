"""TensorBoard and W&B through Accelerate: what a run that goes on has to tell them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from looc_ldm.training import log as logs
from looc_ldm.training.config import RunConfig, to_dict


def start(accelerator: Accelerator, config: RunConfig, folder: Path, images_seen: int) -> None:
    """Start the config's tracker, or let it go on behind `images_seen` images. On every process."""
    if config.tracker == "tensorboard":
        # It hides what was logged after the checkpoint.
        accelerator.init_trackers("logs", init_kwargs={"tensorboard": {"purge_step": images_seen + 1}})
    elif config.tracker == "wandb":
        settings = {}
        if accelerator.is_main_process:
            settings = {
                "id": logs.lasting_id(folder / "wandb_id.txt"),  # the same run again after an interruption
                "resume": "allow",
                "name": folder.resolve().name,
                "dir": str(folder),
                "config": to_dict(config),
            }
        accelerator.init_trackers("looc-ldm", init_kwargs={"wandb": settings})


def log_preview(accelerator: Accelerator, image: Image.Image, images_seen: int) -> None:
    """Hand a grid to the tracker."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.asarray(image.convert("RGB"))[None]
            tracker.log_images({"preview": pixels}, step=images_seen, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"preview": [image]}, step=images_seen)
