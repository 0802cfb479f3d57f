"""Load models and images, and check paths before any work, for several commands."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

from looc_ldm.commands.options import DataOptions, Encode
from looc_ldm.images.config import DataConfig
from looc_ldm.images.image_set import ImageSet, load_image_set
from looc_ldm.images.pixels import MODES
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.fingerprint import model_fingerprint
from looc_ldm.models.loading import load_autoencoder, model_folder
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.utils.cpu import use_fastest_threads
from looc_ldm.utils.errors import DataError, ModelError, UserError
from looc_ldm.utils.files import check_folder


def load_model(name: str, device: torch.device, dtype: str = "float32") -> tuple[LooCVQModel, str]:
    """Return an autoencoder of images, and the fingerprint of its weights as they are stored."""
    model = load_autoencoder(name)
    if model.config.in_channels not in MODES:
        raise ModelError(f"images have 1 (grey) or 3 channels, {name!r} asks for {model.config.in_channels}.")
    fingerprint = model_fingerprint(model)
    model = cast(model, device, dtype)
    side = min(model.config.sample_size, 128)
    image = torch.zeros(1, model.config.in_channels, side, side, dtype=model.dtype)
    _use_fastest_threads(device, lambda: model(image))
    return model, fingerprint


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


def load_images(data: str, options: DataOptions | Encode, name: str, model: LooCVQModel) -> ImageSet:
    """Return square images for the model `name`; by default of the side and the fit of its training.

    Raises:
        UserError: The model cannot take images of this side, or the data cannot be read.
    """
    resolution = options.resolution or model.config.sample_size
    model.bits_per_image(resolution, resolution)  # refuses a side that the model cannot take
    fit = options.fit or fit_in_training(name)
    return square_images(data, options.split, resolution, fit, model.config.in_channels)


def square_images(data: str, split: str | None, resolution: int, fit: str, channels: int) -> ImageSet:
    """Return images of one size; if no split is given, test, validation, or the first there is."""
    fit = "crop" if fit == "random_crop" else fit  # random only in training
    images = load_image_set(DataConfig(path=data, split=split or "", resolution=resolution, fit=fit), channels)
    if not len(images):
        raise DataError(f"no images in {data!r}, split {images.config.split!r}.")
    return images


def fit_in_training(name: str) -> str:
    """Return `fit` of the model's training, from the training.json in its folder; else "crop"."""
    file = model_folder(name) / "training.json"
    try:
        return json.loads(file.read_text())["data"]["fit"] if file.is_file() else "crop"
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{str(file)!r} does not state data.fit: give --fit.") from None


def rate_of(model: LooCVQModel, images: ImageSet | None) -> tuple[float, int]:
    """Return the bits per image, and its pixels without padding; by default for images of the model's own size."""
    side, size = (images.config.resolution, images.content_size) if images else (model.config.sample_size, None)
    return model.bits_per_image(side, side), math.prod(size or (side, side))


def data_of(images: ImageSet) -> dict[str, str]:
    """Return the data that was measured, for the record."""
    return {"data": images.config.path, "split": images.config.split, "fit": images.config.fit}


def check_file(file: Path | None) -> None:
    """Refuse, before any work, a file that cannot be written."""
    if file is not None:
        if file.is_dir():
            raise UserError(f"cannot write {str(file)!r}: it is a folder.")
        check_folder(file.parent)
