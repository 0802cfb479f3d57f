"""`looc-ldm train autoencoder`, `looc-ldm train diffusion` and `looc-ldm cache-latents`."""

from __future__ import annotations

from looc_ldm.training import autoencoder, diffusion
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.latents import cache_data_set as cache_latents
from looc_ldm.training.log import show_log_lines
from looc_ldm.training.result import show_result

__all__ = ["cache_latents", "train"]


def train(config: AutoencoderConfig | DiffusionConfig) -> None:
    """Train a model, print its folder, and log the commands that usually follow."""
    show_log_lines()
    stage = diffusion if isinstance(config, DiffusionConfig) else autoencoder
    show_result(config, stage.train(config))
