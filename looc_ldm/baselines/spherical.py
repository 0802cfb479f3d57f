"""Group-wise spherical quantization."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from looc_ldm.baselines.base import Quantizer, at_least_one
from looc_ldm.quantizer.search import nearest_codevectors


class GroupSphericalQuantizer(Quantizer):
    """GSQ: groups of channels share one codebook, and groups and codevectors have length 1 (arXiv 2412.02632).

    It is LooC at s = 1 with cosine distance, a spherical start of the codebook and normalised latents in the loss. The
    codebook learns by gradient, without revival.

    Args:
        vq_embed_dim (`int`): n_q, the channels of a feature vector.
        num_codevectors (`int`): K, of the codebook that all groups share.
        codevector_dim (`int`): Channels of a group, a divisor of n_q.
        commitment_weight (`float`, defaults to 0.25): beta.
    """

    def __init__(self, vq_embed_dim: int, num_codevectors: int, codevector_dim: int, commitment_weight: float = 0.25):
        at_least_one("codevector_dim", codevector_dim)
        if vq_embed_dim % codevector_dim:
            raise ValueError(f"codevector_dim must divide vq_embed_dim={vq_embed_dim}, got {codevector_dim}.")
        groups = vq_embed_dim // codevector_dim
        super().__init__(vq_embed_dim, (num_codevectors,) * groups, (0,) * groups)
        self.commitment_weight = commitment_weight
        self.embedding = nn.Embedding(num_codevectors, codevector_dim)
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(torch.randn(num_codevectors, codevector_dim), dim=1))

    def _quantize(self, z):
        batch, channels, height, width = z.shape
        groups = F.normalize(z.movedim(1, -1).reshape(-1, self.embedding.embedding_dim), dim=1)
        codebook = F.normalize(self.embedding.weight, dim=1)
        indices = nearest_codevectors(groups.detach(), codebook.detach(), "euclidean").indices
        nearest = F.embedding(indices, codebook)
        loss = F.mse_loss(nearest, groups.detach()) + self.commitment_weight * F.mse_loss(groups, nearest.detach())
        quantized = groups + (nearest - groups).detach()
        quantized = quantized.reshape(batch, height, width, channels).movedim(-1, 1)
        return quantized, loss, indices.reshape(batch, height, width, -1)

    def _lookup(self, indices):
        return F.embedding(indices, F.normalize(self.embedding.weight, dim=1)).flatten(-2)
