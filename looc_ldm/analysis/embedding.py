"""Codevectors and features in the plane, by t-SNE."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

PERPLEXITY = 30  # of t-SNE: about how many neighbours a point has
FEWEST = 5  # distinct points that t-SNE needs


def in_the_plane(
    codevectors: torch.Tensor, vectors: torch.Tensor, distance: str, seed: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return coordinates in which similar codevectors and features are near each other.

    Under cosine distance their directions are embedded. Vectors of fewer than three dimensions are returned as they
    are.

    Args:
        codevectors (`torch.Tensor` of shape `(K, d)`).
        vectors (`torch.Tensor` of shape `(V, d)`): Features.
        distance (`str`): "cosine" or "euclidean".
        seed (`int`): Seed of t-SNE; on one machine, the same seed gives the same picture.

    Returns:
        `(K, 2)`, `(V, 2)`, and the method: "t-SNE" or "components", the second of which is 0 if there is only one.
    """
    points = torch.cat([codevectors, vectors]).float()
    if distance == "cosine":
        points = F.normalize(points, dim=1)
    points = points.numpy()
    distinct, place = np.unique(points, axis=0, return_inverse=True)
    place = place.reshape(-1)
    if points.shape[1] < 3 or len(distinct) < FEWEST:
        flat, how = np.pad(points, ((0, 0), (0, 1)))[:, :2], "components"
    else:
        flat, how = _tsne(distinct, seed)[place], "t-SNE"  # equal points are one
    return flat[: len(codevectors)], flat[len(codevectors) :], how


def _tsne(points: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    with threadpool_limits(1):  # several threads add up in any order, and small differences grow
        return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)
