"""The interface and the counting that all baselines share."""

from __future__ import annotations

import math

import torch
import torch.nn as nn

Quantized = tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, None, torch.Tensor]]


class Quantizer(nn.Module):
    """Base class of quantizers of feature maps `(B, n_q, H, W)`, with the interface of `LooCQuantizer`.

    Args:
        vq_embed_dim (`int`): n_q, the channels of a feature vector.
        code_sizes (`tuple[int, ...]`): Number of values of each of the C codes at a latent position.
        codebooks (`tuple[int, ...]`): Number of the codebook that each code belongs to, from 0. Codes of one codebook
            are counted together.
    """

    def __init__(self, vq_embed_dim: int, code_sizes: tuple[int, ...], codebooks: tuple[int, ...]):
        super().__init__()
        if vq_embed_dim < 1:
            raise ValueError(f"vq_embed_dim must be positive, got {vq_embed_dim}.")
        if not code_sizes:
            raise ValueError("a position must have at least 1 code, got none.")
        if min(code_sizes) < 2:
            raise ValueError(f"every code must have at least 2 values, got {min(code_sizes)}.")
        self.vq_embed_dim = vq_embed_dim
        self.codes_per_position = len(code_sizes)
        self.code_sizes = code_sizes
        self.codebooks = codebooks
        size_of = dict(zip(codebooks, code_sizes, strict=True))
        self._book_sizes = [size_of[book] for book in sorted(size_of)]
        starts = [sum(self._book_sizes[:book]) for book in codebooks]
        self.register_buffer("_starts", torch.tensor(starts), persistent=False)  # first value of each code's codebook

    @property
    def bits_per_position(self) -> float:
        """The rate of a latent position in bits, the sum of log2 over `code_sizes`."""
        return sum(math.log2(size) for size in self.code_sizes)

    @property
    def codebook_scalars(self) -> int:
        """Number of values in the codebook `embedding`; 0 without a codebook."""
        return self.embedding.weight.numel() if hasattr(self, "embedding") else 0

    def forward(self, z: torch.Tensor) -> Quantized:
        """Quantize a feature map.

        Args:
            z (`torch.Tensor` of shape `(B, n_q, H, W)`): Floats.

        Returns:
            `tuple`: quantized, in the shape and dtype of `z`, with gradient to `z`; the loss, a float32 scalar; and
            (perplexity, None, indices): exp of the entropy of the codes, a mean over codebooks, and int64
            `(B, H, W, C)`.
        """
        if z.ndim != 4 or z.shape[1] != self.vq_embed_dim:
            raise ValueError(f"z must have the shape (batch, {self.vq_embed_dim}, H, W), got {tuple(z.shape)}.")
        with torch.autocast(z.device.type, enabled=False):
            quantized, loss, indices = self._quantize(z.float())
        return quantized.to(z.dtype), loss.float(), (self._perplexity(indices), None, indices)

    @torch.no_grad()
    def encode_indices(self, z: torch.Tensor) -> torch.Tensor:
        """Return the indices of a feature map, int64 `(B, H, W, C)`, without updating any average."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            return self(z)[2][2]
        finally:
            for module in training:  # `train()` would also change frozen modules
                module.training = True

    @torch.no_grad()
    def decode_indices(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the float32 feature map `(B, n_q, H, W)` of indices `(B, H, W, C)`."""
        if indices.ndim != 4 or indices.shape[-1] != self.codes_per_position:
            raise ValueError(
                f"indices must have the shape (batch, H, W, {self.codes_per_position}), got {tuple(indices.shape)}."
            )
        return self._lookup(indices.long()).movedim(-1, 1).contiguous()

    def revive(self) -> None:
        """Update the codebook after an optimizer step. Does nothing unless a subclass overrides it."""

    def code_counts(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """Count the uses of each value: int64 `(size,)` for every codebook, on the CPU."""
        return list(self._counts(indices).cpu().split(self._book_sizes))

    def _counts(self, indices: torch.Tensor) -> torch.Tensor:
        """Count the uses of each value of the concatenated codebooks. Unlike bincount, this does not synchronize."""
        places = (indices.long() + self._starts).flatten()
        counts = torch.zeros(sum(self._book_sizes), dtype=torch.int64, device=indices.device)
        return counts.scatter_add_(0, places, torch.ones_like(places))

    def _perplexity(self, indices: torch.Tensor) -> torch.Tensor:
        counts = self._counts(indices).split(self._book_sizes)
        shares = [count.float() / count.sum().clamp_min(1) for count in counts]
        return torch.stack([torch.special.entr(share).sum().exp() for share in shares]).mean().float()

    def _quantize(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize float32 `(B, n_q, H, W)`, and return quantized, loss, and indices `(B, H, W, C)`."""
        raise NotImplementedError

    def _lookup(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the float32 vectors `(B, H, W, n_q)` of int64 indices `(B, H, W, C)`."""
        raise NotImplementedError


def at_least_one(name: str, number: int) -> None:
    """Raise ValueError for a setting that is not a positive whole number."""
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} must be a positive whole number, got {number!r}.")
