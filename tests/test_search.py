"""The nearest-codevector search finds what brute force finds, without the N x K matrix."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from looc_ldm import search
from looc_ldm.anchors import better_anchors
from looc_ldm.search import DISTANCES, nearest_codevectors


def similarity_float64(vectors: torch.Tensor, codebook: torch.Tensor, distance: str) -> torch.Tensor:
    """(N, K), by definition: the cosine, or minus the squared distance."""
    vectors, codebook = vectors.double(), codebook.double()
    if distance == "cosine":
        return F.cosine_similarity(vectors[:, None], codebook[None], dim=-1)
    return -(vectors[:, None] - codebook[None]).square().sum(-1)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("anchor", ["none", "closest"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_indices_are_those_of_brute_force_in_float64(distance, anchor):
    torch.manual_seed(0)
    vectors, codebook = torch.randn(3000, 4), torch.randn(37, 4)
    similarity = similarity_float64(vectors, codebook, distance)
    best, second = similarity.topk(2, dim=1).values.unbind(1)
    decided = best - second > 1e-5  # float32 cannot tell closer ones apart
    assert decided.float().mean() > 0.99
    indices = nearest_codevectors(vectors, codebook, distance, anchor).indices
    assert torch.equal(indices[decided], similarity.argmax(1)[decided])


@pytest.mark.parametrize("distance", DISTANCES)
def test_closest_anchor_of_each_codevector_is_the_most_similar_raw_vector(distance):
    torch.manual_seed(0)
    vectors, codebook = torch.randn(3000, 4), torch.randn(37, 4)
    anchors = nearest_codevectors(vectors, codebook, distance, "closest").anchors
    score, row = similarity_float64(vectors, codebook, distance).max(dim=0)
    assert torch.equal(anchors.vector, vectors[row])
    torch.testing.assert_close(anchors.score, score.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("anchor", ["none", "closest"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("num_distinct", [2, 3, 5, 16, 21, 100, 341])
def test_equal_codevectors_lose_to_the_first_of_them(num_distinct, distance, anchor):
    torch.manual_seed(0)
    codebook = torch.randn(num_distinct, 6).repeat(3, 1)
    for num_vectors in (1, 3, 500):
        indices = nearest_codevectors(torch.randn(num_vectors, 6), codebook, distance, anchor).indices
        assert indices.max() < num_distinct


def test_equally_similar_vectors_lose_to_the_first_of_them(monkeypatch):
    codebook = torch.tensor([[1.0, 2.0], [-3.0, 1.0]])
    vectors = torch.cat([codebook, 2 * codebook, 4 * codebook])  # the same two directions
    for rows in (1, 2, 100):
        monkeypatch.setattr(search, "CHUNK_ELEMENTS", rows * len(codebook))
        anchors = nearest_codevectors(vectors, codebook, "cosine", "closest").anchors
        assert torch.equal(anchors.vector, codebook)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_result_does_not_depend_on_the_chunk_size(distance, monkeypatch):
    torch.manual_seed(0)
    vectors, codebook = torch.randn(1000, 4), torch.randn(50, 4)
    if distance == "euclidean":  # on a coarse grid the arithmetic is exact, and full of ties
        vectors, codebook = vectors.round(), codebook.round()
    whole = nearest_codevectors(vectors, codebook, distance, "closest")
    for rows in (1, 7, 64, 999):
        monkeypatch.setattr(search, "CHUNK_ELEMENTS", rows * len(codebook))
        chunked = nearest_codevectors(vectors, codebook, distance, "closest")
        assert torch.equal(chunked.indices, whole.indices)
        assert torch.equal(chunked.anchors.vector, whole.anchors.vector)


@pytest.mark.parametrize("anchor", ["none", "closest", "probrandom", "random"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_no_tensor_of_size_n_times_k_is_made(distance, anchor):
    vectors, codebook = torch.randn(20_000, 4), torch.randn(1024, 4)
    with LargestTensor() as largest:
        nearest_codevectors(vectors, codebook, distance, anchor)
    assert vectors.numel() <= largest.elements <= 2**20 < vectors.shape[0] * codebook.shape[0] // 10


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
