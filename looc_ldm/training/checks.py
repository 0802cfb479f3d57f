"""Refuse settings that do not go together or cannot work later, before a run writes anything."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

from looc_ldm.images.config import DataConfig
from looc_ldm.images.open import folder_of
from looc_ldm.metrics.extractors import InceptionFeatures
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig, EvaluationConfig
from looc_ldm.utils.errors import ConfigError, one_line
from looc_ldm.utils.files import check_folder

logger = logging.getLogger(__name__)


def check_config(config: AutoencoderConfig | DiffusionConfig) -> None:
    """Refuse settings that do not go together, and an output folder that cannot be used.

    Raises:
        UserError: One line that names the settings.
    """
    data, output_dir = config.data, Path(config.output_dir)
    check_folder(output_dir)
    images = folder_of(data)
    if images is not None and output_dir.resolve().is_relative_to(images.resolve()):
        raise ConfigError(
            f"output_dir={config.output_dir!r} is inside data.path={data.path!r}: the run's own image grids would "
            "become training images. Give an output_dir elsewhere."
        )
    if config.keep_every_images is not None and config.keep_every_images % config.checkpoint_every_images:
        raise ConfigError(
            f"keep_every_images must be a multiple of checkpoint_every_images={config.checkpoint_every_images}, "
            f"got {config.keep_every_images}."
        )
    if config.batch_size % config.gradient_accumulation_steps:
        raise ConfigError(
            f"batch_size={config.batch_size} must be a multiple of "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}."
        )
    if config.tracker == "wandb" and find_spec("wandb") is None:
        raise ConfigError("tracker=wandb needs the package wandb: pip install wandb.")
    if isinstance(config, DiffusionConfig):
        if config.cache_latents:
            check_cacheable(data)
    elif config.loss.adversarial_weight:
        layers = config.loss.discriminator_layers
        smallest = 3 * 2**layers  # each strided layer halves the side; of the rest, two convolutions of 4x4 take 2
        if data.resolution < smallest:
            raise ConfigError(
                f"loss.discriminator_layers={layers} needs images of at least {smallest} pixels, but "
                f"data.resolution={data.resolution}."
            )


def warn_of_late_settings(config: AutoencoderConfig | DiffusionConfig) -> None:
    """Warn of settings that would take effect only after the last image."""
    starts = {"optimizer.warmup_images": config.optimizer.warmup_images}
    if isinstance(config, AutoencoderConfig) and config.loss.adversarial_weight:
        starts["loss.adversarial_start_images"] = config.loss.adversarial_start_images
    late = [f"{name}={images}" for name, images in starts.items() if images >= config.total_images]
    if late:
        logger.warning("%s: the run ends before, at total_images=%d", " and ".join(late), config.total_images)


def latent_side(model: LooCVQModel, data: DataConfig) -> int:
    """Return height and width of the latents. Raises ConfigError for a resolution that f does not divide."""
    f = model.downsampling_factor
    if data.resolution % f:
        raise ConfigError(
            f"data.resolution must be a multiple of {f}, as the autoencoder needs, got {data.resolution}."
        )
    return data.resolution // f


def check_cacheable(data: DataConfig) -> None:
    """Raise ConfigError for data that cannot be encoded once and for all."""
    if data.streaming or data.fit == "random_crop":
        setting = "data.streaming=true" if data.streaming else "data.fit=random_crop"
        raise ConfigError(f"latents cannot be cached with {setting}; set cache_latents=false to encode in the loop.")


def check_evaluation(config: AutoencoderConfig | DiffusionConfig) -> None:
    """Refuse an evaluation that could not be made later. Downloads the Inception network if asked.

    Raises:
        ConfigError: There is nothing to measure, too little to measure it on, or no Inception network.
    """
    evaluation = config.evaluation
    if evaluation.every_images is None:
        return
    if not evaluation.fid:
        if isinstance(config, DiffusionConfig):
            raise ConfigError("evaluation.every_images: stage 2 measures nothing without evaluation.fid=true.")
        return
    if evaluation.images < 2:
        raise ConfigError(f"evaluation.images must be at least 2 for FID, got {evaluation.images}.")
    if isinstance(config, AutoencoderConfig) and config.data.validation_images < 2:
        raise ConfigError("evaluation.fid=true needs data.validation_images of at least 2, got 1.")
    try:
        features_of_config(evaluation).load("cpu")
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise ConfigError(
            f"evaluation.inception_weights: {one_line(error)} (evaluation.feature_layer={evaluation.feature_layer})"
        ) from None


def features_of_config(evaluation: EvaluationConfig) -> InceptionFeatures:
    """Return the features that a config measures with. Raises FileNotFoundError if the weights are not there."""
    weights = evaluation.inception_weights
    return InceptionFeatures(str(evaluation.feature_layer), None if weights is None else Path(weights))
