"""What the commands of `looc-ldm` share. Heavy packages are imported inside the functions."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from looc_ldm.devices import choose_device
from looc_ldm.errors import UserError
from looc_ldm.files import check_folder


def load_pipeline(options: argparse.Namespace):
    import torch

    from looc_ldm.pipelines.loading import load_pipeline as load

    device = choose_device(options.device)
    return load(options.model, getattr(torch, options.dtype)).to(device)


def by_index(label: int | str | None, pipe) -> int | str | None:
    """A label as typed: an index, unless it is a name. That of no class is refused: what is drawn is a mixture."""
    is_index = isinstance(label, str) and label.isdecimal() and label not in pipe.labels
    if is_index and int(label) == pipe.config.null_class_label:
        raise UserError(
            f"--labels: {label} stands for no class; classes are the other numbers in [0, {pipe.num_class_embeds}), "
            "or their names."
        )
    return int(label) if is_index else label


def draw_samples(pipe, labels: list, options: argparse.Namespace):
    """Images from a pipeline, one by one, as the options of `add_sampling_options` say."""
    from looc_ldm.pipelines.sampling import sample_images

    return sample_images(
        pipe,
        labels,
        seed=options.seed,
        batch_size=options.batch_size,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
    )


def load_images(options: argparse.Namespace, model):
    resolution = options.resolution or model.config.sample_size
    with as_user_errors(ValueError):
        model.bits_per_image(resolution, resolution)  # refuses a side that the model cannot take
    return square_images(options, options.model, resolution, model.config.in_channels)


def square_images(options: argparse.Namespace, model: str, resolution: int, channels: int):
    """The images that the options of `add_data_options` name; square as in the training of `model`, if left open."""
    from looc_ldm.training.config import DataConfig
    from looc_ldm.training.data import load_image_set

    fit = options.fit or fit_in_training(model)
    fit = "crop" if fit == "random_crop" else fit  # what that is where nothing is trained
    config = DataConfig(path=options.data, split=options.split or "", resolution=resolution, fit=fit)
    return load_image_set(config, channels)


def fit_in_training(name: str) -> str:
    """How images became square when the model was trained, from the training.json beside its weights; else "crop"."""
    from looc_ldm.loading import model_folder

    file = model_folder(name) / "training.json"
    try:
        return json.loads(file.read_text())["data"]["fit"] if file.is_file() else "crop"
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{str(file)!r} does not say how images became square: give --fit.") from None


def model_and_images(options: argparse.Namespace):
    import torch

    from looc_ldm.loading import load_autoencoder

    device = choose_device(options.device)
    model = load_autoencoder(options.model, getattr(torch, options.dtype)).to(device)
    return model, load_images(options, model)


def rate_of(model, images) -> tuple[float, int]:
    """Bits an image costs, and pixels it has; padding costs bits, but is nothing anybody wanted."""
    side = images.config.resolution
    return model.bits_per_image(side, side), math.prod(images.content_size or (side, side))


def data_of(images) -> dict[str, str]:
    """What was measured on, for the record."""
    return {"data": images.config.path, "split": images.config.split, "fit": images.config.fit}


def inception_features(options: argparse.Namespace):
    from looc_ldm.metrics import InceptionFeatures

    with as_user_errors(ValueError, FileNotFoundError):
        features = InceptionFeatures(options.feature_layer, options.inception_weights)
        try:
            features.check()
        except ConnectionError as error:
            raise UserError(f"--inception-weights: {error}") from error
        return features


@contextmanager
def as_user_errors(*types: type[Exception]) -> Iterator[None]:
    """Errors of these types, raised by our own checks of input, are shown as one line."""
    try:
        yield
    except types as error:
        raise UserError(" ".join(str(error).split())) from error


def check_file(file: Path | None) -> None:
    """Refuse, before any work, a file that cannot be written. None is no file."""
    if file is None:
        return
    if file.is_dir():
        raise UserError(f"cannot write {str(file)!r}: it is a folder.")
    check_folder(file.parent)


def fingerprints_for(options: argparse.Namespace, generation: bool = False) -> dict[str, str]:
    """Of which model the figures are, for a record of them; nothing where none is written."""
    from looc_ldm.loading import model_folder
    from looc_ldm.stored_fingerprints import stored_fingerprints

    if options.output is None:
        return {}
    folder = model_folder(options.model, component=None if generation else "vqvae")
    return stored_fingerprints(folder, generation)
