"""CMMD: a kernel distance of CLIP embeddings."""

from __future__ import annotations

import torch

SIGMA = 10.0  # of the kernel
BLOCK = 512  # rows of a kernel matrix in memory at a time


def cmmd(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return 1000 times the squared MMD of the kernel exp(-|x - y|^2 / (2 * 10^2)) (Jayasumana et al. 2024).

    Args:
        first, second (`torch.Tensor`): Normalized CLIP embeddings `(n, D)` and `(m, D)`.

    Returns:
        `float`: At least 0 up to rounding, and 0 for equal sets: the estimate with the diagonal, as published.
    """
    x, y = first.double(), second.double()
    return 1000 * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y))


def _mean_kernel(x: torch.Tensor, y: torch.Tensor) -> float:
    exponents = (torch.cdist(block, y).square_().mul_(-1 / (2 * SIGMA**2)) for block in x.split(BLOCK))
    return sum(float(values.exp_().sum()) for values in exponents) / (len(x) * len(y))
