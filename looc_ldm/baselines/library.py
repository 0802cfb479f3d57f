"""Quantizers of the package vector-quantize-pytorch behind the interface of `LooCQuantizer`.

The extra `baselines` installs it; it is imported when one of these quantizers is constructed.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn

from looc_ldm.baselines.base import Quantizer, at_least_one


def _library():
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise ImportError("These quantizers need vector-quantize-pytorch: the extra `baselines`.") from error
    return vector_quantize_pytorch


class _LibraryQuantizer(Quantizer):
    """Base class of quantizers that pass vectors `(B, H * W, n_q)` to a quantizer of the library."""

    inner: nn.Module

    def _quantize(self, z):
        batch, channels, height, width = z.shape
        quantized, loss, indices = self._quantize_vectors(z.flatten(2).transpose(1, 2))
        quantized = quantized.transpose(1, 2).reshape(batch, channels, height, width)
        return quantized, loss, indices.reshape(batch, height, width, -1).long()

    def _lookup(self, indices):
        batch, height, width, _ = indices.shape
        return self._vectors(indices.flatten(1, 2)).reshape(batch, height, width, -1)

    def _quantize_vectors(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize `(B, n, n_q)`, and return quantized, loss, and indices `(B, n, C)`."""
        quantized, indices, loss = self.inner(vectors)
        return quantized, loss, indices

    def _vectors(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the vectors `(B, n, n_q)` of indices `(B, n, C)`."""
        return self.inner.get_output_from_indices(indices)


class ResidualQuantizer(_LibraryQuantizer):
    """RQ-VAE's residual quantization: `depth` codes of one codebook, each for the residual of the codes before it.

    Lee et al. 2022, "Autoregressive Image Generation using Residual Quantization". The codebook is a moving average.
    Rarely used codevectors are replaced by features. The commitment term is the mean over all partial sums. One
    straight-through estimate goes around the sum.

    Args:
        vq_embed_dim (`int`): n_q, the channels of a feature vector and of a codevector.
        num_codevectors (`int`): K.
        depth (`int`): D, codes per position.
        commitment_weight (`float`, defaults to 0.25): beta.
        usage_decay (`float`, defaults to 0.99): Decay of the moving average.
        kmeans_init (`bool`, defaults to False): Start from the k-means of the first batch's features.
    """

    def __init__(
        self,
        vq_embed_dim: int,
        num_codevectors: int,
        depth: int,
        commitment_weight: float = 0.25,
        usage_decay: float = 0.99,
        kmeans_init: bool = False,
    ):
        at_least_one("depth", depth)
        super().__init__(vq_embed_dim, (num_codevectors,) * depth, (0,) * depth)
        self.commitment_weight = commitment_weight
        self.usage_decay = usage_decay
        self.kmeans_init = kmeans_init
        self.inner = _library().ResidualVQ(
            dim=vq_embed_dim,
            num_quantizers=depth,
            codebook_size=num_codevectors,
            shared_codebook=True,
            commitment_weight=commitment_weight,
            decay=usage_decay,
            kmeans_init=kmeans_init,
            threshold_ema_dead_code=1,
            rotation_trick=False,
        )

    @property
    def codebook_scalars(self) -> int:
        return self.code_sizes[0] * self.vq_embed_dim

    def _quantize_vectors(self, vectors):
        quantized, indices, losses = self.inner(vectors)
        # The library's gradient sums the estimates of all depths, so it grows with the depth.
        return vectors + (quantized - vectors).detach(), losses.mean(), indices


class _FiniteScalar(_LibraryQuantizer):
    """FSQ of the library, which returns no loss."""

    def _quantize_vectors(self, vectors):
        quantized, indices = self.inner(vectors)
        return quantized, vectors.new_zeros(()), indices


class FiniteScalarQuantizer(_FiniteScalar):
    """FSQ: every channel of a projection is rounded to a few levels; there is no codebook (Mentzer et al. 2024).

    Args:
        vq_embed_dim (`int`): n_q, the channels of a feature vector.
        levels (`tuple[int, ...]`): Levels of each channel of a code.
        codes_per_position (`int`, defaults to 1): Codes per position.
    """

    def __init__(self, vq_embed_dim: int, levels: tuple[int, ...], codes_per_position: int = 1):
        at_least_one("codes_per_position", codes_per_position)
        size = math.prod(levels)
        super().__init__(vq_embed_dim, (size,) * codes_per_position, tuple(range(codes_per_position)))
        self.levels = tuple(levels)
        settings = {"num_codebooks": codes_per_position, "keep_num_codebooks_dim": True}
        self.inner = _library().FSQ(list(levels), dim=vq_embed_dim, **settings)

    def _vectors(self, indices):
        return self.inner.indices_to_codes(indices)


class LookupFreeQuantizer(_LibraryQuantizer):
    """LFQ: the signs of a projection are the code; an entropy term keeps them in use (Yu et al. 2024, MAGVIT-v2).

    The loss contains the negative entropy of all codes, so it can be negative.

    Args:
        vq_embed_dim (`int`): n_q, the channels of a feature vector.
        bits (`int`): Signs in a code: K = 2^bits.
        codes_per_position (`int`, defaults to 1): Codes per position.
        commitment_weight (`float`, defaults to 0.25): beta.
    """

    spherical = False

    def __init__(self, vq_embed_dim: int, bits: int, codes_per_position: int = 1, commitment_weight: float = 0.25):
        at_least_one("bits", bits)
        if bits > 32:
            raise ValueError(f"bits must be at most 32, got {bits}: K = 2^bits.")
        at_least_one("codes_per_position", codes_per_position)
        super().__init__(vq_embed_dim, (2**bits,) * codes_per_position, tuple(range(codes_per_position)))
        self.commitment_weight = commitment_weight
        self.inner = _library().LFQ(
            dim=vq_embed_dim,
            codebook_size=2**bits,
            num_codebooks=codes_per_position,
            keep_num_codebooks_dim=True,
            commitment_loss_weight=commitment_weight,
            spherical=self.spherical,
        )

    def _vectors(self, indices):
        return self.inner.indices_to_codes(indices)


class BinarySphericalQuantizer(LookupFreeQuantizer):
    """BSQ (Zhao et al. 2024): LFQ whose projections are normalised for each code. Arguments as in LFQ."""

    spherical = True


class ResidualFiniteScalarQuantizer(_FiniteScalar):
    """Residual FSQ: `depth` finite scalar quantizers, each of which quantizes the residual that the ones before leave.

    As in the library, the gradient is the sum of the straight-through estimates of all depths.

    Args:
        vq_embed_dim (`int`): n_q, the channels of a feature vector.
        levels (`tuple[int, ...]`): Levels of each channel of a code.
        depth (`int`): Codes per position.
    """

    def __init__(self, vq_embed_dim: int, levels: tuple[int, ...], depth: int):
        at_least_one("depth", depth)
        super().__init__(vq_embed_dim, (math.prod(levels),) * depth, tuple(range(depth)))
        self.levels = tuple(levels)
        self.inner = _library().ResidualFSQ(levels=list(levels), num_quantizers=depth, dim=vq_embed_dim)


class ResidualSimVQQuantizer(_LibraryQuantizer):
    """SimVQ: each codebook is a learned linear map of fixed random vectors (Zhu et al. 2024); residual codes.

    Args:
        vq_embed_dim (`int`): n_q, the channels of a feature vector and of a codevector.
        num_codevectors (`int`): K.
        depth (`int`): Codes per position.
    """

    def __init__(self, vq_embed_dim: int, num_codevectors: int, depth: int):
        at_least_one("depth", depth)
        super().__init__(vq_embed_dim, (num_codevectors,) * depth, tuple(range(depth)))
        self.inner = _library().ResidualSimVQ(
            dim=vq_embed_dim, num_quantizers=depth, codebook_size=num_codevectors, rotation_trick=False
        )

    @property
    def codebook_scalars(self) -> int:
        return sum(self.code_sizes) * self.vq_embed_dim

    def _quantize_vectors(self, vectors):
        quantized, indices, losses = self.inner(vectors)
        return quantized, losses.sum(), indices
