"""Write `training.json`, the record of a finished model, beside its weights.

`looc_ldm.hub.card` prints the entries "facts", "preview", "validation" and "first_stage", and reads no settings.
"""

from __future__ import annotations

import json
import logging
import shlex
from dataclasses import asdict
from pathlib import Path

from looc_ldm.images.config import DataConfig
from looc_ldm.images.pixels import describe_transform
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.loading import training_record
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig, RunConfig
from looc_ldm.training.config_parsing import to_dict
from looc_ldm.training.run import Run
from looc_ldm.utils.errors import print_once

logger = logging.getLogger(__name__)


def write_description(folder: Path, config: RunConfig, run: Run, preview: str, **figures) -> None:
    """Write `training.json`: settings, the exact transform of the data (FID depends on it), progress and figures.

    Args:
        preview: Caption of the newest preview.
        figures: Measured figures, each a dict under the key "validation" or "first_stage".
    """
    transform, precision = describe_transform(config.data), run.accelerator.mixed_precision
    provenance = run.checkpoints.provenance or {}
    facts = {
        "data set": config.data.path,
        "split": config.data.split,
        "transform": transform,
        "images seen": f"{run.images_seen:,}",
        "batch size": config.batch_size,
        "learning rate": config.optimizer.learning_rate,
        "learning rate schedule": config.optimizer.schedule,
        "mixed precision": precision,
        "half-life of the averaged weights (images)": config.ema_halflife_images,
        "seed": config.seed,
    }
    description = {
        **figures,
        "facts": facts,
        "preview": preview,
        "settings": to_dict(config),
        "data": asdict(config.data),
        "transform": transform,
        "images_seen": run.images_seen,
        "training_images": provenance.get("data", {}).get("number of images"),  # None if streamed
        "mixed_precision": precision,
        "skipped_steps": run.skipped_steps,
    }
    (folder / "training.json").write_text(json.dumps(description, indent=2))


def show_result(config: AutoencoderConfig | DiffusionConfig, result: Path) -> None:
    """Print the folder of a finished model, and log the commands that usually follow."""
    data = config.data
    if isinstance(config, AutoencoderConfig):
        words = ["train", "diffusion", "--config", "CONFIG", "--autoencoder", result, "--data.path", data.path]
        following = [[*words, "--data.validation_split", data.validation_split or "null"]]
    else:
        following = [["sample", result], ["evaluate", "generation", result, "--data", data.path]]
    for words in following:
        logger.info("next: %s", shlex.join(["looc-ldm", *map(str, words)]))
    print_once(result)


def validation_data(data: DataConfig) -> dict[str, str]:
    """Return the data set and split of the validation set, with the keys that `looc-ldm evaluate` records use."""
    return {"data": data.path, "split": data.validation_split or f"{data.split}, held out"}


def first_stage_figures(vqvae: LooCVQModel) -> dict:
    """Return the figures in the training.json of a loaded first stage; nothing if there are none."""
    training = training_record(vqvae)
    return training.get("validation") or training.get("first_stage") or {}
