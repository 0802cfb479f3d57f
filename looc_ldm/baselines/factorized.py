"""ViT-VQGAN's factorized codes."""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F

from looc_ldm.baselines.base import Quantizer


class FactorizedQuantizer(Quantizer):
    """ViT-VQGAN's codes: codevectors and projected features have few dimensions and unit length.

    Yu et al. 2022, "Vector-quantized Image Modeling with Improved VQGAN", section 3.2: features and codevectors are
    l2-normalized, so the nearest codevector has the highest cosine; the codebook is learned by gradient, with
    mean((c - sg z)^2) + beta * mean((sg c - z)^2); straight-through.

    Args:
        vq_embed_dim (`int`): n_q, the channels of a feature vector.
        num_codevectors (`int`): K.
        codevector_dim (`int`): d, dimensions of the projection.
        commitment_weight (`float`, defaults to 0.25): beta.
    """

    def __init__(self, vq_embed_dim: int, num_codevectors: int, codevector_dim: int, commitment_weight: float = 0.25):
        super().__init__(vq_embed_dim, (num_codevectors,), (0,))
        self.codevector_dim = codevector_dim
        self.commitment_weight = commitment_weight
        self.project_in = nn.Linear(vq_embed_dim, codevector_dim)
        self.embedding = nn.Embedding(num_codevectors, codevector_dim)
        self.project_out = nn.Linear(codevector_dim, vq_embed_dim)

    def _quantize(self, z):
        features = F.normalize(self.project_in(z.movedim(1, -1)), dim=-1)  # (B, h, w, d)
        codebook = F.normalize(self.embedding.weight, dim=-1)
        indices = (features @ codebook.T).argmax(-1)
        chosen = codebook[indices]
        codebook_loss = F.mse_loss(chosen, features.detach())
        commitment_loss = F.mse_loss(chosen.detach(), features)
        quantized = self.project_out(features + (chosen - features).detach())
        return quantized.movedim(-1, 1), codebook_loss + self.commitment_weight * commitment_loss, indices[..., None]

    def _lookup(self, indices):
        return self.project_out(F.normalize(self.embedding(indices[..., 0]), dim=-1))
