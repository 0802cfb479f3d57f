"""The features that codevectors are revived with (CVQ-VAE's anchors), one per codevector.

Every anchor carries a score, and the better of two scores wins. So merging the anchors of several forwards or processes
gives the same anchors as one search over all features. It takes a traffic of K x (1 + d) numbers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from looc_ldm.quantizer.chunks import chunk_elements

ANCHORS = ("closest", "random", "probrandom", "none")

# By cosine a proposal is accepted with a probability of at least exp(-2): after 256, all but 1 in 10^16 are.
PROPOSALS = 256


class Anchors(NamedTuple):
    """Best candidate so far for each of K codevectors. Ties keep the earlier vector."""

    score: torch.Tensor  # (K,) float32, -inf before any was seen
    vector: torch.Tensor  # (K, d) float32, raw (un-normalised) features


def better_anchors(first: Anchors | None, second: Anchors) -> Anchors:
    """Return the better of two candidates for each codevector; `first` wins ties."""
    if first is None:
        return second
    better = second.score > first.score
    return Anchors(
        torch.where(better, second.score, first.score),
        torch.where(better[:, None], second.vector, first.vector),
    )


def draw_uniformly(vectors: torch.Tensor, num_codevectors: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw any of the N vectors for each codevector (`"random"`). Return scores and rows in `vectors`, each (K,)."""
    row = torch.randint(len(vectors), (num_codevectors,), device=vectors.device)
    # The maximum of n uniform keys is u^(1/n): so several draws merge into a uniform draw from all their vectors.
    return torch.rand(num_codevectors, device=vectors.device).log() / len(vectors), row


def draw_by_similarity(
    vectors: torch.Tensor, codebook: torch.Tensor, distance: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a vector for each codevector, with probability softmax(similarity) over the N vectors (`"probrandom"`).

    The similarity is the cosine, or minus the squared distance. The draw is exact, without an N x K pass: let every
    vector ring at the rate exp(similarity). The first to ring is a draw from the softmax, and minus the logarithm of
    its time is the score: it is distributed as the maximum of similarity + Gumbel noise. The first ring is found by
    thinning, from rings of all vectors at the highest possible rate of which each is kept with probability
    exp(similarity - highest similarity).

    Returns:
        `tuple`: Scores (float32) and rows (int64), each (K,). A vector that is not finite is never drawn; if there is
        no other, the score is -inf.
    """
    on_cpu = vectors.device.type == "cpu"
    # The number of proposals needed is not known by distance, and asking an accelerator for it would be a sync.
    if distance == "euclidean" and not on_cpu:
        return _draw_from_all(vectors, codebook, distance)
    queries, keys, highest = vectors, codebook, 0.0
    if distance == "cosine":
        queries, keys, highest = F.normalize(vectors, dim=1), F.normalize(codebook, dim=1), 1.0
    num_codevectors, dim = codebook.shape
    device = vectors.device
    row = torch.zeros(num_codevectors, dtype=torch.int64, device=device)
    time = torch.zeros(num_codevectors, device=device)  # in mean intervals between proposals
    found = torch.zeros(num_codevectors, dtype=torch.bool, device=device)
    at_once = max(1, min(32, 4 * chunk_elements(device) // (num_codevectors * dim)))
    for _ in range(math.ceil(PROPOSALS / at_once)):
        proposed = torch.randint(len(vectors), (num_codevectors, at_once), device=device)
        accepted = torch.rand(num_codevectors, at_once, device=device) < torch.exp(
            _similarity(queries[proposed], keys[:, None], distance) - highest
        )
        passed = torch.empty(num_codevectors, at_once, device=device).exponential_().cumsum(1)
        first = accepted.int().argmax(1, keepdim=True)
        now = accepted.any(1) & ~found
        row = torch.where(now, proposed.gather(1, first)[:, 0], row)
        time = time + torch.where(found, 0, torch.where(now, passed.gather(1, first)[:, 0], passed[:, -1]))
        found = found | now
        if on_cpu and found.all():
            break
    score = torch.where(found, math.log(len(vectors)) + highest - time.log(), -torch.inf)
    if on_cpu and not found.all():
        # The clock has no memory: what has not rung yet starts over at the time that has passed.
        missing = (~found).nonzero()[:, 0]
        later, rows = _draw_from_all(vectors, codebook[missing], distance)
        passed = time[missing].log() - math.log(len(vectors)) - highest
        score[missing] = -torch.logaddexp(passed, -later)
        row[missing] = rows
    return score, row


def _draw_from_all(vectors: torch.Tensor, codebook: torch.Tensor, distance: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the same draw as the maximum of similarity + Gumbel noise over all vectors, in chunks."""
    if distance == "cosine":
        vectors, codebook = F.normalize(vectors, dim=1), F.normalize(codebook, dim=1)
    best = torch.full((len(codebook),), -torch.inf, device=vectors.device)
    row = torch.zeros(len(codebook), dtype=torch.int64, device=vectors.device)
    size = max(1, chunk_elements(vectors.device) // codebook.numel())
    for start in range(0, len(vectors), size):
        similarity = _similarity(vectors[start : start + size, None], codebook, distance)
        noisy = similarity - torch.empty_like(similarity).exponential_().log()
        score, at = noisy.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf).max(dim=0)
        row = torch.where(score > best, at + start, row)
        best = torch.maximum(best, score)
    return best, row


def _similarity(vectors: torch.Tensor, keys: torch.Tensor, distance: str) -> torch.Tensor:
    return (vectors * keys).sum(-1) if distance == "cosine" else -(vectors - keys).square().sum(-1)
