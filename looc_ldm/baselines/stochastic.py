"""SQ-VAE's stochastic quantization, whose noise fades as the model improves."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from looc_ldm.baselines.base import Quantizer


class StochasticQuantizer(Quantizer):
    """Codes drawn in training with a learned variance (Takida et al. 2022, Gaussian SQ-VAE, type I).

    A feature z has code k with probability proportional to exp(-|z - c_k|^2 / (2 s^2)). Training draws from a
    Gumbel-softmax with temperature exp(-`annealing` * steps). s^2 shrinks as the model improves, and the draws become
    choices of the nearest codevector, which evaluation always takes. No codevector needs revival.

    The loss is the divergence from the uniform prior in **nats per image**, up to a constant. Use it with the
    log-likelihood of a decoder with a learned variance: `gaussian_likelihood`.

    Args:
        vq_embed_dim (`int`): n_q, the channels of a feature vector and of a codevector.
        num_codevectors (`int`): K.
        annealing (`float`, defaults to 1e-5): Decay of the temperature per step. The default is the authors', for
            about 200,000 steps; with 2 / steps a shorter training ends at the same temperature.
    """

    def __init__(self, vq_embed_dim: int, num_codevectors: int, annealing: float = 1e-5):
        super().__init__(vq_embed_dim, (num_codevectors,), (0,))
        if annealing < 0:
            raise ValueError(f"annealing must not be negative, got {annealing}.")
        self.annealing = annealing
        self.embedding = nn.Embedding(num_codevectors, vq_embed_dim)
        # s^2 = 1. The authors start at 11 or 21, for features scaled by batch norm. If s^2 is much larger than the
        # features, all codes are equally likely and nothing is learned from them.
        self.log_variance = nn.Parameter(torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def temperature(self) -> torch.Tensor:
        """Temperature of the Gumbel-softmax, a scalar that falls from 1 towards 0."""
        return torch.exp(-self.annealing * self.steps).clamp_min(1e-6)

    def revive(self) -> None:
        """Count an optimizer step, which lowers the temperature."""
        self.steps += 1

    def _quantize(self, z):
        batch, _, height, width = z.shape
        features = z.movedim(1, -1).flatten(0, 2)  # (B h w, n_q)
        codebook, precision = self.embedding.weight, 0.5 * torch.exp(-self.log_variance)
        distances = features.square().sum(1, keepdim=True) - 2 * features @ codebook.T + codebook.square().sum(1)
        distances = distances.clamp_min(0)  # below 0 by rounding only
        logits = -distances * precision
        indices = logits.argmax(1)
        drawn = F.gumbel_softmax(logits, tau=self.temperature) if self.training else F.one_hot(indices, len(codebook))
        quantized = drawn.to(codebook.dtype) @ codebook
        log_shares = logits.log_softmax(1)
        divergence = (log_shares.exp() * log_shares).sum() + precision * (features - quantized).square().sum()
        quantized = quantized.view(batch, height, width, -1).movedim(-1, 1)
        return quantized, divergence / batch, indices.view(batch, height, width, 1)

    def _lookup(self, indices):
        return self.embedding(indices[..., 0])


def gaussian_likelihood(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Return minus the log-likelihood in nats per image, up to a constant, of a Gaussian decoder.

    The decoder has the variance of the highest likelihood, the mean squared error: D / 2 log(MSE) for D values.
    """
    return images[0].numel() / 2 * F.mse_loss(reconstructions, images).log()
