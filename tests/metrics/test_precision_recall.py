"""Precision and recall are torch-fidelity's, without a distance matrix in memory."""

import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from looc_ldm.metrics.precision_recall import BLOCK, precision_recall

DIM = 12


def drawn(count: int, seed: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)) * scale + mean


@pytest.mark.parametrize("counts", [(200, 200), (150, 310), (310, 150)])
@pytest.mark.parametrize("neighbors", [1, 3, 10])
@pytest.mark.parametrize("scale", [0.7, 1.0, 1.3])
def test_they_are_torch_fidelitys(counts, neighbors, scale):
    generated, reference = drawn(counts[0], 1, scale, 0.2), drawn(counts[1], 2)
    expected = calculate_precision_recall_full(generated.double(), reference.double(), neighbors)
    figures = precision_recall(generated, reference, neighbors)
    assert figures == pytest.approx(expected, abs=1e-7)  # exactly: its mean is of float32
    assert 0 < min(figures) < 1


def test_blocks_do_not_show(monkeypatch):
    generated, reference = drawn(200, 1, 1.2), drawn(150, 2)
    expected = precision_recall(generated, reference)
    for block in (17, 64):
        monkeypatch.setattr("looc_ldm.metrics.precision_recall.BLOCK", block)
        assert precision_recall(generated, reference) == expected


def test_narrow_images_are_precise_and_wide_ones_recall():
    reference = drawn(500, 2)
    narrow, wide = precision_recall(drawn(500, 1, 0.5), reference), precision_recall(drawn(500, 1, 2.0), reference)
    assert narrow[0] > 0.9 > 0.3 > narrow[1]
    assert wide[1] > 0.9 > 0.3 > wide[0]


def test_equal_sets_have_both_at_one_and_distant_ones_at_zero():
    rows = drawn(100, 1)
    assert precision_recall(rows, rows) == (1, 1)
    assert precision_recall(rows + 100, rows) == (0, 0)


@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize("different", [3, 37])
def test_images_that_are_there_many_times_are_found(different, others):
    """Their balls have radius 0, and reach what lies at their centre, whatever rounding does to distances."""
    reference = torch.cat([drawn(different, 1, mean=3.0).repeat_interleave(5, 0), drawn(others, 5, mean=-40.0)])
    generated = torch.cat([drawn(4, 2, mean=50.0), reference[: 5 * different : 5]])
    assert precision_recall(generated, reference)[0] == different / (different + 4)


def test_features_far_from_zero_give_the_same():
    generated, reference = drawn(200, 1, 1.2).double(), drawn(150, 2).double()
    for shift in (1e4, 1e6):
        assert precision_recall(generated + shift, reference + shift) == precision_recall(generated, reference)


def test_no_distance_matrix_is_ever_whole(largest_tensor):
    with largest_tensor() as largest:
        precision_recall(drawn(3000, 1), drawn(2500, 2))
    assert largest.elements <= 1.1 * BLOCK * BLOCK


def test_what_has_no_neighbors_is_refused():
    with pytest.raises(ValueError, match="10 and 3, got 3"):
        precision_recall(drawn(10, 1), drawn(3, 2))
    with pytest.raises(ValueError, match="got 0"):
        precision_recall(drawn(10, 1), drawn(10, 2), 0)
    with pytest.raises(ValueError, match=r"\(10, 12\) and \(10, 5\)"):
        precision_recall(drawn(10, 1), drawn(10, 2)[:, :5])
    with pytest.raises(ValueError, match="not finite"):
        precision_recall(drawn(10, 1), drawn(10, 2) / 0)
