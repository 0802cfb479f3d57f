"""Plan a training on photographs: what is in the folder, which preset, how fast it is, and how many images each stage
gets in the hours given.

The plan is made once and stored: whatever the machine's speed is later, the same command goes on to the same end.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from looc_ldm.images.config import DataConfig
from looc_ldm.images.image_set import ImageReader, spread
from looc_ldm.images.open import open_sources, split_name
from looc_ldm.images.pixels import read_bytes
from looc_ldm.images.source import Source
from looc_ldm.images.unreadable import too_many
from looc_ldm.training import autoencoder, diffusion
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig, RunConfig
from looc_ldm.training.log import progress
from looc_ldm.training.moments import SCALING_IMAGES
from looc_ldm.utils.devices import choose_device
from looc_ldm.utils.errors import DataError, UnreadableImage
from looc_ldm.utils.files import read_json, replace_text

RESOLUTIONS = (64, 128, 256)
LEAST_GIB = {256: 22, 128: 7}  # memory of an accelerator; docs/own_images.md has the presets' needs. Others: 64
HELD_OUT = 200  # images, at most, and a tenth of all at most
CHECKED_IMAGES, CHECK_SECONDS = 2000, 20  # limits of decoding images to find sizes and colours
MOST_UNREADABLE = 0.1  # share of the images

STAGE_1, STAGE_2, REST = 0.45, 0.50, 0.05  # shares of the hours; the rest is latents, samples, figures
MOST_REST = 0.5  # however short the hours are
MEASURED_IMAGES = 64
MOST_MEASURING_SECONDS = 15  # for each stage, without its start
CHECKPOINT_SECONDS = 120  # between two checkpoints, at most
GRIDS = 8  # in a run, at most
GRID_SHARE = 0.05  # share of stage 2's time that its grids may take
MEMORIZED = 300  # times that stage 2 sees an image


# The folder -----------------------------------------------------------------------------------------------------------


@dataclass
class Photos:
    """Findings in a folder of images."""

    source: Source  # the images to train on, and those held out of them
    validation_split: str | None  # the split that is held out, if the folder has one
    held_out: int
    channels: int  # 1 if all images that were decoded are grey, else 3
    sides: list[tuple[int, int]]  # width and height of those that were decoded
    unreadable: list[str]  # name and reason

    @property
    def training_images(self) -> int:
        return len(self.source) - (0 if self.validation_split else self.held_out)

    @property
    def side(self) -> int:
        """The median of the shorter sides."""
        return int(np.median([min(sides) for sides in self.sides]))

    def lines(self) -> list[str]:
        """Return a few lines for the user."""
        held_out = f"{self.held_out} of the split {self.validation_split}" if self.validation_split else ""
        lines = [f"{len(self.source):,} images; held out: {held_out or f'{self.held_out:,} of them'}"]
        names = self.source.classes
        counts = np.bincount(self.source.labels() + 1, minlength=len(names) + 1)[1:]
        if names:
            shown = [f"{name} {count:,}" for name, count in zip(names, counts, strict=True)][:12]
            lines.append(f"{len(names)} classes: {', '.join(shown)}{', ...' if len(names) > len(shown) else ''}")
        else:
            lines.append("no classes (one sub-folder per class would make the model class-conditional)")
        (least, _), (most, _) = (pick((min(sides), sides) for sides in self.sides) for pick in (min, max))
        colour = "grey" if self.channels == 1 else "colour"
        lines.append(f"{colour}; shorter sides of {least} to {most} pixels, the median {self.side}")
        for problem in self.unreadable[:5]:
            lines.append(f"left out: {problem}")
        checked = len(self.sides) + len(self.unreadable)
        lines.append(f"{checked:,} images were decoded to look at them: {len(self.unreadable)} cannot be read")
        return lines


def look_at(folder: str, with_classes: bool) -> Photos:
    """Look at the images of a folder.

    Raises:
        DataError: There are no images, or too few or too many of them cannot be read.
    """
    config = DataConfig(path=folder, label_column="label" if with_classes else "")
    splits = open_sources(config)
    source = splits[split_name(splits, "split", config)]
    validation_split = next((name for name in ("validation", "test") if name in splits), None)
    held_out = len(splits[validation_split]) if validation_split else len(source) // 10
    held_out = max(1, min(HELD_OUT, held_out))
    if len(source) < 4:
        raise DataError(f"{folder} has {len(source)} images to train on, at least 4 are needed.")

    reader = ImageReader(config, channels=3)
    grey, sides, unreadable, began = True, [], [], time.monotonic()
    order = np.random.default_rng(0).permutation(len(source))[:CHECKED_IMAGES]
    for index in progress(order.tolist(), "looking at the images", "img"):
        try:
            image = reader.decode(source.read(index))
        except UnreadableImage as error:
            unreadable.append(str(error))
            continue
        sides.append(image.size)
        small = np.asarray(image.resize((32, 32)))
        grey = grey and bool((small == small[..., :1]).all())
        if time.monotonic() - began > CHECK_SECONDS:
            break
    if problem := too_many(len(unreadable), len(unreadable) + len(sides), MOST_UNREADABLE):
        raise DataError(f"{problem.split(',')[0]}: {unreadable[0]}")
    return Photos(source, validation_split, held_out, 1 if grey else 3, sides, unreadable)


# The preset -----------------------------------------------------------------------------------------------------------


def choose_resolution(memory_gib: float | None, side: int) -> int:
    """Return the resolution of the largest preset that fits the accelerator and the images.

    Args:
        memory_gib: Memory of the accelerator; None on a CPU.
        side: Usual shorter side of the images in pixels. The resolution is at most 1.5 times as large, unless even
            the smallest preset is larger.
    """
    fits = [resolution for resolution, least in LEAST_GIB.items() if (memory_gib or 0) >= least]
    return max([resolution for resolution in fits if side * 1.5 >= resolution], default=RESOLUTIONS[0])


def accelerator_gib() -> float | None:
    """Return the memory of the CUDA device in GiB; None without one."""
    device = choose_device(None)
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None


# The plan -------------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Decisions of the first start, stored as JSON."""

    resolution: int
    channels: int
    classes: str  # `auto` or `none`, as asked for
    conditional: bool  # whether there are classes
    validation_split: str | None
    held_out: int
    training_images: int
    lpips_weights: str | None  # file of VGG16's weights; None leaves LPIPS out of the loss
    found: list[str]  # lines on the folder
    hours: float  # for everything, as asked for last
    version: str  # looc-ldm's
    images_per_second: dict[str, float] = field(default_factory=dict)  # each stage's, measured
    autoencoder_images: int = 0  # training images of stage 1, repeats counted
    diffusion_images: list[int] = field(default_factory=list)  # the same of each run of stage 2
    rest_seconds: float = 0.0  # estimated, for latents, samples and figures

    @classmethod
    def read(cls, file: Path) -> Plan:
        try:
            return cls(**read_json(file))
        except TypeError:
            raise DataError(f"{str(file)!r} is damaged, or of a different version: give another --output.") from None

    def write(self, file: Path) -> None:
        replace_text(file, json.dumps(asdict(self), indent=1) + "\n")

    @property
    def repeats(self) -> float:
        """The number of times that stage 2 sees each image."""
        return sum(self.diffusion_images) / self.training_images

    def line(self) -> str:
        """Return the plan as one line for the user."""

        def part(images: int, speed: float) -> str:
            repeats = f"each {images / self.training_images:.3g} times"
            return f"{images:,} images ({repeats}) at {speed:.3g} a second, {images / speed / 60:.1f} min"

        first = part(self.autoencoder_images, self.images_per_second["autoencoder"])
        second = part(sum(self.diffusion_images), self.images_per_second["diffusion"])
        return f"{self.hours:g} h: stage 1 on {first}; stage 2 on {second}"

    def warnings(self) -> list[str]:
        """Return warnings: too few hours for the latents, or too few images for the hours."""
        warnings = []
        minutes, rest = 60 * self.hours, self.rest_seconds / 60
        if rest > MOST_REST * minutes:
            warnings.append(
                f"latents, samples and figures take about {rest:.0f} min. Training keeps half of the hours, so all "
                f"takes about {(1 - MOST_REST) * minutes + rest:.0f} min. Give more hours or a smaller --resolution."
            )
        if self.repeats > MEMORIZED:
            warnings.append(
                f"stage 2 sees each of the {self.training_images:,} images {self.repeats:,.0f} times: it will know "
                "them by heart and draw these rather than new ones. More photographs help, or fewer hours."
            )
        return warnings


def split_hours(plan: Plan, batch_sizes: tuple[int, int], evaluations: int) -> None:
    """Fill in how many images each stage is trained on, from the hours and the measured speeds.

    Args:
        plan: The plan, with its speeds.
        batch_sizes: Batch sizes of both stages. The numbers of images are multiples of them.
        evaluations: Times that the UNet is evaluated on one image after training, for samples and figures.
    """
    speed_1, speed_2 = plan.images_per_second["autoencoder"], plan.images_per_second["diffusion"]
    seconds = plan.hours * 3600
    # Latents, with mirrored ones, and the scaling factor. The encoder's forward pass is about a twelfth of a training
    # step, the UNet's a third.
    encoded = 2 * plan.training_images + min(plan.training_images, SCALING_IMAGES) + 2 * plan.held_out
    plan.rest_seconds = rest = encoded / (12 * speed_1) + evaluations / (3 * speed_2)
    training = seconds * (1 - min(max(REST, rest / seconds), MOST_REST))
    share = STAGE_1 / (STAGE_1 + STAGE_2)
    plan.autoencoder_images = whole_batches(training * share * speed_1, batch_sizes[0])
    plan.diffusion_images = [whole_batches(training * (1 - share) * speed_2, batch_sizes[1])]


def whole_batches(images: float, batch_size: int) -> int:
    """Return the nearest number of images in whole batches, at least one batch."""
    return max(1, round(images / batch_size)) * batch_size


def stretched(config: AutoencoderConfig | DiffusionConfig, images: int, per_second: float) -> dict[str, int]:
    """Return the settings of a run that depend on its length.

    Args:
        config: Its other settings.
        images: Its length.
        per_second: Its speed.
    """
    grids = GRIDS
    if isinstance(config, DiffusionConfig):  # a grid takes as long as so many images of training
        steps = config.preview_steps * (2 if config.class_conditional else 1)
        grids = max(1, min(GRIDS, int(GRID_SHARE * images / (diffusion.PREVIEW_IMAGES * steps / 3))))

    def batches(amount: float) -> int:
        return max(1, int(amount) // config.batch_size) * config.batch_size

    return {
        "total_images": images,
        "ema_halflife_images": batches(images / 20),
        "log_every_images": batches(images / 200),
        "preview_every_images": batches(math.ceil(images / grids)),
        "checkpoint_every_images": batches(min(images / 4, CHECKPOINT_SECONDS * per_second)),
        "optimizer.warmup_images": batches(images / 20),
    }


# Speed ----------------------------------------------------------------------------------------------------------------


def measure_speeds(
    first: AutoencoderConfig, second: DiffusionConfig, source: Source, folder: Path, seconds: float
) -> dict[str, float]:
    """Return the images per second of both trainers, in short runs on some of the images.

    Args:
        first, second: The settings; the second stage runs on the first one's random weights.
        folder: A folder for these runs, which is removed.
        seconds: Time to measure each for.
    """
    shutil.rmtree(folder, ignore_errors=True)
    images = folder / "images"
    for number in spread(len(source), MEASURED_IMAGES).tolist():
        stored = source.read(number)
        file = images / (str(stored.label) if source.classes else "") / f"{number}.jpg"  # whatever its format is
        file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(UnreadableImage):  # a link that leads nowhere
            file.write_bytes(read_bytes(stored.content, stored.name))
    data = {"path": str(images), "validation_split": None, "validation_images": 2, "max_unreadable_share": 1.0}
    first = replace(first, output_dir=str(folder / "autoencoder"), data=replace(first.data, **data))
    second = replace(second, output_dir=str(folder / "diffusion"), data=replace(second.data, **data), preview_steps=1)
    second = replace(second, autoencoder=str(folder / "autoencoder" / "model"), latents=None)
    try:
        logging.disable(logging.WARNING)
        return {
            "autoencoder": _images_per_second(autoencoder.train, first, seconds),
            "diffusion": _images_per_second(diffusion.train, second, seconds),
        }
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder, ignore_errors=True)


def _images_per_second(train: Callable[[RunConfig], Path], config: RunConfig, seconds: float) -> float:
    # A few small batches: on a CPU they may be slow enough. They only count if they take the whole time, because beside
    # other processes a short trial can show a small part of the speed.
    batch_size = max(1, config.batch_size // 4)
    config = replace(config, push_to_hub=None, tracker="none")
    trial = replace(config, batch_size=batch_size, gradient_accumulation_steps=1)
    images, enough = 4 * batch_size, seconds
    while True:
        shutil.rmtree(config.output_dir, ignore_errors=True)
        train(replace(trial, total_images=images, log_every_images=images))
        speed = last_speed(Path(config.output_dir))
        if images / speed >= enough:
            return speed
        trial, enough = config, seconds / 2
        images = max(2 * config.batch_size, whole_batches(seconds * speed, config.batch_size))


def last_speed(run: Path) -> float:
    """Return the images per second of a run: the median of its last lines."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float(np.median([line["images_per_second"] for line in lines if "images_per_second" in line][-20:]))


def loader_processes() -> int:
    """Return a number of processes that read images, for this machine."""
    cores = os.cpu_count() or 1
    return 0 if cores <= 2 else min(8, cores // 2)
