"""What both trainers say about a finished model, beside its weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from looc_ldm.training.config import RunConfig
from looc_ldm.training.run import Run
from looc_ldm.training.transforms import describe_transform


def write_description(folder: Path, config: RunConfig, run: Run, **figures) -> None:
    """Write `training.json`: the data and its exact transform, on which every FID depends, progress, and figures."""
    description = {
        **figures,
        "data": asdict(config.data),
        "transform": describe_transform(config.data),
        "images_seen": run.images_seen,
        "mixed_precision": run.accelerator.mixed_precision,
        "skipped_steps": run.skipped_steps,
    }
    (folder / "training.json").write_text(json.dumps(description, indent=2))
