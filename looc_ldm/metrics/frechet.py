"""The Fréchet distance of two sets of features: FID where they are those of the Inception network."""

from __future__ import annotations

import math

import torch
from scipy.linalg import eigvalsh
from scipy.linalg.lapack import dpotrf, dpstrf, dsygst

from looc_ldm.metrics.moments import FeatureMoments


def frechet_distance(first: FeatureMoments, second: FeatureMoments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), a squared distance of normal distributions (Heusel et al. 2017).

    Args:
        first, second (`FeatureMoments`): Of features of the same network. The order does not matter.

    Returns:
        `float`: At least 0; 0 for equal moments, up to rounding. It falls with the number of rows although the
        distribution stays the same, so figures compare only at equal counts.

    Raises:
        ValueError: Fewer than 2 rows on a side, different numbers of features, or moments that are not finite.
    """
    if first.dim != second.dim:
        raise ValueError(f"features must have the same dimension, got {first.dim} and {second.dim}.")
    for moments in (first, second):
        if moments.count is not None and moments.count < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 rows on each side, got {moments.count}.")
        if not (moments.mean.isfinite().all() and math.isfinite(moments.total_variance)):
            raise ValueError("the features are not finite.")
    between = float((first.mean - second.mean).square().sum())
    within = first.total_variance + second.total_variance
    return max(0.0, between + within - 2 * _trace_of_root(first, second))


def _trace_of_root(first: FeatureMoments, second: FeatureMoments) -> float:
    """tr((S1 S2)^(1/2)).

    With S1 = A A^T and S2 = B B^T, S1 S2 has the eigenvalues of the symmetric A^T S2 A, and their roots are the
    singular values of A^T B.
    """
    if first.rows is None and second.rows is not None:
        first, second = second, first
    divisor = math.sqrt(first.degrees_of_freedom * second.degrees_of_freedom)
    a, b = first.centred_rows(), second.centred_rows()
    if a is not None and b is not None:
        return float(torch.linalg.svdvals(a @ b.T).sum()) / divisor
    if a is not None:
        symmetric = a @ (second.covariance * second.degrees_of_freedom) @ a.T
    else:
        symmetric = _product(first.scatter_triangle(), second.scatter_triangle())
    values = torch.from_numpy(eigvalsh(symmetric.numpy(), lower=True, overwrite_a=True, check_finite=False))
    return float(values.clamp_(min=0).sqrt_().sum()) / divisor


def _product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """A^T S2 A for A A^T = S1; only the lower triangle of the result means something.

    Overwrites both, of which the upper triangles are read. For Fortran, whose matrices are the transposed ones, these
    are the lower ones.
    """
    first, second = first.numpy().T, second.numpy().T
    lower, failed = dpotrf(first, lower=1, clean=0)
    if not failed:
        return torch.from_numpy(dsygst(second, lower, itype=2, lower=1, overwrite_a=1)[0])
    # S1 is singular. With pivots the factor stops where only rounding is left.
    lower, order, rank, _ = dpstrf(first, lower=1, overwrite_a=1)
    a = torch.empty(len(first), rank, dtype=torch.float64)
    a[torch.from_numpy(order).long() - 1] = torch.from_numpy(lower).tril()[:, :rank]
    triangle = torch.from_numpy(second).tril_()
    return a.T @ (triangle + triangle.tril(-1).T) @ a
