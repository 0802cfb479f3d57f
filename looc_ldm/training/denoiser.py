"""The network that stage 2 trains, and the scheduler saved with it, as a config describes them."""

from __future__ import annotations

import diffusers
import torch
import torch.nn as nn
from diffusers import SchedulerMixin, UNet2DConditionModel, UNet2DModel

from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.class_embedding import ClassEmbedding
from looc_ldm.models.unet import FixedHeadsUNet2DModel
from looc_ldm.training.checks import latent_side
from looc_ldm.training.config import DiffusionConfig
from looc_ldm.training.config_parsing import construct
from looc_ldm.utils.cpu import attention_kernel
from looc_ldm.utils.errors import ConfigError

UNETS = {
    "UNet2DModel": UNet2DModel,
    "UNet2DConditionModel": UNet2DConditionModel,
    "FixedHeadsUNet2DModel": FixedHeadsUNet2DModel,
}


class Denoiser(nn.Module):
    """A UNet and, if it attends to one, its class token.

    Attributes:
        null_label (`int`, *optional*): The label of the null class; None without classes or without dropout.
    """

    def __init__(self, unet: nn.Module, class_embedding: ClassEmbedding | None, null_label: int | None):
        super().__init__()
        self.unet = unet
        self.class_embedding = class_embedding
        self.null_label = null_label
        # The parts that FSDP gathers one at a time (Accelerate's name for them): they hold nearly all weights.
        parts = {type(module).__name__ for module in unet.modules()}
        self._no_split_modules = sorted({"ResnetBlock2D", "BasicTransformerBlock"} & parts)

    @classmethod
    def from_config(cls, config: DiffusionConfig, vqvae: LooCVQModel, num_classes: int) -> Denoiser:
        """Build the networks for the latents of `vqvae` and the classes of the data (0: unconditional)."""
        arguments = dict(config.unet)
        kind = arguments.pop("type", "UNet2DModel")
        if kind not in UNETS:
            raise ConfigError(f"unet.type must be one of {', '.join(UNETS)}, got {kind!r}.")
        channels = vqvae.quantize.vq_embed_dim
        null_label = num_classes if num_classes and config.class_dropout else None
        num_class_embeds = num_classes + (null_label is not None)
        of_data = {
            "sample_size": latent_side(vqvae, config.data),
            "in_channels": channels,
            "out_channels": channels,
            "num_class_embeds": num_class_embeds if kind != "UNet2DConditionModel" and num_classes else None,
        }
        for name, value in of_data.items():
            if arguments.setdefault(name, value) != value:
                raise ConfigError(f"unet.{name} is {arguments[name]} in the config, but {value} by the data.")
        class_embedding = None
        if kind == "UNet2DConditionModel":
            if not num_classes or config.class_embedding_dim is None:
                raise ConfigError("unet.type=UNet2DConditionModel needs class_conditional and class_embedding_dim.")
            class_embedding = ClassEmbedding(num_class_embeds, config.class_embedding_dim)
            arguments["cross_attention_dim"] = config.class_embedding_dim
        return cls(construct(UNETS[kind], arguments, "unet"), class_embedding, null_label)

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Return the prediction `(B, c, h, w)` for noisy latents of that shape, timesteps `(B,)` and labels `(B,)`."""
        conditions = {}
        if self.class_embedding is not None:
            conditions["encoder_hidden_states"] = self.class_embedding(labels)
        elif labels is not None:
            conditions["class_labels"] = labels
        with attention_kernel(noisy):
            return self.unet(noisy, timesteps, **conditions).sample


def make_scheduler(settings: dict) -> SchedulerMixin:
    """Return the scheduler of a config. Latents are not images: nothing is clipped unless the config says so."""
    arguments = dict(settings)
    kind = arguments.pop("type", "DDIMScheduler")
    scheduler_class = getattr(diffusers, str(kind), None)
    if scheduler_class is None or not kind.endswith("Scheduler"):
        raise ConfigError(f"scheduler.type must be the name of a diffusers scheduler, got {kind!r}.")
    if kind in ("DDIMScheduler", "DDPMScheduler"):
        arguments = {"clip_sample": False, **arguments}
    return construct(scheduler_class, arguments, "scheduler")
