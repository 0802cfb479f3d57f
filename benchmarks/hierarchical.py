"""HQA, the "HVQ-VAE" of LooC's tables: an autoencoder whose upper codes describe the features of the lower level."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config

from looc_ldm.baselines.base import Quantizer, squared_distances
from looc_ldm.models.autoencoder import LooCDecoderOutput
from looc_ldm.models.small import LooCSmallVQModel

_RESET_EVERY = 20  # batches
_LAST_TEMPERATURE = 1e-3


class AssignedQuantizer(Quantizer):
    """One code per feature vector, drawn in training with probability proportional to exp(-|z - c_k|^2).

    Training draws from a Gumbel-softmax, evaluation takes the nearest codevector. After every 20 batches the least
    drawn codevector moves next to the most drawn one if it had less than 3 % of its draws (the paper's reset).

    The gradients of the draws grow with one over the temperature. The authors clip them and lower the learning rate in
    the last third of the training. Without both, small models lost at the end what they had learned.

    The loss is `weight` times the divergence of the assignment from the uniform one, in nats per image, plus the
    expected squared distance of features to their codevectors, summed over an image (Williams et al. 2020, HQA).

    Args:
        vq_embed_dim (`int`): n_q, the channels of a feature vector and of a codevector.
        num_codevectors (`int`): K.
        weight (`float`, defaults to 1e-3): Weight of the loss.
        initial_temperature (`float`, defaults to 2/3): First temperature of the Gumbel-softmax.
        anneal_batches (`int`, defaults to 200,000): Batches in which the temperature falls linearly to 0.001, usually
            those of the whole training.
    """

    def __init__(
        self,
        vq_embed_dim: int,
        num_codevectors: int,
        weight: float = 1e-3,
        initial_temperature: float = 2 / 3,
        anneal_batches: int = 200_000,
    ):
        super().__init__(vq_embed_dim, (num_codevectors,), (0,))
        self.weight, self.initial_temperature, self.anneal_batches = weight, initial_temperature, anneal_batches
        self.embedding = nn.Embedding(num_codevectors, vq_embed_dim)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("drawn", torch.zeros(num_codevectors, dtype=torch.int64))  # since the last reset

    @property
    def codebook_scalars(self) -> int:
        return self.embedding.weight.numel()

    @property
    def temperature(self) -> torch.Tensor:
        """Temperature of the Gumbel-softmax, a scalar."""
        done = (self.batches / self.anneal_batches).clamp(max=1)
        return self.initial_temperature + (_LAST_TEMPERATURE - self.initial_temperature) * done

    @torch.no_grad()
    def _reset_least_drawn(self) -> None:
        weight, most, least = self.embedding.weight, self.drawn.argmax(), self.drawn.argmin()
        beside = weight[most] + 0.01 * torch.randn_like(weight[most])
        weight[least] = torch.where(self.drawn[least] < 0.03 * self.drawn[most], beside, weight[least])
        self.drawn.zero_()

    def _quantize(self, z):
        batch, _, height, width = z.shape
        if self.training:
            batches = int(self.batches)  # waits for the device
            if batches and batches % _RESET_EVERY == 0:
                self._reset_least_drawn()
            self.batches += 1
        rows, codebook = z.movedim(1, -1).flatten(0, 2), self.embedding.weight  # (B h w, n_q)
        distances = squared_distances(rows, codebook)
        log_shares = (-distances).log_softmax(1)
        divergence = (log_shares.exp() * (log_shares + math.log(len(codebook)) + distances)).sum() / batch
        if self.training:
            soft = F.gumbel_softmax(-distances, tau=self.temperature)
            indices = soft.argmax(1)
            self.drawn += torch.zeros_like(self.drawn).scatter_add_(0, indices, torch.ones_like(indices))
            quantized = soft @ codebook
        else:
            indices = distances.argmin(1)
            quantized = codebook[indices]
        quantized = quantized.view(batch, height, width, -1).movedim(-1, 1)
        return quantized, self.weight * divergence, indices.view(batch, height, width, 1)

    def _lookup(self, indices):
        return self.embedding(indices[..., 0])


class HierarchicalVQModel(LooCSmallVQModel):
    """HQA (Williams et al. 2020; "HVQ-VAE" in LooC's tables) with two levels, on small images; f = 4.

    The lower level is an autoencoder of images with codes at half of their resolution, the upper one an autoencoder of
    the lower one's features. Only the upper codes are stored: decoding predicts the lower features from them, quantizes
    these with the lower codebook, and decodes the image. So `quantize` is the upper quantizer. Its `codebook_scalars`
    count the upper codebook only, though decoding also needs the lower one.

    In training `forward` returns the *lower* level's reconstruction, and as `commit_loss` the rest of the objective:
    the upper level's squared error of the lower features, standardized, summed over an image, and the losses of both
    quantizers. Train it with `summed_squared_error`. The paper trains one level after the other; here both are trained
    at once, and no gradient passes from the upper to the lower.

    Args:
        in_channels (`int`): Channels of the input image.
        out_channels (`int`): Channels of the output image.
        hidden_channels (`int`, defaults to 128): Channels inside a level, even.
        sample_size (`int`, defaults to 32): Side of the images in pixels; a hint, not a limit.
        num_vq_embeddings (`int`, defaults to 512): K, codevectors of each level.
        vq_embed_dim (`int`, defaults to 64): n_q, channels of the features of each level.
        anneal_batches (`int`, defaults to 200,000): Batches of the whole training, see `AssignedQuantizer`.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int = 128,
        sample_size: int = 32,
        num_vq_embeddings: int = 512,
        vq_embed_dim: int = 64,
        anneal_batches: int = 200_000,
        norm_type: str = "group",
    ):
        ModelMixin.__init__(self)  # not LooCSmallVQModel's, whose networks differ
        self.lower_encoder = _halving(in_channels, hidden_channels, vq_embed_dim)
        self.lower_quantize = AssignedQuantizer(vq_embed_dim, num_vq_embeddings, anneal_batches=anneal_batches)
        self.lower_decoder = _doubling(vq_embed_dim, hidden_channels, out_channels)
        self.standardize = nn.BatchNorm2d(vq_embed_dim, affine=False)
        self.encoder = _halving(vq_embed_dim, hidden_channels, vq_embed_dim)
        self.quantize = AssignedQuantizer(vq_embed_dim, num_vq_embeddings, anneal_batches=anneal_batches)
        self.decoder = _doubling(vq_embed_dim, hidden_channels, vq_embed_dim)
        self.use_slicing = False
        self.use_tiling = False

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> LooCDecoderOutput | tuple[torch.Tensor, ...]:
        """Reconstruct images `(B, in_channels, H, W)`; in training through the lower level only."""
        if not self.training:
            return super().forward(sample, return_dict)
        features = self.lower_encoder(sample)
        lower_quantized, lower_loss, _ = self.lower_quantize(features)
        target = self.standardize(features.detach())
        quantized, upper_loss, (perplexity, _, indices) = self.quantize(self.encoder(target))
        upper_error = (self.decoder(quantized).float() - target.float()).square().sum() / len(sample)
        loss = lower_loss + upper_loss + upper_error
        reconstruction = self.lower_decoder(lower_quantized)
        if not return_dict:
            return reconstruction, loss
        return LooCDecoderOutput(sample=reconstruction, commit_loss=loss, indices=indices, perplexity=perplexity)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.standardize(self.lower_encoder(x)))

    def _decode(self, quantized: torch.Tensor) -> torch.Tensor:
        mean, variance = (part[:, None, None] for part in (self.standardize.running_mean, self.standardize.running_var))
        features = self.decoder(quantized) * (variance + self.standardize.eps).sqrt() + mean
        return self.lower_decoder(self.lower_quantize(features)[0])


def summed_squared_error(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Return the squared error of images in [-1, 1], in units of [0, 1]: summed over an image, mean over the batch."""
    return images[0].numel() / 4 * F.mse_loss(reconstructions, images)


def _halving(channels: int, hidden: int, out: int) -> nn.Sequential:
    """`(B, channels, H, W)` to `(B, out, H / 2, W / 2)`."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden // 2, 3, stride=2, padding=1),
        nn.Mish(),
        nn.Conv2d(hidden // 2, hidden, 3, padding=1),
        nn.Mish(),
        nn.Conv2d(hidden, out, 1),
    )


def _doubling(channels: int, hidden: int, out: int) -> nn.Sequential:
    """`(B, channels, h, w)` to `(B, out, 2 h, 2 w)`."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3, padding=1),
        nn.Mish(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(hidden, hidden // 2, 3, padding=1),
        nn.Mish(),
        nn.Conv2d(hidden // 2, out, 3, padding=1),
    )
