"""KID and CMMD are those of their formulas and of torch-fidelity, without a kernel matrix in memory."""

import math

import pytest
import torch
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from looc_ldm.metrics.kernel import BLOCK, SUBSETS, cmmd, kid

DIM = 48


def drawn(count: int, seed: int, mean: float = 0.0, dim: int = DIM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) * torch.linspace(1.5, 0.5, dim) + mean


def of_torch_fidelity(first: torch.Tensor, second: torch.Tensor, **arguments) -> tuple[float, float]:
    figures = kid_features_to_metric(first, second, **{**DEFAULTS, "verbose": False, **arguments})
    return figures[KEY_METRIC_KID_MEAN], figures[KEY_METRIC_KID_STD]


def squared_mmd(kernel, first: torch.Tensor, second: torch.Tensor, diagonal: bool) -> float:
    x, y = first.double(), second.double()
    own = 0.0
    for rows in (x, y):
        matrix, n = kernel(rows, rows), len(rows)
        own += float(matrix.mean() if diagonal else (matrix.sum() - matrix.trace()) / (n * (n - 1)))
    return own - 2 * float(kernel(x, y).mean())


def cubic(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x, y):
    return torch.exp(-(x[:, None] - y[None]).square().sum(-1) / 200)


@pytest.mark.parametrize("counts", [(300, 300), (250, 400), (900, 1500)])
@pytest.mark.parametrize("size", [50, 250])
def test_kid_is_torch_fidelitys(counts, size):
    first, second = drawn(counts[0], 1), drawn(counts[1], 2, mean=0.4)
    arguments = {"kid_subsets": 20, "kid_subset_size": size}
    expected = of_torch_fidelity(first.double(), second.double(), **arguments)
    assert kid(first, second, 20, size) == pytest.approx(expected, rel=1e-9)
    assert kid(first, second, 20, size) == pytest.approx(of_torch_fidelity(first, second, **arguments), rel=1e-3)


def test_kid_of_few_images_takes_all_of_them():
    first, second = drawn(120, 1), drawn(90, 2, mean=0.4)
    expected = of_torch_fidelity(first.double(), second.double(), kid_subset_size=90)
    assert kid(first, second) == pytest.approx(expected, rel=1e-9)
    assert kid(second, second[:, :])[1] < 1e-12  # each subset is the whole


def test_without_subsets_kid_is_the_unbiased_formula():
    first, second = drawn(200, 1), drawn(200, 2, mean=0.4)
    assert kid(first, second, 1)[0] == pytest.approx(squared_mmd(cubic, first, second, diagonal=False), rel=1e-9)


def test_kid_is_the_same_whether_entries_are_shared_by_subsets_or_not():
    """2 subsets of 100 of 900 are measured one by one, 100 all at once."""
    first, second = drawn(900, 1), drawn(900, 2, mean=0.2)
    for subsets in (2, 100):
        arguments = {"kid_subsets": subsets, "kid_subset_size": 100}
        expected = of_torch_fidelity(first.double(), second.double(), **arguments)
        assert kid(first, second, subsets, 100) == pytest.approx(expected, rel=1e-9)


def test_kid_of_one_distribution_is_zero_on_average():
    assert abs(kid(drawn(1000, 1), drawn(1000, 2), 50, 200)[0]) < 0.1 * kid(drawn(1000, 1), drawn(1000, 2, 0.2))[0]


def test_kid_far_from_zero_keeps_its_digits():
    first, second = drawn(200, 1, mean=1e4).double(), drawn(200, 2, mean=1e4).double() + 0.5
    expected = exact_cubic_mmd(first, second)
    assert kid(first, second, 1)[0] == pytest.approx(expected, rel=1e-6)
    assert of_torch_fidelity(first.float(), second.float(), kid_subsets=1, kid_subset_size=200)[0] != pytest.approx(
        expected, rel=1e-3
    )


def exact_cubic_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """In Python's integers: features are multiples of 2^-10 after rounding, so nothing is lost."""
    import numpy as np

    n, d = x.shape
    x, y = (np.round(rows.numpy() * 1024).astype(np.int64) for rows in (x, y))
    total = 0
    for a, b, weight in ((x, x, 1), (y, y, 1), (x, y, -2)):
        inner = (a @ b.T).astype(object) + d * 1024**2
        cubes = inner**3
        if weight == 1:
            total += (cubes.sum() - np.trace(cubes)) * n
        else:
            total -= 2 * cubes.sum() * (n - 1)
    return total / (n * n * (n - 1)) / (d * 1024**2) ** 3


@pytest.mark.parametrize("counts", [(60, 60), (40, 70)])
def test_cmmd_is_its_formula(counts):
    first, second = (torch.nn.functional.normalize(drawn(n, n + 1, 0.2 * n / 40)) for n in counts)
    assert cmmd(first, second) == pytest.approx(1000 * squared_mmd(gaussian, first, second, diagonal=True), rel=1e-9)


def test_cmmd_of_equal_sets_is_zero():
    rows = torch.nn.functional.normalize(drawn(300, 1))
    assert abs(cmmd(rows, rows.flip(0))) < 1e-9


def test_cmmd_of_two_points_is_known():
    first, second = torch.zeros(5, 3), torch.tensor([[20.0, 0, 0]]).expand(7, 3)
    assert cmmd(first, second) == pytest.approx(2000 * (1 - math.exp(-2)), rel=1e-12)
    assert cmmd(first + 1e4, second + 1e4) == pytest.approx(2000 * (1 - math.exp(-2)), rel=1e-9)


def test_blocks_do_not_show(monkeypatch):
    first, second = drawn(310, 1), drawn(290, 2, mean=0.2)
    whole = kid(first, second, 10, 150), kid(first, second, 1, 150), cmmd(first, second)
    monkeypatch.setattr("looc_ldm.metrics.kernel.BLOCK", 64)
    for figures, expected in zip(
        (kid(first, second, 10, 150), kid(first, second, 1, 150), (cmmd(first, second),)),
        (*whole[:2], whole[2:]),
        strict=True,
    ):
        assert figures == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("figure", [cmmd, kid])
def test_no_kernel_matrix_is_ever_whole(figure, largest_tensor):
    first, second = drawn(3000, 1, dim=8), drawn(2500, 2, dim=8)
    with largest_tensor() as largest:
        figure(first, second)
    assert largest.elements <= max(BLOCK * BLOCK, SUBSETS * 3000) < 3000 * 2500 / 20  # which rows each subset takes


def test_what_has_no_kernel_distance_is_refused():
    rows = drawn(10, 1)
    for figure in (kid, cmmd):
        with pytest.raises(ValueError, match="at least 2 rows on each side, got 10 and 1"):
            figure(rows, rows[:1])
        with pytest.raises(ValueError, match=r"\(10, 48\) and \(10, 5\)"):
            figure(rows, rows[:, :5])
        with pytest.raises(ValueError, match="not finite"):
            figure(rows, rows / 0)
    with pytest.raises(ValueError, match="got 0 and 1000"):
        kid(rows, rows, subsets=0)
    with pytest.raises(ValueError, match="got 100 and 1"):
        kid(rows, rows, subset_size=1)
