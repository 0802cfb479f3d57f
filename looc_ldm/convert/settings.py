"""What weights do not show: settings from flags and from the config file that a checkpoint was trained with."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import yaml

from looc_ldm.errors import ConfigError, ModelError

DISTANCES = {"cos": "cosine", "l2": "euclidean"}  # LooC and CVQ-VAE, quantise.py
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # LDM's and its descendants' `parameterization`
# Sides of the images that both papers' main.py train the small network on.
SIDES = {"mnist": 28, "fashion-mnist": 28, "cifar10": 32, "celeba": 128, "ffhq": 256}


@dataclass(frozen=True)
class Settings:
    """Settings of a conversion; None where nothing is known.

    Args:
        resolution (`int`): Side of the images in pixels.
        distance (`str`): `"cosine"` or `"euclidean"`, of a quantizer with revival.
        interpolation_factor (`int`): s, of such a quantizer; 1 is off.
        anchor (`str`): Of such a quantizer; only further training sees it.
        num_heads (`int`): Attention heads of the UNet at every level, or
        num_head_channels (`int`): channels of each head at every level.
        qkv_by_head (`bool`): Whether the UNet's fused projections hold (query, key, value) head by head, as LDM's code
            has it unless a config asks for the "new attention order".
        prediction_type (`str`): What the UNet predicts, by diffusers' names.
        scaling_factor (`float`): What the UNet's latents are multiplied by.
        betas (`tuple[str, float, float, int]`): Noise schedule: name, first, last, number of timesteps.
        latent_size (`int`): Side of the latents.
        null_class_label (`int`): The label that stands for no class.
        architecture (`dict`): Sizes that the config file gives, to compare with the weights.
    """

    resolution: int | None = None
    distance: str | None = None
    interpolation_factor: int | None = None
    anchor: str | None = None
    num_heads: int | None = None
    num_head_channels: int | None = None
    qkv_by_head: bool = True
    prediction_type: str | None = None
    scaling_factor: float | None = None
    betas: tuple[str, float, float, int] | None = None
    latent_size: int | None = None
    null_class_label: int | None = None
    architecture: dict[str, object] = field(default_factory=dict)

    def overridden_by(self, other: Settings) -> Settings:
        """With the values of `other` where it has any."""
        changes = {
            item.name: getattr(other, item.name) for item in fields(other) if getattr(other, item.name) != item.default
        }
        changes.pop("architecture")  # of the file only
        if "num_heads" in changes or "num_head_channels" in changes:
            changes = {"num_heads": None, "num_head_channels": None, **changes}
        if "resolution" in changes:
            changes["latent_size"] = None
        return replace(self, **changes)

    def check_architecture(self, **found: object) -> None:
        """Compare sizes found in the weights with those of the config file. Raises ModelError if they differ."""
        for name, value in found.items():
            said = self.architecture.get(name, value)
            said = tuple(said) if isinstance(said, list) else said
            if said != value:
                raise ModelError(f"--original-config is of another model: it says {name} {said}, the weights {value}.")


def require(**needed: object) -> None:
    """Raise ConfigError that names, by their flags, all values that are None."""
    missing = ["--" + name.replace("_", "-") for name, value in needed.items() if value is None]
    if "--heads" in missing:
        missing[missing.index("--heads")] = "--num-heads or --num-head-channels"
    if missing:
        raise ConfigError(
            f"the weights do not show everything: give {', '.join(missing)}, or --original-config FILE if it says so."
        )


def read_original_config(file: Path) -> dict:
    """The YAML that a checkpoint was trained with."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a date like 2022-13-01
        raise ConfigError(f"cannot read --original-config {str(file)!r}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--original-config {str(file)!r} is not a mapping of settings.")
    return content


def settings_of(config: dict, kind: str) -> Settings:
    """The settings in the YAML of a checkpoint of this kind.

    Their code's own default stands where their file says nothing, since that is what the file means.

    Raises:
        ConfigError: It is no config of this kind, or asks for what is not supported.
    """
    if kind in ("looc", "cvq"):
        return _settings_of_small(config)
    model = _part(config, "model", "params")
    if kind == "vqgan":
        if "first_stage_config" in model:  # of a transformer on top of it
            model = _part(model, "first_stage_config", "params")
        return _settings_of_vqgan(model)
    return _settings_of_ldm(model)


def _settings_of_small(config: dict) -> Settings:
    """Visual-AI/LooC, config/*.yaml: flat."""
    if config.get("split_type", "fixed") != "fixed":
        raise ConfigError(f"--original-config: split_type {config['split_type']!r} is not supported, only 'fixed'.")
    if config.get("dataset") == "imagenet":
        # main.py normalizes these by mean and deviation of ImageNet.
        raise ConfigError("--original-config: models of dataset 'imagenet' do not take images in [-1, 1].")
    anchor = _name(config, "anchor")
    factor = _number(config, "shuffle_scale", int, least=0)
    return Settings(
        resolution=SIDES.get(_name(config, "dataset")),
        distance=_one_of(DISTANCES, config, "distance"),
        interpolation_factor=None if factor is None else max(factor, 1),  # 0 is off
        anchor=None if anchor == "disturbance" else anchor,
        architecture=_sizes(config, "hidden_size", "num_residual_hidden", "num_residual_layers", "num_embedding"),
    )


def _settings_of_vqgan(model: dict) -> Settings:
    """CompVis/taming-transformers, configs/*vqgan.yaml; CompVis/latent-diffusion, models/first_stage_models."""
    network = _part(model, "ddconfig")
    for name in ("tanh_out", "give_pre_end"):
        if _flag(network, name):
            raise ConfigError(f"--original-config: {name} is not supported.")
    sizes = {
        **_sizes(model, "embed_dim", "n_embed"),
        **_sizes(network, "ch", "ch_mult", "num_res_blocks", "z_channels"),
    }
    return Settings(resolution=_number(network, "resolution", int), architecture=sizes)


def _settings_of_ldm(model: dict) -> Settings:
    """CompVis/latent-diffusion, configs/latent-diffusion/*.yaml; defaults are those of ldm/models/diffusion/ddpm.py."""
    unet = _part(model, "unet_config", "params")
    first_stage = _settings_of_vqgan(_part(model, "first_stage_config", "params"))
    heads, head_channels = (
        None if unet.get(name) == -1 else _number(unet, name, int) for name in ("num_heads", "num_head_channels")
    )
    names = ("model_channels", "channel_mult", "num_res_blocks", "context_dim")
    return Settings(
        num_heads=heads if head_channels is None else None,
        num_head_channels=head_channels,
        qkv_by_head=not _flag(unet, "use_new_attention_order"),
        prediction_type=_one_of(PREDICTIONS, {"parameterization": "eps", **model}, "parameterization"),
        scaling_factor=None if _flag(model, "scale_by_std") else _number(model, "scale_factor", float, 1.0),
        betas=(
            _name(model, "beta_schedule", "linear"),
            _number(model, "linear_start", float, 1e-4),
            _number(model, "linear_end", float, 2e-2),
            _number(model, "timesteps", int, 1000),
        ),
        latent_size=_number(model, "image_size", int),
        architecture={**first_stage.architecture, **_sizes(unet, *names)},
    )


def _part(config: dict, *names: str) -> dict:
    for name in names:
        config = config.get(name)
        if not isinstance(config, dict):
            raise ConfigError(f"--original-config is not of this kind of model: it has no mapping {name!r}.")
    return config


def _one_of(allowed: dict[str, str], config: dict, name: str) -> str | None:
    value = _name(config, name)
    if value is not None and value not in allowed:
        raise ConfigError(f"--original-config: {name} must be one of {', '.join(allowed)}, got {value!r}.")
    return allowed.get(value)


def _number(config: dict, name: str, kind: type, default: float | None = None, least: int = 1):
    """An int of at least `least`, or a finite positive float. `null` is as good as nothing."""
    value = config.get(name)
    if value is None:
        return default
    given = value
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            value = float(value)  # YAML 1.1 takes 1e-4 for text
    good = type(value) is int and value >= least if kind is int else type(value) is float and 0 < value < float("inf")
    if not good:
        allowed = f"a whole number from {least} on" if kind is int else "a positive number"
        raise ConfigError(f"--original-config: {name} must be {allowed}, got {given!r}.")
    return value


def _flag(config: dict, name: str) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"--original-config: {name} must be true or false, got {value!r}.")
    return bool(value)


def _name(config: dict, name: str, default: str | None = None) -> str | None:
    value = config.get(name, default)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"--original-config: {name} must be a name, got {value!r}.")
    return value


def _sizes(config: dict, *names: str) -> dict[str, object]:
    return {name: config[name] for name in names if config.get(name) is not None}
