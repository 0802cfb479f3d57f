"""Settings that weights do not show: from flags, and from the config file that a checkpoint was trained with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from looc_ldm.utils.errors import ConfigError, ModelError, one_line

DISTANCES = {"cos": "cosine", "l2": "euclidean"}  # LooC and CVQ-VAE, quantise.py
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # LDM's `parameterization`
# Sides of the images that both papers' main.py train the small network on.
SIDES = {"mnist": 28, "fashion-mnist": 28, "cifar10": 32, "celeba": 128, "ffhq": 256}
# Sizes in the config files that are compared with the weights.
SIZES = (
    *("hidden_size", "num_residual_hidden", "num_residual_layers", "num_embedding", "embed_dim", "n_embed", "ch"),
    *("ch_mult", "num_res_blocks", "z_channels", "model_channels", "channel_mult", "context_dim"),
)


@dataclass(frozen=True)
class Settings:
    """Settings of a conversion; None if unknown."""

    resolution: int | None = None  # side of the images in pixels
    # Quantizers with revival; only further training uses the anchor:
    distance: str | None = None  # "cosine" or "euclidean"
    interpolation_factor: int | None = None  # s; 1 is off
    anchor: str | None = None
    # UNet: heads at every level, or the channels of each head:
    num_heads: int | None = None
    num_head_channels: int | None = None
    qkv_by_head: bool = True  # fused projections hold (q, k, v) head by head, not in the "new attention order"
    prediction_type: str | None = None  # diffusers' name
    scaling_factor: float | None = None  # latents are multiplied by it
    betas: tuple[str, float, float, int] | None = None  # noise schedule: name, first, last, number of timesteps
    latent_size: int | None = None  # side of the latents
    null_class_label: int | None = None
    architecture: dict[str, object] = field(default_factory=dict)  # sizes in the config file

    def overridden_by(self, other: Settings) -> Settings:
        """Return these settings with the values of `other`, if it has any."""
        default = vars(Settings())
        changes = {name: value for name, value in vars(other).items() if value != default[name]}
        if "num_heads" in changes or "num_head_channels" in changes:
            changes = {"num_heads": None, "num_head_channels": None, **changes}
        if "resolution" in changes:
            changes["latent_size"] = None
        return Settings(**{**vars(self), **changes})

    def check_architecture(self, **found: object) -> None:
        """Raise ModelError if sizes found in the weights differ from the config file."""
        for name, value in found.items():
            said = self.architecture.get(name, value)
            said = tuple(said) if isinstance(said, list) else said
            if said != value:
                raise ModelError(
                    f"--original-config is for a different model: it says {name} {said}, the weights {value}."
                )


def require(**needed: object) -> None:
    """Raise ConfigError if a value is None; the message names the options that give these values."""
    flags = {"heads": "--num-heads or --num-head-channels"}
    missing = [flags.get(name, "--" + name.replace("_", "-")) for name, value in needed.items() if value is None]
    if missing:
        raise ConfigError(
            f"the weights alone do not tell every setting: give {', '.join(missing)}, or --original-config FILE."
        )


def read_original_config(file: Path) -> dict:
    """Read the YAML file that a checkpoint was trained with."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a date like 2022-13-01
        raise ConfigError(f"cannot read --original-config {str(file)!r}: {one_line(error, file)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--original-config {str(file)!r} is not a mapping of settings.")
    return content


def settings_of(config: dict, kind: str) -> Settings:
    """Return the settings in the YAML of a checkpoint of this kind.

    A setting that the file leaves out has the default of the original code.

    Raises:
        ConfigError: The file is for a different kind, or has a wrong or an unsupported value.
    """
    if kind in ("looc", "cvq"):
        return _settings_of_small(config)
    model = _part(config, "model", "params")
    if kind == "ldm":
        return _settings_of_ldm(model)
    if "first_stage_config" in model:  # a transformer on top of the VQGAN
        model = _part(model, "first_stage_config", "params")
    return _settings_of_vqgan(model)


def _settings_of_small(config: dict) -> Settings:
    """Read config/*.yaml of Visual-AI/LooC, which has no sections."""
    if config.get("split_type", "fixed") != "fixed":
        raise ConfigError(f"--original-config: split_type {config['split_type']!r} is not supported, only 'fixed'.")
    if config.get("dataset") == "imagenet":  # main.py normalizes these by mean and deviation of ImageNet
        raise ConfigError("--original-config: models of dataset 'imagenet' do not take images in [-1, 1].")
    anchor, factor = _value(config, "anchor", str), _value(config, "shuffle_scale", NonNegativeInt)
    return Settings(
        resolution=SIDES.get(_value(config, "dataset", str)),
        distance=_one_of(DISTANCES, config, "distance"),
        interpolation_factor=None if factor is None else max(factor, 1),  # 0 is off
        anchor=None if anchor == "disturbance" else anchor,
        architecture=_sizes(config),
    )


def _settings_of_vqgan(model: dict) -> Settings:
    """Read configs/*vqgan.yaml of CompVis/taming-transformers, or models/first_stage_models of latent-diffusion."""
    network = _part(model, "ddconfig")
    for name in ("tanh_out", "give_pre_end"):
        if network.get(name):
            raise ConfigError(f"--original-config: {name} is not supported.")
    return Settings(resolution=_value(network, "resolution", PositiveInt), architecture=_sizes(model) | _sizes(network))


def _settings_of_ldm(model: dict) -> Settings:
    """Read configs/latent-diffusion/*.yaml of CompVis/latent-diffusion; defaults: ldm/models/diffusion/ddpm.py."""
    unet = _part(model, "unet_config", "params")
    first_stage = _settings_of_vqgan(_part(model, "first_stage_config", "params"))
    heads, head_channels = (
        None if unet.get(name) == -1 else _value(unet, name, PositiveInt) for name in ("num_heads", "num_head_channels")
    )
    return Settings(
        num_heads=heads if head_channels is None else None,
        num_head_channels=head_channels,
        qkv_by_head=not unet.get("use_new_attention_order"),
        prediction_type=_one_of(PREDICTIONS, {"parameterization": "eps", **model}, "parameterization"),
        scaling_factor=None if model.get("scale_by_std") else _value(model, "scale_factor", PositiveFloat, 1.0),
        betas=(
            _value(model, "beta_schedule", str, "linear"),
            _value(model, "linear_start", PositiveFloat, 1e-4),
            _value(model, "linear_end", PositiveFloat, 2e-2),
            _value(model, "timesteps", PositiveInt, 1000),
        ),
        latent_size=_value(model, "image_size", PositiveInt),
        architecture=first_stage.architecture | _sizes(unet),
    )


def _part(config: dict, *names: str) -> dict:
    for name in names:
        config = config.get(name)
        if not isinstance(config, dict):
            raise ConfigError(f"--original-config is not for this kind of model: it has no mapping {name!r}.")
    return config


def _value(config: dict, name: str, kind: type, default: object = None):
    """Return a value as this type, or the default if it is missing or null."""
    value = config.get(name)
    if value is None:
        return default
    try:
        return kind(value)  # YAML 1.1 takes 1e-4 for text
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"--original-config: {name} is {value!r}: {one_line(error)}.") from None


def _one_of(allowed: dict[str, str], config: dict, name: str) -> str | None:
    value = _value(config, name, str)
    if value not in (None, *allowed):
        raise ConfigError(f"--original-config: {name} must be one of {', '.join(allowed)}, got {value!r}.")
    return allowed.get(value)


def _sizes(config: dict) -> dict[str, object]:
    return {name: config[name] for name in SIZES if config.get(name) is not None}
