"""Start training from a finished model, or the newest checkpoint of a run, instead of random weights (`init_from`).

The settings of the networks are taken from the model or run. The config's `model` or `unet` may leave them out or
repeat them. A different value is an error, since the weights would not fit.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors.torch import load_file

from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.initialization import initialize
from looc_ldm.models.loading import load_autoencoder
from looc_ldm.pipelines.loading import load_pipeline
from looc_ldm.training.checkpoints import EMA_FILE, checkpoints_in, images_of, read_state
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.config_parsing import construct, load_config
from looc_ldm.training.denoiser import Denoiser, make_scheduler
from looc_ldm.training.latent_fingerprint import class_names_digest
from looc_ldm.training.objectives import Objective
from looc_ldm.utils.errors import ConfigError, ModelError, one_line

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


@dataclass
class Start:
    """The newest checkpoint of the run that `init_from` names.

    Attributes:
        settings: The config of that run.
        live, averaged: Weights by name.
        images: Images that these were trained on.
        class_names: Digest of the names of its classes; None for streamed data.
    """

    settings: AutoencoderConfig | DiffusionConfig
    live: dict[str, torch.Tensor]
    averaged: dict[str, torch.Tensor]
    images: int
    class_names: str | None


def newest_weights(config: AutoencoderConfig | DiffusionConfig) -> Start | None:
    """Return the weights to start from if `init_from` is a run's folder; None for a finished model or no `init_from`.

    Raises:
        UserError: The run has no checkpoint, a damaged one, or settings of the other stage.
    """
    run = Path(config.init_from or "")
    if not config.init_from or not (run / "checkpoints").is_dir():
        return None
    checkpoints = checkpoints_in(run / "checkpoints")
    if not checkpoints:
        raise ModelError(f"init_from={config.init_from!r} is a run without checkpoints.")
    newest = max(checkpoints, key=images_of)
    state = read_state(newest)
    file, of_fsdp = newest / "model.safetensors", newest / f"{FSDP_MODEL_NAME}.bin"
    live = load_file(file) if file.is_file() else torch.load(of_fsdp, map_location="cpu", weights_only=True)
    return Start(
        settings=load_config(type(config), str(run / "config.yaml")),
        live={name.removeprefix("module."): tensor for name, tensor in live.items()},  # DDP's prefix
        averaged=load_file(newest / EMA_FILE),
        images=state["images_seen"] + state.get("earlier_images", 0),
        class_names=(state["made_from"] or {}).get("data", {}).get("names of classes"),
    )


def make_autoencoder(config: AutoencoderConfig, start: Start | None = None) -> LooCVQModel:
    """Return the model to train: a new one, or the one that `init_from` names.

    `start` is the result of `newest_weights`: the weights of a run if `init_from` is its folder, else None.
    """
    if config.init_from:
        return autoencoder_from(config, start)
    model = construct(LooCVQModel, {"sample_size": config.data.resolution, **config.model}, "model")
    initialize(model)
    return model


def autoencoder_from(config: AutoencoderConfig, start: Start | None = None) -> LooCVQModel:
    """Load the model that `config.init_from` names, to train it with the settings of the config.

    Raises:
        ConfigError: The config describes a different network.
        ModelError: There is no autoencoder.
    """
    if start is None:
        trained = load_autoencoder(config.init_from)
    else:
        trained = make_autoencoder(start.settings, newest_weights(start.settings))
        trained.load_state_dict(start.live)
    of_checkpoint = {name: value for name, value in trained.config.items() if not name.startswith("_")}
    _refuse_differences(config.model, of_checkpoint, LEARNING_ARGUMENTS, "model")
    arguments = {**of_checkpoint, "sample_size": config.data.resolution, **config.model}
    # Measured on the data of this training.
    arguments |= {name: None for name in ("scaling_factor", "latents_mean", "latents_std") if name in arguments}
    model = construct(type(trained), arguments, "model")
    model.load_state_dict(trained.state_dict())
    return model


class _Trained(NamedTuple):
    """Trained networks of stage 2, and what they were trained for."""

    unet: nn.Module
    class_embedding: nn.Module | None
    prediction_type: str
    classes: list[str]
    null_label: int | None


def _of_pipeline(name: str) -> _Trained:
    pipe = load_pipeline(name)
    classes = list((pipe.config.id2label or {}).values())
    return _Trained(pipe.unet, pipe.class_embedding, pipe.config.prediction_type, classes, pipe.config.null_class_label)


def _of_run(start: Start, vqvae: LooCVQModel, classes: list[str]) -> _Trained:
    """Return the networks of a run; `classes` are those to train on, which the run's are compared with."""
    settings, before = start.settings, []
    if settings.class_conditional:
        names = ("unet.class_embedding.weight", "class_embedding.embedding.weight")
        (embeddings,) = (start.live[name] for name in names if name in start.live)
        before = [str(number) for number in range(len(embeddings) - bool(settings.class_dropout))]
        if start.class_names in (class_names_digest(classes), None) and len(before) == len(classes):
            before = classes
    try:
        if settings.init_from:
            denoiser = denoiser_from(settings, vqvae, before, newest_weights(settings))
        else:
            denoiser = Denoiser.from_config(settings, vqvae, len(before))
        denoiser.load_state_dict(start.live)
    except RuntimeError as error:  # latents of other channels
        raise ModelError(f"the weights of the run do not fit the autoencoder: {one_line(error)[:300]}") from None
    return _Trained(denoiser.unet, denoiser.class_embedding, _target(settings), before, denoiser.null_label)


def _target(config: DiffusionConfig) -> str:
    """Return what the UNets of a config predict."""
    return Objective.from_config(config, make_scheduler(config.scheduler)).prediction_type


def denoiser_from(
    config: DiffusionConfig, vqvae: LooCVQModel, classes: list[str], start: Start | None = None
) -> Denoiser:
    """Load the UNet and class token that `config.init_from` names; different classes get random embeddings.

    Args:
        vqvae (`LooCVQModel`): The first stage, on whose latents it is trained.
        classes (`list[str]`): Names of the classes that are trained on.
        start (`Start`, *optional*): The `newest_weights` of the config. Its averages lose embeddings of other classes.

    Raises:
        ConfigError: The config describes a different network or prediction, or its latents have other channels.
        ModelError: There is no pipeline.
    """
    trained = _of_pipeline(config.init_from) if start is None else _of_run(start, vqvae, classes)
    kind = type(trained.unet).__name__
    settings = {"type": "UNet2DModel", **config.unet} if config.unet else {"type": kind}
    if settings["type"] != kind:
        raise ConfigError(f"unet.type is {settings['type']} in the config, but {kind} in {config.init_from!r}.")
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
            f"init_from={config.init_from!r} denoises latents of {channels} channels, but the autoencoder's latents "
            f"have {denoiser.unet.config.in_channels}."
        )
    target = _target(config)
    if trained.prediction_type != target:
        raise ConfigError(
            f"the scheduler is for {target}, but init_from={config.init_from!r} was trained for "
            f"{trained.prediction_type}."
        )

    # The trained weights, except for embeddings of other classes
    weights = {f"unet.{name}": tensor for name, tensor in trained.unet.state_dict().items()}
    if trained.class_embedding is not None:
        weights |= {f"class_embedding.{name}": tensor for name, tensor in trained.class_embedding.state_dict().items()}
    same_classes = trained.classes == classes and trained.null_label == denoiser.null_label
    if not same_classes:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(CLASS_WEIGHTS)}
        if start is not None:
            start.averaged = {name: value for name, value in start.averaged.items() if name in weights}
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
