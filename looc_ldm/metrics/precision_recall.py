"""Improved precision and recall of generated images, from features."""

from __future__ import annotations

import torch

from looc_ldm.metrics.kernel import _float64

BLOCK = 1024  # rows and columns of a distance matrix in memory at a time
ROUNDING = 1e-12  # squared distances below this share of the squared norms are those of equal rows


def precision_recall(generated: torch.Tensor, reference: torch.Tensor, neighbors: int = 3) -> tuple[float, float]:
    """Precision and recall of Kynkaanniemi et al. 2019.

    Each set stands for a region: balls about its features that reach to the k-th nearest other one. Precision is the
    share of generated features in the region of the reference, recall that of the reference in the generated one;
    the boundary belongs to a ball, as in torch-fidelity.

    Args:
        generated, reference (`torch.Tensor`): Features `(n, D)` and `(m, D)`.
        neighbors (`int`, defaults to 3): k.

    Returns:
        `tuple[float, float]`: Precision and recall, each from 0 to 1.

    Raises:
        ValueError: `neighbors` is below 1, there are not more rows than that on a side, the shapes do not fit, or the
            features are not finite.
    """
    if generated.ndim != 2 or reference.ndim != 2 or generated.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features must have shapes (n, D) and (m, D), got {tuple(generated.shape)} and {tuple(reference.shape)}."
        )
    if not 1 <= neighbors < min(len(generated), len(reference)):
        raise ValueError(
            f"neighbors must be from 1 to less than the number of rows, {len(generated)} and {len(reference)}, got "
            f"{neighbors}."
        )
    if not (generated.isfinite().all() and reference.isfinite().all()):
        raise ValueError("the features are not finite.")
    generated, reference = _float64(generated), _float64(reference)
    origin = reference.mean(0)  # distances do not depend on it, their rounding does
    generated, reference = generated - origin, reference - origin
    generated_radii, reference_radii = (_squared_radii(rows, neighbors) for rows in (generated, reference))
    inside_reference, inside_generated = (
        torch.zeros(len(rows), dtype=torch.bool, device=rows.device) for rows in (generated, reference)
    )
    for i in range(0, len(generated), BLOCK):
        for j in range(0, len(reference), BLOCK):
            rows, columns = slice(i, i + BLOCK), slice(j, j + BLOCK)
            squared = _squared_distances(generated[rows], reference[columns])
            inside_reference[rows] |= (squared <= reference_radii[columns]).any(1)
            inside_generated[columns] |= (squared <= generated_radii[rows, None]).any(0)
    return int(inside_reference.sum()) / len(generated), int(inside_generated.sum()) / len(reference)


def _squared_radii(rows: torch.Tensor, neighbors: int) -> torch.Tensor:
    """Squared distance `(n,)` of each row to its k-th nearest other one."""
    nearest = rows.new_full((len(rows), neighbors + 1), torch.inf)  # the nearest of all is the row itself
    for i in range(0, len(rows), BLOCK):
        for j in range(i, len(rows), BLOCK):
            squared = _squared_distances(rows[i : i + BLOCK], rows[j : j + BLOCK])
            for start, block in ((i, squared), (j, squared.T)) if i != j else ((i, squared),):
                near = nearest[start : start + BLOCK]
                near.copy_(torch.cat([near, block], dim=1).topk(neighbors + 1, dim=1, largest=False).values)
    return nearest.amax(1)


def _squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`(n, m)`; exactly 0 for equal rows."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    squared = torch.addmm(norms, x, y.T, alpha=-2)
    return squared.masked_fill_(squared < ROUNDING * norms, 0)
