"""Convert an autoencoder's latents z to the unit-variance latents x of a diffusion model, and back.

x = (z - mean) / std * scaling_factor, with `scaling_factor`, `latents_mean` and `latents_std` of the autoencoder's
config; mean and std, one value per channel, are 0 and 1 if they are not given. The convention is that of diffusers'
Stable Diffusion XL pipelines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from diffusers import ModelMixin

# The default of diffusers' VQModel, taken from Stable Diffusion. It fits no VQ autoencoder, and a config.json does not
# tell whether it was given.
VQMODEL_DEFAULT_FACTOR = 0.18215


def check_scaling(autoencoder: ModelMixin) -> None:
    """Refuse an autoencoder whose config has no measured scaling of its latents.

    Raises:
        ValueError: `scaling_factor` is None, is the default value of `VQModel`, which nobody measured, or is not a
            positive number. Or `latents_mean` or `latents_std` is not one valid number per latent channel.
    """
    config = autoencoder.config
    if measured_factor(config) is None:
        raise ValueError(
            f"vqvae has no measured scaling_factor, but {config.scaling_factor}: measure it on training images with "
            "looc_ldm.training.latents.measure_scaling_factor, and give it by "
            "vqvae.register_to_config(scaling_factor=...)."
        )
    check_factor(config.scaling_factor)
    channels = config.get("vq_embed_dim") or config.latent_channels
    for name in ("latents_mean", "latents_std"):
        if config.get(name) is not None:
            check_channel_values(name, config[name], channels)


def measured_factor(config: dict) -> float | None:
    """Return the scaling factor in an autoencoder's config, or None if it is the default of `VQModel`."""
    factor = config.get("scaling_factor")
    return None if factor == VQMODEL_DEFAULT_FACTOR else factor


def check_factor(factor: float) -> None:
    """Raise ValueError if a scaling factor is not a positive number."""
    if not (isinstance(factor, Real) and 0 < factor < math.inf):
        raise ValueError(f"scaling_factor must be a positive number, got {factor!r}.")


def check_channel_values(name: str, values: Sequence[float], channels: int) -> None:
    """Raise ValueError if a `latents_mean` or `latents_std` is not one finite number per channel, or not positive."""
    if len(values) != channels or not all(math.isfinite(value) for value in values):
        raise ValueError(f"{name} must be vq_embed_dim={channels} finite numbers, got {list(values)}.")
    if name == "latents_std" and min(values) <= 0:
        raise ValueError(f"latents_std must be positive, got {list(values)}.")


@torch.no_grad()
def encode_latents(autoencoder: ModelMixin, images: torch.Tensor, scaled: bool = True) -> torch.Tensor:
    """Encode images `(B, C, H, W)` in [-1, 1], on the autoencoder's device, to float32 latents `(B, c, h, w)`.

    Args:
        autoencoder: In eval mode.
        images: The images.
        scaled: Scale the latents as the diffusion model sees them.
    """
    latents = autoencoder.encode(images.to(autoencoder.dtype)).latents.float()
    return scale_latents(autoencoder, latents) if scaled else latents


def scale_latents(autoencoder: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Return latents `(B, c, h, w)` of `autoencoder.encode` as the diffusion model sees them; see `check_scaling`."""
    check_scaling(autoencoder)
    mean, std = _mean_and_std(autoencoder, latents)
    return (latents - mean) / std * autoencoder.config.scaling_factor


def unscale_latents(autoencoder: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Undo `scale_latents`: return the latents that `autoencoder.decode` takes."""
    check_scaling(autoencoder)
    mean, std = _mean_and_std(autoencoder, latents)
    return latents / autoencoder.config.scaling_factor * std + mean


def _mean_and_std(autoencoder: ModelMixin, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation as `(1, c, 1, 1)`, or 0 and 1."""
    values = []
    for name, default in (("latents_mean", 0.0), ("latents_std", 1.0)):
        given = autoencoder.config.get(name)
        values.append(like.new_tensor(default if given is None else given).reshape(1, -1, 1, 1))
    return values[0], values[1]
