"""Moments cover all vectors; their Fréchet distance equals torch-fidelity's and scipy's, however it is computed."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from looc_ldm.metrics.frechet import FeatureMoments, frechet_distance

DIM = 64


def drawn(count: int, seed: int = 0, dim: int = DIM, shift: float = 0.0) -> torch.Tensor:
    """Return vectors with correlated features, variances over four decades; mean and covariance depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, dim)[:, None]
    mean = torch.randn(dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + mean + shift


# Moments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 5, DIM, DIM + 1, 500])
@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_mean_and_covariance_are_those_of_all_rows_however_batched(count, batch):
    vectors = drawn(count)
    moments = FeatureMoments(DIM)
    for part in vectors.split(batch):
        moments.update(part)
    for found in (moments, FeatureMoments.from_tensors(moments.tensors())):
        assert found.count == count
        torch.testing.assert_close(found.mean, vectors.mean(0), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found.covariance, vectors.T.cov(), rtol=0, atol=1e-12 * float(vectors.var(0).max()))


def test_more_rows_than_features_take_the_memory_of_a_covariance(largest_tensor):
    vectors = drawn(1000)
    moments = FeatureMoments(DIM)
    moments.update(vectors[:DIM])
    torch.testing.assert_close(moments.vectors, vectors[:DIM])
    with largest_tensor() as largest:
        for part in vectors.split(5):
            moments.update(part)
        assert moments.mean.isfinite().all()
    assert moments.vectors is None
    assert largest.elements <= DIM * DIM


@pytest.mark.parametrize("count", [30, 500])
def test_published_statistics_stand_for_their_rows(count):
    first, second = drawn(count, 1), drawn(300, 2)
    published = FeatureMoments.from_mean_and_covariance(second.mean(0), second.T.cov())
    assert published.count is None
    for statistics in (published, FeatureMoments.from_tensors(published.tensors())):
        for pair in (
            (FeatureMoments.from_vectors(first), statistics),
            (statistics, FeatureMoments.from_vectors(first)),
        ):
            assert frechet_distance(*pair) == pytest.approx(distance(first, second), rel=1e-9)


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (torch.tensor([[1.0, 1.0], [0.0, 1.0]]), "symmetric"),
        (torch.full((2, 2), torch.nan), "finite"),
        (torch.zeros(3, 3), "shapes"),
    ],
)
def test_published_statistics_that_are_none_are_refused(covariance, message):
    with pytest.raises(ValueError, match=message):
        FeatureMoments.from_mean_and_covariance(torch.zeros(2), covariance)


# Distance -----------------------------------------------------------------------------------------------------------


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return frechet_distance(FeatureMoments.from_vectors(first), FeatureMoments.from_vectors(second))


def of_torch_fidelity(first: torch.Tensor, second: torch.Tensor) -> float:
    statistics = [fid_features_to_statistics(vectors) for vectors in (first, second)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def by_square_root(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the formula as it is written. If S1 S2 is singular, the root by eigenvectors of S1 is well defined."""
    means, covariances = zip(
        *((vectors.mean(0).numpy(), np.cov(vectors.numpy().T)) for vectors in (first, second)), strict=True
    )
    values, vectors = np.linalg.eigh(covariances[0])
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    if min(np.linalg.matrix_rank(covariance) for covariance in covariances) < len(root):
        trace = np.sqrt(np.clip(np.linalg.eigvalsh(root @ covariances[1] @ root), 0, None)).sum()
    else:
        trace = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real.trace()
    return float(np.square(means[0] - means[1]).sum() + covariances[0].trace() + covariances[1].trace() - 2 * trace)


@pytest.mark.parametrize("counts", [(500, 500), (500, 300), (DIM + 1, DIM + 2), (DIM + 2, 4000)])
def test_more_rows_than_features_give_the_distance_of_torch_fidelity_and_of_scipy(counts):
    first, second = drawn(counts[0], 1), drawn(counts[1], 2)
    # If vectors hardly outnumber features, the square root of theirs has noise that depends on the processor.
    tolerance = 1e-7 if min(counts) < 2 * DIM else 1e-8
    assert distance(first, second) == pytest.approx(of_torch_fidelity(first, second), rel=tolerance)
    assert distance(first, second) == pytest.approx(by_square_root(first, second), rel=tolerance)


@pytest.mark.parametrize("counts", [(20, 20), (40, 9), (2, 2), (DIM, DIM), (DIM, 500), (500, 30), (500, 2)])
def test_fewer_rows_than_features_give_the_same_distance(counts):
    first, second = drawn(counts[0], 1), drawn(counts[1], 2)
    assert distance(first, second) == pytest.approx(by_square_root(first, second), rel=1e-6)
    assert distance(first, second) == pytest.approx(of_torch_fidelity(first, second), rel=1e-5)  # it has the noise


def changed(kind: str, vectors: torch.Tensor) -> torch.Tensor:
    vectors = vectors.clone()
    if kind == "features twice":
        vectors[:, : DIM // 2] = vectors[:, DIM // 2 :]
    elif kind == "constant features":
        vectors[:, ::3] = 0.25
    elif kind == "one constant feature":
        vectors[:, 5] = 0
    elif kind == "a direction without variance":
        vectors[:, 0] = vectors[:, 1:].sum(1)
    elif kind == "vectors twice":
        vectors = vectors[: len(vectors) // 2].repeat(2, 1)
    return vectors


KINDS = ("features twice", "constant features", "one constant feature", "a direction without variance", "vectors twice")


@pytest.mark.parametrize("counts", [(500, 400), (DIM + 1, DIM + 1), (40, 30), (500, 30)])
@pytest.mark.parametrize("kind", KINDS)
def test_singular_covariances_give_the_same_distance(counts, kind):
    first, second = drawn(counts[0], 1), drawn(counts[1], 2)
    for pair in ((changed(kind, first), changed(kind, second)), (changed(kind, first), second)):
        expected = by_square_root(*pair)
        assert distance(*pair) == pytest.approx(expected, rel=1e-6)
        assert distance(*pair[::-1]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [2, 30, DIM, DIM + 1, 500])
@pytest.mark.parametrize("kind", ["as they are", *KINDS])
def test_equal_sets_are_at_distance_zero(count, kind):
    vectors = changed(kind, drawn(count, 1))
    assert 0 <= distance(vectors, vectors.flip(0)) <= 1e-6 * float(vectors.var(0).sum())


@pytest.mark.parametrize("count", [30, 500])
def test_features_far_from_zero_give_the_same_distance(count):
    near = distance(drawn(count, 1), drawn(count, 2))
    assert distance(drawn(count, 1, shift=1e4), drawn(count, 2, shift=1e4)) == pytest.approx(near, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1000, 2100])
def test_at_the_size_of_fid_it_is_the_formula(count):
    first, second = drawn(count, 1, dim=2048), drawn(count, 2, dim=2048)
    assert distance(first, second) == pytest.approx(by_square_root(first, second), rel=1e-6)


def test_what_has_no_distance_is_refused():
    vectors = drawn(10, 1)
    with pytest.raises(ValueError, match="at least 2 images on each side, got 1"):
        distance(vectors, vectors[:1])
    with pytest.raises(ValueError, match="64 and 3"):
        distance(vectors, vectors[:, :3])
