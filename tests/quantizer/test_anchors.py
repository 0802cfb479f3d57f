"""The features that codevectors are revived with: who may be drawn, and how often."""

import pytest
import torch

from looc_ldm.quantizer.anchors import better_anchors
from looc_ldm.quantizer.search import DISTANCES, nearest_codevectors
from tiny import similarity_float64


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("num_calls", [1, 2])
def test_probrandom_draws_in_proportion_to_exp_similarity(num_calls, distance):
    torch.manual_seed(0)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5], [0.4, 0.9]])
    codebook = torch.tensor([[0.8, 0.3]]).repeat(20_000, 1)  # one draw per codevector
    anchors = None
    for part in vectors.chunk(num_calls):
        anchors = better_anchors(anchors, nearest_codevectors(part, codebook, distance, "probrandom").anchors)
    drawn = (anchors.vector[:, None] == vectors).all(-1).double().mean(0)
    expected = similarity_float64(vectors, codebook[:1], distance).softmax(dim=0)[:, 0]
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0.015)  # four standard errors


@pytest.mark.parametrize("sizes", [(5,), (1, 4)])
def test_random_draws_uniformly_over_all_calls_together(sizes):
    torch.manual_seed(0)
    vectors, codebook = torch.arange(10.0).view(5, 2), torch.randn(20_000, 2)
    anchors = None
    for part in vectors.split(sizes):
        anchors = better_anchors(anchors, nearest_codevectors(part, codebook, "cosine", "random").anchors)
    drawn = (anchors.vector[:, None] == vectors).all(-1).double().mean(0)
    torch.testing.assert_close(drawn, torch.full((5,), 0.2, dtype=torch.float64), rtol=0, atol=0.012)


def at_distances(*squared: float) -> torch.Tensor:
    """Vectors whose squared distances from the origin these are, in different directions."""
    angles = torch.arange(len(squared)) + 0.5
    return torch.tensor(squared).sqrt()[:, None] * torch.stack([angles.cos(), angles.sin()], dim=1)


# Each of 256 proposals is accepted with probability exp(-squared distance).
FAR = {
    "never accepted": [at_distances(100, 100.5, 101, 101.5)],
    "never accepted, in two calls": [at_distances(100, 101), at_distances(100.5, 101.5, 100.2)],
    "accepted for some codevectors": [at_distances(5, 5.5, 6, 6.5)],
    "accepted for some codevectors, in two calls": [at_distances(5.5, 6.5), at_distances(5, 6, 5)],
    "accepted in the first call and hardly in the second": [at_distances(3), at_distances(*[7.0] * 50)],
}


@pytest.mark.parametrize("calls", FAR.values(), ids=FAR)
def test_probrandom_draws_far_features_in_the_same_proportion(calls):
    torch.manual_seed(0)
    codebook, anchors = torch.zeros(20_000, 2), None
    for part in calls:
        anchors = better_anchors(anchors, nearest_codevectors(part, codebook, "euclidean", "probrandom").anchors)
    vectors = torch.cat(calls)
    similarity = similarity_float64(vectors, codebook[:1], "euclidean")[:, 0]
    drawn = (anchors.vector[:, None] == vectors).all(-1).double().mean(0)
    expected = similarity.softmax(dim=0)
    assert drawn.sum().item() == pytest.approx(1)
    tolerance = 4.5 * (expected * (1 - expected) / len(codebook)).sqrt()
    assert ((drawn - expected).abs() < tolerance).all()
    # The score is that of the largest of similarity + Gumbel noise: a Gumbel variable itself.
    highest = similarity.logsumexp(0)
    assert anchors.score.double().mean().item() == pytest.approx(highest.item() + 0.5772, abs=0.04)
    assert anchors.score.double().std().item() == pytest.approx(torch.pi / 6**0.5, abs=0.05)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("anchor", ["closest", "probrandom"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("d", [4, 20])
def test_a_vector_that_is_not_finite_is_nobodys_anchor(distance, anchor, d, value):
    torch.manual_seed(0)
    vectors, codebook = torch.randn(300, d), torch.randn(200, d)
    vectors[::2, 1] = value
    score, vector = nearest_codevectors(vectors, codebook, distance, anchor).anchors
    assert vector.isfinite().all()
    assert score.isfinite().all()
    if anchor == "closest":  # and the others are found as if it were not there
        expected = nearest_codevectors(vectors[1::2], codebook, distance, anchor).anchors
        torch.testing.assert_close(score, expected.score)
        assert torch.equal(vector, expected.vector)
    nothing = nearest_codevectors(torch.full((3, d), value), codebook, distance, anchor).anchors
    assert (nothing.score == -torch.inf).all()
    assert torch.equal(better_anchors(nothing, better_anchors(None, type(nothing)(score, vector))).vector, vector)
