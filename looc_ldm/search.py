"""Nearest-codevector search, and the anchors that revival needs, from one pass over the vectors.

The N x K similarity matrix of N vectors against K codevectors is never held: it is made in chunks that fit the cache,
and each chunk is reduced to an index per vector and a running best per codevector before the next one is made.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

DISTANCES = ("cosine", "euclidean")

# Similarities held at a time. On CPUs 4 MiB of float32, about a core's L2 cache, where the search was fastest; on GPUs
# 256 MiB, so that a step is a few large kernels.
CHUNK_ELEMENTS = 2**20
GPU_CHUNK_ELEMENTS = 2**26

# Matrix kernels sum the columns of a last, partial tile in another order, and the similarities to equal codevectors
# then differ in the last bit. Padding the codebook to a multiple of this lets ties go to the lowest index.
TILE = 16


class Anchors(NamedTuple):
    """The best candidate seen so far for each of K codevectors. Ties keep the earlier vector."""

    score: torch.Tensor  # (K,) float32, -inf where none was seen
    vector: torch.Tensor  # (K, d) float32, raw (un-normalised) features


class SearchResult(NamedTuple):
    """What `nearest_codevectors` returns."""

    indices: torch.Tensor  # (N,) int64
    anchors: Anchors | None


def nearest_codevectors(
    vectors: torch.Tensor,
    codebook: torch.Tensor,
    distance: str = "cosine",
    anchor: str = "none",
) -> SearchResult:
    """Index of the nearest codevector for each vector; ties go to the lowest index.

    Args:
        vectors (`torch.Tensor` of shape `(N, d)`, float32): What is looked up.
        codebook (`torch.Tensor` of shape `(K, d)`, float32): The codevectors.
        distance (`str`): `"cosine"` compares directions only, `"euclidean"` positions.
        anchor (`str`): Which feature each codevector would be revived with (CVQ-VAE): `"closest"`, the most similar
            one; `"probrandom"`, one drawn with probability softmax(similarity) over the N vectors; `"random"`, any
            one; `"none"` looks for no anchors.
    """
    if distance == "cosine":
        # Only the anchors need normalised vectors, but with them always, training and evaluation choose alike.
        keys, bias, queries = F.normalize(codebook, dim=1), None, F.normalize(vectors, dim=1)
    else:
        # argmin ||z - c||^2 over c is argmax of z.c - ||c||^2 / 2: no root, no ||z||^2.
        keys, bias, queries = codebook, -0.5 * codebook.square().sum(1), vectors

    num_vectors, num_codevectors = len(vectors), len(codebook)
    padding = -num_codevectors % TILE
    keys = F.pad(keys, (0, 0, 0, padding))
    bias = bias if bias is None else F.pad(bias, (0, padding))
    indices = torch.empty(num_vectors, dtype=torch.int64, device=vectors.device)
    anchors = None
    rows = max(1, (CHUNK_ELEMENTS if vectors.device.type == "cpu" else GPU_CHUNK_ELEMENTS) // num_codevectors)
    for start in range(0, num_vectors, rows):
        chunk = slice(start, start + rows)
        similarity = queries[chunk] @ keys.T if bias is None else torch.addmm(bias, queries[chunk], keys.T)
        similarity = similarity[:, :num_codevectors]
        indices[chunk] = similarity.max(dim=1).indices
        if anchor in ("closest", "probrandom"):
            if distance == "euclidean":  # along N, ||z||^2 matters: -||z - c||^2
                similarity = 2 * similarity - queries[chunk].square().sum(1, keepdim=True)
            if anchor == "probrandom":  # the maximum of score + Gumbel noise is a draw from softmax(score)
                similarity = similarity - torch.empty_like(similarity).exponential_().log()
            # A feature that is not finite is nobody's anchor.
            score, row = similarity.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf).max(dim=0)
            anchors = better_anchors(anchors, Anchors(score, vectors[chunk][row]))
    if anchor == "random":
        row = torch.randint(num_vectors, (num_codevectors,), device=vectors.device)
        # The maximum of n uniform keys is u^(1/n): so several calls merge into a uniform draw from all their vectors.
        score = torch.rand(num_codevectors, device=vectors.device).log() / num_vectors
        anchors = Anchors(score, vectors[row])
    return SearchResult(indices, anchors)


def better_anchors(first: Anchors | None, second: Anchors) -> Anchors:
    """The better of two candidates for each codevector; `first` wins ties."""
    if first is None:
        return second
    better = second.score > first.score
    return Anchors(
        torch.where(better, second.score, first.score),
        torch.where(better[:, None], second.vector, first.vector),
    )
