"""Start training from a finished model instead of random weights (`init_from`).

The networks are those of the finished model. The config's `model` or `unet` may leave them out or repeat them; a
different value is an error, since the weights would not fit.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.loading import load_autoencoder
from looc_ldm.pipelines.loading import load_pipeline
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.config_parsing import construct
from looc_ldm.training.denoiser import Denoiser
from looc_ldm.utils.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)

# Arguments of a LooCVQModel that decide how it learns, and not the meaning of its weights. The config's values hold.
LEARNING_ARGUMENTS = {
    "sample_size",
    "commitment_weight",
    "anchor",
    "usage_decay",
    "codebook_update",
    "gradient",
}
# Arguments of a UNet that follow from the data.
DATA_ARGUMENTS = {"sample_size", "in_channels", "out_channels", "num_class_embeds", "cross_attention_dim"}
CLASS_WEIGHTS = ("unet.class_embedding.", "class_embedding.")


def autoencoder_from(config: AutoencoderConfig) -> LooCVQModel:
    """Load the model in the folder or hub repository `config.init_from`, to train it with the settings of the config.

    Raises:
        ConfigError: The config describes a different network.
        ModelError: There is no autoencoder.
    """
    trained = load_autoencoder(config.init_from)
    of_checkpoint = {name: value for name, value in trained.config.items() if not name.startswith("_")}
    _refuse_differences(config.model, of_checkpoint, LEARNING_ARGUMENTS, "model")
    arguments = {**of_checkpoint, "sample_size": config.data.resolution, **config.model}
    # Measured on the data of this training.
    arguments |= {name: None for name in ("scaling_factor", "latents_mean", "latents_std") if name in arguments}
    model = construct(type(trained), arguments, "model")
    model.load_state_dict(trained.state_dict())
    return model


def denoiser_from(config: DiffusionConfig, vqvae: LooCVQModel, classes: list[str]) -> Denoiser:
    """Load the UNet and class token of the pipeline `config.init_from`; different classes get random embeddings.

    Args:
        vqvae (`LooCVQModel`): The first stage, on whose latents it is trained.
        classes (`list[str]`): Names of the classes that are trained on.

    Raises:
        ConfigError: The config describes a different network or prediction, or its latents have other channels.
        ModelError: There is no pipeline.
    """
    trained = load_pipeline(config.init_from)
    kind = type(trained.unet).__name__
    settings = {"type": "UNet2DModel", **config.unet} if config.unet else {"type": kind}
    if settings["type"] != kind:
        raise ConfigError(f"unet.type is {settings['type']} in the config and {kind} in {config.init_from!r}.")
    of_checkpoint = {name: value for name, value in trained.unet.config.items() if not name.startswith("_")}
    _refuse_differences(config.unet, {**of_checkpoint, "type": kind}, DATA_ARGUMENTS | {"dropout"}, "unet")
    unet = {name: value for name, value in of_checkpoint.items() if name not in DATA_ARGUMENTS}
    dimension = config.class_embedding_dim
    if trained.class_embedding is not None:
        dimension = trained.class_embedding.config.embedding_dim
    settings = replace(config, unet={"type": kind, **unet, **config.unet}, class_embedding_dim=dimension)
    denoiser = Denoiser.from_config(settings, vqvae, len(classes))

    channels = trained.unet.config.in_channels
    if denoiser.unet.config.in_channels != channels:
        raise ConfigError(
            f"init_from={config.init_from!r} denoises latents of {channels} channels, those of the autoencoder have "
            f"{denoiser.unet.config.in_channels}."
        )
    predicts, asked = trained.config.prediction_type, config.scheduler.get("prediction_type", "epsilon")
    if predicts != asked:
        raise ConfigError(f"scheduler.prediction_type is {asked} in the config and {predicts} in init_from.")

    # The pipeline's weights, except for embeddings of other classes
    weights = {f"unet.{name}": tensor for name, tensor in trained.unet.state_dict().items()}
    if trained.class_embedding is not None:
        weights |= {f"class_embedding.{name}": tensor for name, tensor in trained.class_embedding.state_dict().items()}
    same_classes = (
        list((trained.config.id2label or {}).values()) == classes
        and trained.config.null_class_label == denoiser.null_label
    )
    if not same_classes:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(CLASS_WEIGHTS)}
        logger.warning("init_from=%r has different classes: their embeddings are random.", config.init_from)
    missing, surplus = denoiser.load_state_dict(weights, strict=False)
    wrong = [*surplus, *(name for name in missing if same_classes or not name.startswith(CLASS_WEIGHTS))]
    if wrong:
        raise ModelError(f"the weights in {config.init_from!r} do not fit: {wrong[0]} and {len(wrong) - 1} more.")
    return denoiser


def _refuse_differences(given: dict, of_checkpoint: dict, may_differ: set[str], what: str) -> None:
    """Raise ConfigError if the config and the finished model describe different networks."""
    plain = lambda value: tuple(value) if isinstance(value, list) else value  # noqa: E731
    for name in given:
        value, trained = plain(given[name]), plain(of_checkpoint.get(name))
        if name in of_checkpoint and name not in may_differ and value != trained:
            raise ConfigError(
                f"{what}.{name} is {value!r} in the config and {trained!r} in init_from; "
                f"--{what} '{{}}' takes the network of the checkpoint."
            )
