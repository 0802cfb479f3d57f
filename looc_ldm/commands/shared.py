"""Load models and images, and check paths before any work, for several commands."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from looc_ldm.commands.options import DataOptions, Encode
from looc_ldm.images.config import DataConfig
from looc_ldm.images.image_set import ImageSet, load_image_set, spread
from looc_ldm.images.open import names_of_split
from looc_ldm.images.pixels import MODES
from looc_ldm.images.source import SPLIT_NAMES
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.fingerprint import model_fingerprint
from looc_ldm.models.loading import load_autoencoder, training_record
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.utils.cpu import use_fastest_threads
from looc_ldm.utils.errors import DataError, ModelError, UserError
from looc_ldm.utils.files import check_folder

logger = logging.getLogger(__name__)


def load_model(name: str, device: torch.device, dtype: str = "float32") -> tuple[LooCVQModel, str]:
    """Return an autoencoder of images, and the fingerprint of its weights as they are stored."""
    model = load_autoencoder(name)
    if model.config.in_channels not in MODES:
        raise ModelError(f"images have 1 (grey) or 3 channels, but {name!r} expects {model.config.in_channels}.")
    fingerprint = model_fingerprint(model)
    return cast(model, device, dtype), fingerprint


def use_fastest_threads_to_reconstruct(model: LooCVQModel) -> None:
    """Take the number of threads that reconstructs an image fastest, on a CPU."""
    side = min(model.config.sample_size, 128)
    image = torch.zeros(1, model.config.in_channels, side, side, dtype=model.dtype)
    _use_fastest_threads(model.device, lambda: model(image))


def use_fastest_threads_to_sample(pipe: LooCLDMPipeline, batch_size: int) -> None:
    """Take the number of threads that computes one pass of the UNet fastest, on a CPU."""
    noise = torch.zeros(batch_size, *pipe.latent_shape, dtype=pipe.unet.dtype)
    labels = torch.zeros(batch_size, dtype=torch.int64) if pipe.num_class_embeds else None
    _use_fastest_threads(pipe.device, lambda: pipe.unet(noise, 0, **pipe.prepare_conditions(labels)[0]))


def _use_fastest_threads(device: torch.device, step: Callable[[], object]) -> None:
    if device.type == "cpu" and os.environ.get("WORLD_SIZE", "1") == "1":  # several processes share the cores
        with torch.inference_mode():
            use_fastest_threads(step, seconds=0.1)


def cast(network: nn.Module, device: torch.device, dtype: str) -> nn.Module:
    """Move and cast a network. Its quantizer stays float32, about which diffusers' own `to` would warn."""
    return nn.Module.to(network, device, getattr(torch, dtype))


def load_images(data: str, options: DataOptions | Encode, model: LooCVQModel) -> ImageSet:
    """Return square images for a model; `resolution` and `fit` default to the ones it was trained with.

    If the data it was trained on has no split `validation`, that name means the images held out in training.

    Raises:
        UserError: The model cannot take images of this side, or the data cannot be read.
    """
    resolution = options.resolution or model.config.sample_size
    model.bits_per_image(resolution, resolution)  # refuses a side that the model cannot take
    trained_on = training_record(model).get("data", {})
    arguments = resolution, options.fit or trained_on.get("fit", "crop"), model.config.in_channels
    try:
        return square_images(data, options.split, *arguments)
    except DataError:
        holds_out = _is_training_data(data, model) and trained_on["validation_split"] is None
        if not holds_out or SPLIT_NAMES.get(options.split) != "validation":
            raise
    images = square_images(data, trained_on["split"], *arguments)
    return _part_of(images, _held_out(images, model), "held out", model.config.in_channels)


def load_training_images(data: str | None, options: DataOptions, model: LooCVQModel) -> ImageSet:
    """Return the images of the split `train` as `load_images` does, by default those that the model was trained on.

    Raises:
        UserError: It is not known which images these are, or they cannot be read.
    """
    trained_on = training_record(model).get("data", {})
    data = data or trained_on.get("path")
    if data is None:
        raise UserError("memorization needs --training-data: the model does not say what it was trained on.")
    fit = options.fit or trained_on.get("fit", "crop")
    arguments = options.resolution or model.config.sample_size, fit, model.config.in_channels
    if not _is_training_data(data, model):
        return square_images(data, "train", *arguments)
    images = square_images(data, trained_on["split"], *arguments)
    if trained_on["validation_split"] is not None:
        return images
    kept = np.setdiff1d(np.arange(len(images)), _held_out(images, model))
    return _part_of(images, kept, "without those held out", model.config.in_channels)


def _held_out(images: ImageSet, model: LooCVQModel) -> np.ndarray:
    """Return the places of the images that the training held out of these."""
    chosen = spread(len(images), training_record(model)["data"]["validation_images"])
    if training_record(model).get("training_images") not in (None, len(images) - len(chosen)):
        raise DataError(
            f"{images.config.path!r} has changed since the training: which images were held out is not known."
        )
    return chosen


def _part_of(images: ImageSet, chosen: np.ndarray, name: str, channels: int) -> ImageSet:
    config = replace(images.config, split=f"{images.config.split}, {name}")
    return ImageSet(images.source.select(chosen), config, channels)


def warn_of_training_images(images: ImageSet, model: LooCVQModel) -> None:
    """Warn if the figures are measured on images that the model was trained on."""
    if _is_training_data(images.config.path, model):
        trained_on = training_record(model)["data"]
        if images.config.split in names_of_split(trained_on["split"]):
            held_out = trained_on["validation_split"] or "validation"
            message = "%s: the model was trained on these images; --split %s measures on those held out"
            logger.warning(message, images.config.path, held_out)


def _is_training_data(data: str, model: LooCVQModel) -> bool:
    path = training_record(model).get("data", {}).get("path")
    return path is not None and (data == path or (Path(data).is_dir() and Path(data).resolve() == Path(path).resolve()))


def square_images(data: str, split: str | None, resolution: int, fit: str, channels: int) -> ImageSet:
    """Return images of one size. The default split is test, else validation, else the first."""
    fit = "crop" if fit == "random_crop" else fit  # random only in training
    images = load_image_set(DataConfig(path=data, split=split or "", resolution=resolution, fit=fit), channels)
    if not len(images):
        raise DataError(f"no images in {data!r}, split {images.config.split!r}.")
    return images


def rate_of(model: LooCVQModel, images: ImageSet | None) -> tuple[float, int]:
    """Return the bits per image, and its pixels without padding; by default for images of the model's own size."""
    side, size = (images.config.resolution, images.content_size) if images else (model.config.sample_size, None)
    return model.bits_per_image(side, side), math.prod(size or (side, side))


def data_of(images: ImageSet) -> dict[str, str]:
    """Return the data set, split and fit of the measured images, as records store them."""
    return {"data": images.config.path, "split": images.config.split, "fit": images.config.fit}


def check_file(file: Path | None) -> None:
    """Raise UserError, before any work, if a file cannot be written."""
    if file is not None:
        if file.is_dir():
            raise UserError(f"cannot write {str(file)!r}: it is a folder.")
        check_folder(file.parent)
