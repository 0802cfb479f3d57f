"""Kernel distances of two sets of features: KID, and CMMD where the features are CLIP's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

SUBSETS, SUBSET_SIZE = 100, 1000
SEED = 2020  # torch-fidelity's default, so that its command line gives the same figure
SIGMA = 10.0  # of CMMD's kernel
BLOCK = 512  # rows of a kernel matrix in memory at a time


def kid(
    first: torch.Tensor,
    second: torch.Tensor,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> tuple[float, float]:
    """Kernel Inception distance (Binkowski et al. 2018): the unbiased squared MMD of the kernel (x.y / D + 1)^3.

    Unlike FID it does not fall with the number of images.

    Args:
        first, second (`torch.Tensor`): Features `(n, D)` and `(m, D)`.
        subsets (`int`, defaults to 100): Pairs of random subsets that the figure is averaged over.
        subset_size (`int`, defaults to 1000): Rows of a subset; min(subset_size, n, m) are taken.
        seed (`int`, defaults to 2020): Of the subsets, which are those of torch-fidelity.

    Returns:
        `tuple[float, float]`: Mean and standard deviation over the subsets. The mean may be slightly negative.

    Raises:
        ValueError: Fewer than 2 rows on a side, other shapes, features that are not finite, or counts below 1 (2 for
            the size).
    """
    x, y = _checked(first, second)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets must be at least 1 and subset_size 2, got {subsets} and {subset_size}.")
    size = min(subset_size, len(x), len(y))
    generator = np.random.RandomState(seed)
    drawn = [
        tuple(torch.from_numpy(generator.choice(len(rows), size, replace=False)).to(rows.device) for rows in (x, y))
        for _ in range(subsets)
    ]
    if len(x) ** 2 + len(x) * len(y) + len(y) ** 2 <= 3 * subsets * size**2:
        # Few rows are in many subsets: each entry of the kernel is computed once for all of them.
        x, y = _float64(x), _float64(y)
        chosen = [torch.zeros(subsets, len(rows), dtype=torch.float64, device=rows.device) for rows in (x, y)]
        for number, pair in enumerate(drawn):
            for matrix, indices in zip(chosen, pair, strict=True):
                matrix[number, indices] = 1
        estimates = _unbiased(x, y, *chosen, size)
    else:
        ones = torch.ones(1, size, dtype=torch.float64, device=x.device)
        estimates = torch.cat([_unbiased(_float64(x[i]), _float64(y[j]), ones, ones, size) for i, j in drawn])
    return float(estimates.mean()), float(estimates.std(correction=0))


def cmmd(first: torch.Tensor, second: torch.Tensor) -> float:
    """CMMD (Jayasumana et al. 2024): 1000 times the squared MMD of the kernel exp(-|x - y|^2 / (2 * 10^2)).

    Args:
        first, second (`torch.Tensor`): Normalised CLIP embeddings `(n, D)` and `(m, D)`.

    Returns:
        `float`: At least 0 up to rounding, and 0 for equal sets: the estimate with the diagonal, as published.

    Raises:
        ValueError: Fewer than 2 rows on a side, other shapes, or features that are not finite.
    """
    x, y = _checked(first, second)
    weights = [torch.full((1, len(rows)), 1 / len(rows), dtype=torch.float64, device=rows.device) for rows in (x, y)]
    own = sum(_weighted_sums(_gaussian, rows, rows, of, of) for rows, of in zip((x, y), weights, strict=True))
    return 1000 * float(own - 2 * _weighted_sums(_gaussian, x, y, *weights))


def _cubic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    inner = (x @ y.T).mul_(1 / x.shape[1]).add_(1)
    return inner.square().mul_(inner)


def _gaussian(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    squared = torch.addmm(y.square().sum(1), x, y.T, alpha=-2).add_(x.square().sum(1)[:, None])
    return squared.clamp_(min=0).mul_(-1 / (2 * SIGMA**2)).exp_()


def _unbiased(
    x: torch.Tensor, y: torch.Tensor, chosen_x: torch.Tensor, chosen_y: torch.Tensor, size: int
) -> torch.Tensor:
    """The unbiased squared MMD `(S,)` of S pairs of subsets that the rows of 0 and 1 `(S, n)` and `(S, m)` choose."""
    own = 0
    for rows, chosen in ((x, chosen_x), (y, chosen_y)):
        diagonal = (rows.square().sum(1) / rows.shape[1] + 1) ** 3
        own = own + _weighted_sums(_cubic, rows, rows, chosen, chosen) - chosen @ diagonal
    return own / (size * (size - 1)) - 2 * _weighted_sums(_cubic, x, y, chosen_x, chosen_y) / size**2


def _weighted_sums(
    kernel: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
    weights_x: torch.Tensor,
    weights_y: torch.Tensor,
) -> torch.Tensor:
    """For each row of weights `(S, n)` and `(S, m)`, the sum over i and j of w_i K(x_i, y_j) w_j.

    Blocks of the kernel matrix are all there ever is of it; where x is y, each is computed once for its mirror image.
    """
    sums = torch.zeros(len(weights_x), dtype=torch.float64, device=x.device)
    same = x is y
    for i in range(0, len(x), BLOCK):
        for j in range(i if same else 0, len(y), BLOCK):
            columns = slice(j, j + BLOCK)
            values = kernel(_float64(x[i : i + BLOCK]), _float64(y[columns]))
            block = (weights_x[:, i : i + BLOCK] @ values * weights_y[:, columns]).sum(1)
            sums += 2 * block if same and j > i else block
    return sums


def _checked(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The features, on their device unless it has no float64."""
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"features must have shapes (n, D) and (m, D), got {tuple(first.shape)} and {tuple(second.shape)}."
        )
    if min(len(first), len(second)) < 2:
        raise ValueError(f"a kernel distance needs at least 2 rows on each side, got {len(first)} and {len(second)}.")
    if not (first.isfinite().all() and second.isfinite().all()):
        raise ValueError("the features are not finite.")
    return tuple(rows.detach().cpu() if rows.device.type == "mps" else rows.detach() for rows in (first, second))


def _float64(rows: torch.Tensor) -> torch.Tensor:
    """Only of what is computed with at a time: all rows in float64 would take three times their memory."""
    return rows.double()
