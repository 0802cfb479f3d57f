"""CMMD is its formula, without a kernel matrix in memory."""

import math

import pytest
import torch

from looc_ldm.metrics.fidelity import CMMD_BLOCK, cmmd


def drawn(count: int, mean: float = 0.0, dim: int = 24) -> torch.Tensor:
    vectors = torch.randn(count, dim, generator=torch.Generator().manual_seed(count)) + mean
    return torch.nn.functional.normalize(vectors)


@pytest.mark.parametrize("counts", [(60, 60), (40, CMMD_BLOCK + 70)])
def test_it_is_the_mean_of_gaussian_kernels(counts):
    x, y = (drawn(count, 0.005 * count).double() for count in counts)
    xx, yy, xy = (torch.exp(-(a[:, None] - b[None]).square().sum(-1) / 200).mean() for a, b in ((x, x), (y, y), (x, y)))
    assert cmmd(x.float(), y.float()) == pytest.approx(float(1000 * (xx + yy - 2 * xy)), rel=1e-6)


def test_equal_sets_are_at_zero_and_two_points_at_a_known_distance():
    vectors = drawn(300)
    assert abs(cmmd(vectors, vectors.flip(0))) < 1e-9
    points = torch.zeros(5, 3), torch.tensor([[20.0, 0, 0]]).expand(7, 3)
    assert cmmd(*points) == pytest.approx(2000 * (1 - math.exp(-2)), rel=1e-12)


def test_no_kernel_matrix_is_ever_whole(largest_tensor):
    with largest_tensor() as largest:
        cmmd(drawn(3000, dim=8), drawn(2500, dim=8))
    assert largest.elements <= CMMD_BLOCK * 3000
