"""The nearest-codevector search finds what brute force finds, without the N x K matrix."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from looc_ldm.quantizer import chunks, search, search_cpu
from looc_ldm.quantizer.search import DISTANCES, nearest_codevectors
from tiny import similarity_float64


@pytest.mark.parametrize("distance", DISTANCES)
def test_closest_anchor_of_each_codevector_is_the_most_similar_raw_vector(distance):
    torch.manual_seed(0)
    vectors, codebook = torch.randn(3000, 4), torch.randn(37, 4)
    anchors = nearest_codevectors(vectors, codebook, distance, "closest").anchors
    score, row = similarity_float64(vectors, codebook, distance).max(dim=0)
    assert torch.equal(anchors.vector, vectors[row])
    torch.testing.assert_close(anchors.score, score.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_result_does_not_depend_on_the_chunk_size(distance, monkeypatch):
    torch.manual_seed(0)
    vectors, codebook = torch.randn(1000, 4), torch.randn(50, 4)
    if distance == "euclidean":  # on a coarse grid the arithmetic is exact, and full of ties
        vectors, codebook = vectors.round(), codebook.round()
    whole = nearest_codevectors(vectors, codebook, distance, "closest")
    for rows in (1, 7, 64, 999):
        monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", rows * len(codebook))
        chunked = nearest_codevectors(vectors, codebook, distance, "closest")
        assert torch.equal(chunked.indices, whole.indices)
        assert torch.equal(chunked.anchors.vector, whole.anchors.vector)


@pytest.mark.parametrize("anchor", ["none", "closest", "probrandom", "random"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_no_tensor_of_size_n_times_k_is_made(distance, anchor, largest_tensor):
    vectors, codebook = torch.randn(20_000, 4), torch.randn(1024, 4)
    with largest_tensor() as largest:
        nearest_codevectors(vectors, codebook, distance, anchor)
    assert vectors.numel() <= largest.elements <= 2**20 < vectors.shape[0] * codebook.shape[0] // 10


EPS = torch.finfo(torch.float32).eps
# (N, K, d): N around the block of 256 vectors and its parts, K around the groups of 2 and 4, d on both sides of the
# fused loop's limit of 16.
SHAPES = [
    *((n, 37, 4) for n in (1, 2, 255, 256, 257, 511, 513, 3000)),
    *((100, k, 4) for k in (2, 3, 5, 64, 65, 5000)),
    *((300, k, d) for k, d in ((7, 1), (640, 1), (50, 2), (513, 2), (33, 5), (1023, 16), (33, 17), (700, 40))),
]
SEARCHES = ("fused", "chunks", "blocks")


def run_search(name: str, vectors: torch.Tensor, codebook: torch.Tensor, distance: str, threads: int = 1):
    """The indices that one of the CPU's back ends finds."""
    if name == "blocks":
        return search._search_blocks(vectors, codebook, distance)
    query, cosine = search._query(codebook, distance), distance == "cosine"
    if name == "chunks":
        return search._search_chunks(vectors, query, cosine)
    z, keys, bias, offset = (tensor.numpy() for tensor in (vectors, *query))
    return torch.from_numpy(search_cpu.search_fused(z, keys, bias, offset, threads))


def run_closest(name: str, vectors: torch.Tensor, codebook: torch.Tensor, distance: str, threads: int = 1):
    """Scores and rows of the closest vectors that one of the CPU's back ends finds."""
    query, cosine = search._query(codebook, distance), distance == "cosine"
    if name == "chunks":
        return search._closest_chunks(vectors, query, cosine)
    arrays = [tensor.numpy() for tensor in (vectors, *query)]
    return tuple(map(torch.from_numpy, search_cpu.closest_fused(*arrays, cosine, threads)))


def exact_search(vectors: torch.Tensor, codebook: torch.Tensor, distance: str):
    """By float64: the indices, and which of them float32 must find.

    A dot product of d terms, with the roundings of its factors, is off by at most (d + 8) eps |z| |c|, where z and c
    are relative to the codebook's mean. An index is certain if it leads by four times that.
    """
    vectors, codebook = vectors.double(), codebook.double()
    if distance == "cosine":
        similarity = F.normalize(vectors, dim=1) @ F.normalize(codebook, dim=1).T
        rounding = torch.tensor(1.0)
    else:  # half the squared distance, up to a term that is the same for all codevectors
        vectors, codebook = vectors - codebook.mean(0), codebook - codebook.mean(0)
        lengths = codebook.norm(dim=1)
        similarity = vectors @ codebook.T - 0.5 * lengths.square()
        rounding = (vectors.norm(dim=1) + lengths.max()) * lengths.max()
    best, second = similarity.topk(2, dim=1).values.unbind(1)
    return similarity.argmax(1), best - second > 4 * (codebook.shape[1] + 8) * EPS * rounding


def random_problem(kind: str, n: int, k: int, d: int):
    torch.manual_seed(n + k + d)
    vectors, codebook = torch.randn(n, d), torch.randn(k, d)
    if kind == "far":  # from the origin, for the spread
        return vectors + 1e4, codebook + 1e4
    return vectors * float(kind), codebook * float(kind)


@pytest.mark.parametrize(
    ("distance", "kind"), [*((d, kind) for d in DISTANCES for kind in ("1e-3", "1", "1e3")), ("euclidean", "far")]
)
def test_every_index_that_float32_can_tell_is_that_of_brute_force_on_every_back_end(distance, kind):
    certain_ones = total = 0
    for n, k, d in SHAPES if kind in ("1", "far") else SHAPES[5:18:4]:
        vectors, codebook = random_problem(kind, n, k, d)
        if distance == "cosine" and d == 1:
            continue
        expected, certain = exact_search(vectors, codebook, distance)
        for anchor in ("none", "closest"):
            indices, counts, _ = nearest_codevectors(vectors, codebook, distance, anchor)
            assert torch.equal(indices[certain], expected[certain]), (n, k, d)
            assert torch.equal(counts, torch.bincount(indices, minlength=k)), (n, k, d)
        for name in SEARCHES if d <= 16 else SEARCHES[1:]:
            indices = run_search(name, vectors, codebook, distance)
            assert torch.equal(indices[certain], expected[certain]), (name, n, k, d)
        certain_ones, total = certain_ones + certain.sum(), total + n
    assert certain_ones > 0.95 * total


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", SEARCHES)
def test_exact_ties_go_to_the_lowest_index_on_every_back_end(name, distance):
    torch.manual_seed(0)
    for k in (2, 6, 30, 87, 150, 778):
        if distance == "euclidean":  # small whole numbers around a mean of exactly 0: all the arithmetic is exact
            half = torch.randint(-2, 3, (k // 2, 4)).float()
            codebook, vectors = torch.cat([half, -half]), torch.randint(-3, 4, (600, 4)).float()
            distances = (vectors[:, None] - codebook).square().sum(-1)
            lowest = (distances == distances.amin(1, keepdim=True)).int().argmax(1)
            assert torch.equal(run_search(name, vectors, codebook, distance), lowest)
        directions = torch.randn(k, 4)
        factors = (1, 4, 0.5) if distance == "cosine" else (1, 1, 1)
        codebook = torch.cat([factor * directions for factor in factors])
        assert run_search(name, torch.randn(600, 4), codebook, distance).max() < k


@pytest.mark.parametrize("name", SEARCHES)
def test_by_cosine_a_vector_of_zeros_is_equally_similar_to_all_and_a_codevector_of_zeros_at_right_angles(name):
    torch.manual_seed(0)
    codebook, vectors = torch.randn(200, 4), torch.randn(500, 4)
    codebook[7] = 0
    vectors[3] = 0
    indices = run_search(name, vectors, codebook, "cosine")
    expected, certain = exact_search(vectors, codebook, "cosine")
    assert indices[3] == 0
    assert torch.equal(indices[certain], expected[certain])


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("d", [2, 4])
def test_the_number_of_threads_changes_nothing(distance, d, monkeypatch):
    monkeypatch.setattr(search_cpu, "PARALLEL_PAIRS", 1)
    monkeypatch.setattr(search_cpu.os, "cpu_count", lambda: 64)
    torch.manual_seed(0)
    codebook = torch.randint(-9, 10, (60, d)).float()
    for n in (1, 255, 256, 257, 486, 712, 2049):
        vectors = torch.randint(-9, 10, (n, d)).float()  # full of ties
        alone = run_search("fused", vectors, codebook, distance)
        for threads in (2, 3, 8, 25):
            assert torch.equal(run_search("fused", vectors, codebook, distance, threads), alone)
        score, row = run_closest("fused", vectors, codebook, distance)
        for threads in (2, 3, 8):
            several = run_closest("fused", vectors, codebook, distance, threads)
            assert torch.equal(several[0], score)
            assert torch.equal(several[1], row)


@pytest.mark.parametrize("name", ["fused", "chunks"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_closest_vectors_are_those_of_brute_force_and_ties_the_first_on_every_back_end(name, distance):
    for n, k, d in ((1, 2, 4), (257, 37, 4), (700, 5, 4), (513, 90, 16), (300, 20, 6)):
        vectors, codebook = random_problem("1", n, k, d)
        vectors = torch.cat([vectors, vectors])
        score, row = run_closest(name, vectors, codebook, distance)
        similarity = similarity_float64(vectors, codebook, distance)[:n]
        best, second = similarity.topk(min(2, n), dim=0).values[[0, -1]]
        assert row.max() < n
        certain = best - second > 1e-5 if n > 1 else torch.full((k,), True)
        assert certain.sum() > 0.9 * k
        assert torch.equal(row[certain], similarity.argmax(0)[certain])
        torch.testing.assert_close(score.double(), best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("d", [3, 7, 40])
def test_without_numba_the_search_finds_the_same(distance, d, monkeypatch):
    problems = [random_problem("1", n, k, d) for n, k in ((1, 2), (300, 37), (300, 600))]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "numba", None)  # importing it now fails
        for cached in (search_cpu.numba_available, search_cpu._search_loop, search_cpu._closest_loop):
            cached.cache_clear()
        without = [nearest_codevectors(*problem, distance, "closest") for problem in problems]
        assert not search_cpu.numba_available()
    search_cpu.numba_available.cache_clear()
    for problem, found in zip(problems, without, strict=True):
        expected = nearest_codevectors(*problem, distance, "closest")
        certain = exact_search(*problem, distance)[1]
        assert certain.float().mean() > 0.98
        assert torch.equal(found.indices[certain], expected.indices[certain])
        torch.testing.assert_close(found.anchors, expected.anchors, rtol=1e-5, atol=1e-5)


def precisions() -> tuple[str, str, str]:
    """Precisions of float32: in all operators, in matrix products of GPUs, and in matrix products of CPUs."""
    backends = torch.backends
    return backends.fp32_precision, backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision


class PrecisionOfMatrixProducts(TorchDispatchMode):
    """Records the precisions that matrix products on CPUs are made with."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            everywhere, _, on_cpus = precisions()
            self.seen.add(everywhere if on_cpus == "none" else on_cpus)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _precision_of_the_user():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


# torch has two interfaces, and asking one after the other was used raises.


@pytest.mark.parametrize(
    "choice",
    [
        *(f"torch.set_float32_matmul_precision('{precision}')" for precision in ("highest", "high", "medium")),
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
        "torch.backends.fp32_precision = 'tf32'",
    ],
)
@pytest.mark.parametrize("distance", DISTANCES)
def test_codes_do_not_depend_on_the_precision_the_user_chose_which_stays(distance, choice):
    vectors, codebook = random_problem("1", 700, 500, 40)
    expected = nearest_codevectors(vectors, codebook, distance, "closest")
    exec(choice)
    chosen = precisions()
    with PrecisionOfMatrixProducts() as products:
        found = nearest_codevectors(vectors, codebook, distance, "closest")
    assert products.seen == {"ieee"}
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.anchors.vector, expected.anchors.vector)
    assert precisions() == chosen
    with pytest.raises(RuntimeError, match="shapes"):
        nearest_codevectors(vectors[:, 1:], codebook, "cosine")
    assert precisions() == chosen
