"""Use of a codebook: overall, by each segment, and the distances of segments from their codevectors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from looc_ldm.quantizer.loocq import LooCQuantizer

# Edges of the histogram of distances: five bins a decade, since their scale is that of the features.
DISTANCE_EDGES = 10 ** torch.linspace(-6, 4, 51, dtype=torch.float64)


@dataclass(frozen=True, repr=False)
class CodebookStatistics:
    """Output of `codebook_statistics`; counts are int64 tensors on the CPU.

    Attributes:
        counts (`torch.Tensor` of shape `(segments, K)`): Number of times that each segment chose each codevector.
            Segments are the n_q / d channel groups in the `"channel"` layout, summed over the interpolated samples of
            a position (paper, figures 7 and 8), and the C segments of a position in `"patch"`.
        distances (`torch.Tensor` of shape `(50,)`): Histogram of the distances from segments to their codevectors,
            1 - cosine or euclidean; the first and last bin also hold values outside.
        distance_edges (`torch.Tensor` of shape `(51,)`): The edges of its bins.
    """

    counts: torch.Tensor
    distances: torch.Tensor
    distance_edges: torch.Tensor

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
        counter.update(*quantizer.search(z))
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
        self.distances = torch.zeros(len(DISTANCE_EDGES) - 1, dtype=torch.int64)

    def update(self, indices: torch.Tensor, segments: torch.Tensor) -> None:
        """Count the results of `quantizer.search`: indices (B, H, W, C) and segments (B, H, W, C, d)."""
        segment = torch.arange(indices.shape[-1], device=indices.device) % self.segments
        slot_and_index = (segment * self.quantizer.num_codevectors + indices).flatten()
        self.counts += torch.bincount(slot_and_index, minlength=len(self.counts)).cpu()
        chosen = self.quantizer.codebook[indices]
        if self.quantizer.distance == "cosine":
            apart = 1 - F.cosine_similarity(segments, chosen, dim=-1)
        else:
            apart = (segments - chosen).norm(dim=-1)
        bins = torch.bucketize(apart.cpu().double(), DISTANCE_EDGES[1:-1]).flatten()
        self.distances += torch.bincount(bins, minlength=len(self.distances))

    def statistics(self) -> CodebookStatistics:
        """Return the counts so far."""
        counts = self.counts.view(self.segments, self.quantizer.num_codevectors)
        return CodebookStatistics(counts.clone(), self.distances.clone(), DISTANCE_EDGES)
