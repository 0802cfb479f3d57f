"""The learned class token that a cross-attention UNet is conditioned on."""

from __future__ import annotations

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from looc_ldm.models.registration import RemoteCode


class ClassEmbedding(RemoteCode, ModelMixin, ConfigMixin):
    """One learned vector per class, the only token of a cross-attention context (LDM's `ClassEmbedder`).

    Args:
        num_class_embeds (`int`): Number of classes, the null class included.
        embedding_dim (`int`): Channels of the token, the UNet's `cross_attention_dim`.
    """

    @register_to_config
    def __init__(self, num_class_embeds: int, embedding_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(num_class_embeds, embedding_dim)

    def forward(self, class_labels: torch.Tensor) -> torch.Tensor:
        """Return the tokens `(B, 1, embedding_dim)` of int64 labels `(B,)`."""
        return self.embedding(class_labels)[:, None]
