"""Moments are those of all rows, however these came."""

import pytest
import torch

from looc_ldm.metrics.moments import FeatureMoments

DIM = 24
COUNTS = (2, 5, DIM, DIM + 1, 200)


def drawn(count: int, dim: int = DIM, seed: int = 0) -> torch.Tensor:
    """Rows with correlated features of very different variances."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, dim)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + 0.3


def assert_equal(first: FeatureMoments, second: FeatureMoments, tolerance: float = 1e-12) -> None:
    assert first.count == second.count
    torch.testing.assert_close(first.mean, second.mean, rtol=tolerance, atol=tolerance)
    scale = float(second.covariance.abs().max())
    torch.testing.assert_close(first.covariance, second.covariance, rtol=0, atol=tolerance * scale)
    assert first.total_variance == pytest.approx(second.total_variance, rel=tolerance)


@pytest.mark.parametrize("count", COUNTS)
def test_mean_and_covariance_are_those_of_all_rows(count):
    rows = drawn(count)
    moments = FeatureMoments.from_rows(rows)
    assert moments.count == count
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(moments.covariance, rows.T.cov(), rtol=0, atol=1e-12 * float(rows.var(0).max()))
    assert moments.total_variance == pytest.approx(float(rows.var(0).sum()), rel=1e-12)
    assert torch.equal(moments.covariance, moments.covariance.T)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_do_not_matter(count, batch):
    rows = drawn(count)
    moments = FeatureMoments(DIM)
    for part in rows.split(batch):
        moments.update(part)
    assert_equal(moments, FeatureMoments.from_rows(rows))


def test_figures_on_the_way_do_not_change_what_follows():
    rows = drawn(200)
    moments = FeatureMoments(DIM)
    for part in rows.split(9):
        moments.update(part)
        if moments.count > 1:
            assert_equal(moments, FeatureMoments.from_rows(rows[: moments.count]))


def test_features_far_from_zero_keep_their_covariance():
    rows = drawn(2000)
    near, far = FeatureMoments.from_rows(rows), FeatureMoments(DIM)
    for part in (rows + 1e4).split(33):
        far.update(part)
    difference = (far.covariance - near.covariance).abs().max() / near.covariance.abs().max()
    assert difference < 1e-11
    in_float32 = (rows + 1e4).float().T.cov()
    assert (in_float32 - near.covariance).abs().max() / near.covariance.abs().max() > 1e-6


@pytest.mark.parametrize("count", COUNTS)
def test_tensors_give_the_moments_back(count):
    moments = FeatureMoments.from_rows(drawn(count))
    tensors = moments.tensors()
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert sum(tensor.numel() for tensor in tensors.values()) <= DIM * DIM + DIM + 1
    again = FeatureMoments.from_tensors(tensors)
    assert_equal(again, moments, 1e-14)
    for one in (moments, again):
        one.update(drawn(30, seed=1))
    assert_equal(again, moments)


def test_published_statistics_are_taken_as_they_are():
    rows = drawn(100)
    published = FeatureMoments.from_mean_and_covariance(rows.mean(0), rows.T.cov(), 100)
    assert_equal(published, FeatureMoments.from_rows(rows))
    unknown = FeatureMoments.from_mean_and_covariance(rows.mean(0), rows.T.cov())
    assert unknown.count is None
    assert_equal(FeatureMoments.from_tensors(unknown.tensors()), unknown)
    torch.testing.assert_close(unknown.covariance, rows.T.cov())
    with pytest.raises(ValueError, match="not known"):
        unknown.update(rows)


def test_rows_are_kept_while_they_take_no_more_memory_than_a_covariance(largest_tensor):
    rows = drawn(500)
    moments = FeatureMoments(DIM)
    moments.update(rows[:DIM])
    torch.testing.assert_close(moments.rows, rows[:DIM])
    rows[:DIM] = 0  # the caller's rows are the caller's
    assert moments.rows.abs().max() > 0
    with largest_tensor() as largest:
        for part in rows.split(5):
            moments.update(part)
        assert moments.mean.isfinite().all()
    assert moments.rows is None
    assert largest.elements <= 2 * DIM * DIM


def test_what_cannot_be_rows_is_refused():
    with pytest.raises(ValueError, match=r"\(n, 24\)"):
        FeatureMoments(DIM).update(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="dim"):
        FeatureMoments(0)
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        FeatureMoments.from_rows(drawn(1)).covariance  # noqa: B018
    with pytest.raises(ValueError, match="symmetric"):
        FeatureMoments.from_mean_and_covariance(torch.zeros(2), torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="finite"):
        FeatureMoments.from_mean_and_covariance(torch.zeros(2), torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="shapes"):
        FeatureMoments.from_mean_and_covariance(torch.zeros(2), torch.zeros(3, 3))
