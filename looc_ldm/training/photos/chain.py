"""Train both stages one after the other, sample, and evaluate on the held-out images."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from PIL import Image

from looc_ldm.images.image_set import ImageSet, spread
from looc_ldm.metrics import InceptionFeatures, evaluate_reconstruction, fid_and_kid
from looc_ldm.models.loading import load_autoencoder
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.pipelines.sampling import sample_images
from looc_ldm.training import autoencoder, diffusion
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.data import float_batches, load_image_sets
from looc_ldm.training.validation import reconstruction_grid
from looc_ldm.utils.devices import choose_device
from looc_ldm.utils.files import read_json, replace_text

MOST_CLASSES = 20  # with samples in the report
SAMPLES_PER_CLASS = 10
SAMPLING_STEPS = 25
GUIDANCE_SCALE = 2.0
SAVE_SECONDS = 5  # time that a kill takes off the count, at most

Log = Callable[[str], object]


class TimeSpent:
    """Seconds spent on each part, summed over interruptions in a JSON file.

    Attributes:
        seconds (`dict[str, float]`): By part.
    """

    def __init__(self, file: Path):
        self.file = file
        self.seconds: dict[str, float] = read_json(file) if file.is_file() else {}

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """Add the duration of a block to a part's seconds. Write it every few seconds, as the process may be killed."""
        before, began, over = self.seconds.get(part, 0.0), time.monotonic(), threading.Event()

        def write() -> None:
            self.seconds[part] = before + time.monotonic() - began
            replace_text(self.file, json.dumps(self.seconds))

        def keep_writing() -> None:
            while not over.wait(SAVE_SECONDS):
                write()

        thread = threading.Thread(target=keep_writing, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            write()


@dataclass
class Results:
    """A finished chain."""

    first: AutoencoderConfig
    stage_2_runs: list[DiffusionConfig]
    validation: ImageSet  # the held-out images
    classes: list[str]  # names of all classes; empty without
    samples: list[tuple[str, list[torch.Tensor]]]  # name of a row, and its images, uint8 (C, H, W)
    reconstructions: Image.Image  # held-out images above their reconstructions
    reconstruction: dict  # figures
    generation: dict  # figures; empty without Inception weights
    pipeline: Path
    seconds_spent: dict[str, float]  # by part


def run_chain(
    first: AutoencoderConfig,
    stage_2_runs: list[DiffusionConfig],
    spent: TimeSpent,
    log: Log,
    features: InceptionFeatures | None = None,
    lpips: nn.Module | None = None,
    shown_reconstructions: int = 10,
) -> Results:
    """Train, sample and evaluate. The same call resumes an interrupted one, and after the end only evaluates again.

    Args:
        first: Stage 1.
        stage_2_runs: The runs of stage 2, each of which may start from the one before.
        spent: Counts the time.
        log: Takes lines about the progress.
        features: The Inception network of FID and KID, which are left out without it.
        lpips: The network of LPIPS, which is left out without it.
        shown_reconstructions: Images in the grid of reconstructions.
    """
    log("1/4 training the autoencoder: images to codes, and back")
    with spent.counting("stage 1"):
        model_folder = autoencoder.train(first)
    for config in stage_2_runs:
        kind = "class-conditional UNet" if config.class_conditional else "UNet"
        log(f"2/4 training the {kind} on the autoencoder's latents")
        with spent.counting("stage 2"):
            pipeline_folder = diffusion.train(config)

    with spent.counting("samples and figures"):
        log("3/4 sampling")
        device = choose_device(None)
        pipe = LooCLDMPipeline.from_pretrained(pipeline_folder).to(device)
        settings = {"num_inference_steps": SAMPLING_STEPS}
        if pipe.config.null_class_label is not None:
            settings["guidance_scale"] = GUIDANCE_SCALE
        samples = labelled_samples(pipe, settings)

        log("4/4 evaluating")
        model = load_autoencoder(str(model_folder)).to(device)
        _, validation = load_image_sets(first.data, model.config.in_channels)
        named = {} if lpips is None else {"lpips_vgg": lpips.to(device)}
        batches = float_batches(validation)
        reconstruction = evaluate_reconstruction(model, batches, validation.content_size, features, named)
        generation = {}
        if features is not None:
            labels = sorted(pipe.config.id2label or {}) or [None]
            balanced = [labels[i % len(labels)] for i in range(len(validation))]
            drawn = sample_images(pipe, balanced, seed=2, batch_size=100, **settings)
            generation = fid_and_kid(drawn, validation.pixels(), features)
        reconstructions = reconstruction_grid([model], validation, shown_reconstructions)
    classes = list((pipe.config.id2label or {}).values())
    found = (classes, samples, reconstructions, reconstruction, generation)
    return Results(first, stage_2_runs, validation, *found, pipeline_folder, spent.seconds)


def labelled_samples(pipe: LooCLDMPipeline, settings: dict) -> list[tuple[str, list[torch.Tensor]]]:
    """Return rows of samples with their names: one per class, or some without a name."""
    names = pipe.config.id2label or {}
    known = sorted(names)
    rows = [known[i] for i in spread(len(known), MOST_CLASSES)] if known else [None] * 4
    labels = [label for label in rows for _ in range(SAMPLES_PER_CLASS)]
    drawn = list(sample_images(pipe, labels, seed=1, batch_size=50, **settings))
    per_row = [drawn[i : i + SAMPLES_PER_CLASS] for i in range(0, len(drawn), SAMPLES_PER_CLASS)]
    return [(names.get(label, ""), row) for label, row in zip(rows, per_row, strict=True)]
