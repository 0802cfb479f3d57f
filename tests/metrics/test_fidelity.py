"""KID, Inception score, precision and recall of features have the values that they must have, in float64."""

import numpy as np
import pytest
import torch
from torch_fidelity import metric_prc

from looc_ldm.metrics import fidelity
from looc_ldm.metrics.fidelity import inception_score, kid, precision_recall


def drawn(count: int, seed: int, scale: float = 1.0, mean: float = 0.0, dim: int = 12) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) * scale + mean


def unbiased_cubic_mmd(first: torch.Tensor, second: torch.Tensor) -> float:
    x, y = first.double(), second.double()
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    own = [(matrix.sum() - matrix.trace()) / (len(matrix) * (len(matrix) - 1)) for matrix in (xx, yy)]
    return float(sum(own) - 2 * xy.mean())


def test_kid_is_the_mean_over_subsets_of_the_size_of_the_smaller_set():
    first, second = drawn(120, 1), drawn(90, 2, mean=0.4)
    generator = np.random.RandomState(2020)
    values = []
    for _ in range(100):
        chosen = generator.choice(120, 90, replace=False), generator.choice(90, 90, replace=False)
        values.append(unbiased_cubic_mmd(first[chosen[0]], second[chosen[1]]))
    assert kid(first, second) == pytest.approx((np.mean(values), np.std(values)), rel=1e-9)


def test_the_inception_score_is_from_one_to_the_number_of_classes():
    assert inception_score(100 * torch.eye(5).repeat(200, 1))[0] == pytest.approx(5, rel=0.02)
    assert inception_score(drawn(1, 1).repeat(50, 1)) == pytest.approx((1, 0), abs=1e-12)


def test_narrow_images_are_precise_and_wide_ones_recall():
    reference = drawn(500, 2)
    narrow, wide = precision_recall(drawn(500, 1, 0.5), reference), precision_recall(drawn(500, 1, 2.0), reference)
    assert narrow[0] > 0.9 > 0.3 > narrow[1]
    assert wide[1] > 0.9 > 0.3 > wide[0]


def test_precision_and_recall_never_hold_a_whole_distance_matrix(largest_tensor, monkeypatch):
    generated, reference = drawn(900, 1), drawn(800, 2, 1.2)
    expected = metric_prc.calculate_precision_recall_full(generated.double(), reference.double())
    monkeypatch.setattr(fidelity, "BATCH", 50)
    with largest_tensor() as largest:
        assert precision_recall(generated, reference) == pytest.approx(expected, abs=1e-7)
    assert largest.elements <= 50 * 900


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="at least 2 images on each side, got 10 and 1"):
        kid(drawn(10, 1), drawn(1, 2))
    with pytest.raises(ValueError, match="at least 4 images on each side, got 10 and 3"):
        precision_recall(drawn(10, 1), drawn(3, 2))
    with pytest.raises(ValueError, match="at least 10 images, got 4"):
        inception_score(drawn(4, 1))
