"""Product quantization: one codebook per segment."""

from __future__ import annotations

import torch
import torch.nn as nn

from looc_ldm.baselines.base import Quantizer
from looc_ldm.quantizer.loocq import LooCQuantizer


class ProductQuantizer(Quantizer):
    """m independent codebooks, one for each segment of a feature vector (Jégou et al. 2011; the "PQ" of LooC's tables).

    Every segment has its own `LooCQuantizer`, so that, unlike in LooC, no codebook is shared. The loss is the sum of
    their losses, as published.

    Args:
        vq_embed_dim (`int`): n_q, the channels of a feature vector.
        num_codevectors (`int`): K of *each* codebook. LooC's table has 256 in 32 codebooks: 8 each.
        codevector_dim (`int`): d; it must divide n_q, m = n_q / d.
        **settings: Settings of every `LooCQuantizer` (`distance`, `anchor`, `codebook_update`, `gradient`, ...), except
            that `interpolation_factor` is 1 and `input_layout` is "BCHW".
    """

    def __init__(self, vq_embed_dim: int, num_codevectors: int, codevector_dim: int, **settings):
        segments, rest = divmod(vq_embed_dim, codevector_dim)
        if rest:
            raise ValueError(f"codevector_dim={codevector_dim} does not divide vq_embed_dim={vq_embed_dim}.")
        super().__init__(vq_embed_dim, (num_codevectors,) * segments, tuple(range(segments)))
        for name, value in {"interpolation_factor": 1, "input_layout": "BCHW"}.items():
            if settings.setdefault(name, value) != value:
                raise ValueError(f"{name} of ProductQuantizer must be {value!r}, got {settings[name]!r}.")
        self.segments = nn.ModuleList(
            LooCQuantizer(codevector_dim, num_codevectors, codevector_dim, **settings) for _ in range(segments)
        )

    @property
    def codebook_scalars(self) -> int:
        return sum(segment.embedding.weight.numel() for segment in self.segments)

    def revive(self) -> None:
        """Update all codebooks; call it once per optimizer step."""
        for segment in self.segments:
            segment.revive()

    def _quantize(self, z):
        parts = zip(self.segments, z.chunk(len(self.segments), dim=1), strict=True)
        quantized, losses, extras = zip(*(segment(part) for segment, part in parts), strict=True)
        return torch.cat(quantized, dim=1), sum(losses), torch.cat([indices for *_, indices in extras], dim=-1)

    def _lookup(self, indices):
        vectors = [segment.codebook[indices[..., i]] for i, segment in enumerate(self.segments)]
        return torch.cat(vectors, dim=-1)
