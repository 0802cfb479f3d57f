"""Use of a codebook, overall and by each segment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from looc_ldm.quantizer.loocq import LooCQuantizer


@dataclass(frozen=True, repr=False)
class CodebookStatistics:
    """Output of `codebook_statistics`.

    Attributes:
        counts (`torch.Tensor` of shape `(segments, K)`): Number of times that each segment chose each codevector,
            int64, on the CPU. Segments are the n_q / d channel groups in the `"channel"` layout, summed over the
            interpolated samples of a position (paper, figures 7 and 8), and the C segments of a position in `"patch"`.
    """

    counts: torch.Tensor

    def __repr__(self) -> str:
        segments, codevectors = self.counts.shape
        return (
            f"CodebookStatistics(use={self.use:.4g}, perplexity={self.perplexity:.4g}, dead={len(self.dead)} of "
            f"{codevectors}, segments={segments}, vectors={int(self.counts.sum())})"
        )

    @property
    def use(self) -> float:
        """Share of the codevectors that were chosen at least once, in [0, 1]."""
        return (self.counts.sum(0) > 0).double().mean().item()

    @property
    def dead(self) -> torch.Tensor:
        """Indices of the codevectors that were never chosen."""
        return (self.counts.sum(0) == 0).nonzero()[:, 0]

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the indices, in [1, K]."""
        share = self.counts.sum(0).double() / self.counts.sum()
        return torch.special.entr(share).sum().exp().item()

    @property
    def segment_use(self) -> torch.Tensor:
        """Share of the codevectors that each segment chose at least once, `(segments,)` (paper, figure 7)."""
        return (self.counts > 0).double().mean(1)

    @property
    def segments_per_codevector(self) -> torch.Tensor:
        """Number of segments that chose each codevector at least once, `(K,)` (paper, figure 8)."""
        return (self.counts > 0).sum(0)


@torch.no_grad()
def codebook_statistics(quantizer: LooCQuantizer, feature_maps: Iterable[torch.Tensor]) -> CodebookStatistics:
    """Quantize feature maps and count. Changes nothing in the quantizer, whatever its mode.

    Args:
        quantizer (`LooCQuantizer`): The quantizer.
        feature_maps: Feature maps as `quantizer` takes them, for instance `model.encode(x).latents` of every batch.

    Raises:
        ValueError: There are no feature maps, or the quantizer refuses one.
    """
    counter = CodeCounter(quantizer)
    for z in feature_maps:
        counter.update(quantizer.search(z)[0])
    if not counter.counts.sum():
        raise ValueError("There are no feature maps to count.")
    return counter.statistics()


class CodeCounter:
    """Counts the indices of batches for `CodebookStatistics`; changes nothing in the quantizer."""

    def __init__(self, quantizer: LooCQuantizer):
        self.quantizer = quantizer
        d, slots = quantizer.codevector_dim, quantizer.codes_per_position
        self.segments = quantizer.vq_embed_dim // d if quantizer.segment_layout == "channel" else slots
        self.counts = torch.zeros(self.segments * quantizer.num_codevectors, dtype=torch.int64)

    def update(self, indices: torch.Tensor) -> None:
        """Count the indices (B, H, W, C) of a batch."""
        segment = torch.arange(indices.shape[-1], device=indices.device) % self.segments
        slot_and_index = (segment * self.quantizer.num_codevectors + indices).flatten()
        self.counts += torch.bincount(slot_and_index, minlength=len(self.counts)).cpu()

    def statistics(self) -> CodebookStatistics:
        """Return the counts so far."""
        return CodebookStatistics(self.counts.view(self.segments, self.quantizer.num_codevectors).clone())
