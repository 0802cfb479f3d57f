"""The Triton search finds what brute force finds. Without CUDA, this file is also the script that interprets it."""

import functools
import importlib.util
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from looc_ldm.quantizer import search
from looc_ldm.quantizer import search_triton as triton_module
from looc_ldm.quantizer.search_triton import search_triton, triton_usable

DIMS = (1, 4, 5, 33, 64)
CODEBOOK_SIZES = (2, 17, 1000)
SIZES = sorted({*product(DIMS, (17, 256)), *product((1, 4), CODEBOOK_SIZES)})  # (d, K)
NORMALIZE = (False, True)
REPEATED_CODES = (2, 21, 24)  # in tiles of 8: equal ones in one tile; in several; in the same place of several
REPEATED_VECTORS = (5, 21, 32)  # in tiles of 16: likewise
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED_BLOCKS = ((32, 16), (32, 128))  # larger than a GPU's, since every operation costs the same

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def problem(vectors: torch.Tensor, codebook: torch.Tensor, normalize: bool, offset=0.0, **arguments) -> dict:
    """Arguments of `search_triton`; the codebook is given relative to the offset, as its keys are."""
    bias = torch.zeros(len(codebook)) if normalize else -0.5 * codebook.square().sum(1)
    keys = F.normalize(codebook, dim=1) if normalize else codebook
    offset = torch.full(vectors.shape[1:], offset)
    return {"vectors": vectors, "keys": keys, "bias": bias, "offset": offset, "normalize": normalize} | {
        "closest": True,
        "block": INTERPRETED_BLOCKS[len(codebook) > 64] if DEVICE == "cpu" else None,
        **arguments,
    }


def random_problem(d: int, num_codevectors: int, normalize: bool, num_vectors: int = 67, **arguments) -> dict:
    generator = torch.Generator().manual_seed(num_codevectors * 64 + d)
    vectors = torch.randn(num_vectors, d, generator=generator) + arguments.get("offset", 0.0)
    return problem(vectors, torch.randn(num_codevectors, d, generator=generator), normalize, **arguments)


def repeated_codes(num_distinct: int, normalize: bool) -> dict:
    """Some codes, three times."""
    generator = torch.Generator().manual_seed(num_distinct)
    codebook = torch.randn(num_distinct, 4, generator=generator).repeat(3, 1)
    return problem(torch.randn(100, 4, generator=generator), codebook, normalize, block=(64, 8))


def repeated_vectors(num_distinct: int, normalize: bool) -> dict:
    """Some vectors over and over, through more tiles than there are copies of the anchors."""
    generator = torch.Generator().manual_seed(num_distinct)
    vectors = torch.randn(num_distinct, 4, generator=generator).repeat(100, 1)[:280]
    return problem(vectors, torch.randn(20, 4, generator=generator), normalize, block=(16, 16))


def vectors_away_from_codes(normalize: bool) -> dict:
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = torch.rand(100, 4, generator=generator), torch.rand(20, 4, generator=generator)
    return problem(vectors + 1, -codebook - 1, normalize)


def broken_vectors(normalize: bool) -> dict:
    """Rows 0 to 69 are not finite."""
    arguments = random_problem(4, 20, normalize, num_vectors=150)
    for row in range(70):
        arguments["vectors"][row, row % 4] = (torch.nan, torch.inf, -torch.inf)[row % 3]
    return arguments


@functools.cache
def cases() -> dict[tuple, dict]:
    """The arguments of every call of `search_triton` that a test looks at."""
    found = {}
    for normalize in NORMALIZE:
        for d, size in SIZES:
            found["random", d, size, normalize] = random_problem(d, size, normalize)
        for d in DIMS:
            found["default", d, normalize] = random_problem(d, 20, normalize, num_vectors=33, block=None)
        found["indices only", normalize] = random_problem(4, 256, normalize, closest=False)
        # In float32, the squares of numbers near 1e4 are 8 apart; the codes are about 1 apart.
        found["far", normalize] = random_problem(4, 100, normalize, offset=1e4)
        found["away", normalize] = vectors_away_from_codes(normalize)  # all scores are negative
        for num_distinct in REPEATED_CODES:
            found["repeated codes", num_distinct, normalize] = repeated_codes(num_distinct, normalize)
        for num_distinct in REPEATED_VECTORS:
            found["repeated vectors", num_distinct, normalize] = repeated_vectors(num_distinct, normalize)
        found["broken", normalize] = broken_vectors(normalize)
        found["all broken", normalize] = problem(torch.full((40, 4), torch.nan), torch.eye(4), normalize)
    zeros = torch.tensor([[0.0, 0.0], [-0.0, -0.0]])
    found["zeros"] = problem(zeros, zeros[[1, 0]], False, block=(1, 8))  # scores are -0.0 and 0.0
    return found


def search_all() -> dict[tuple, tuple]:
    results = {}
    for name, arguments in cases().items():
        arguments = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        results[name] = tuple(x if x is None else x.cpu() for x in search_triton(**arguments))
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, tuple]:
    """(indices, score, row) by case: computed here on CUDA, else by Triton's interpreter in a process of its own."""
    if DEVICE == "cuda":
        return search_all()
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    subprocess.run([sys.executable, __file__, path], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
    return torch.load(path)


def scores_float64(arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) twice, by definition: the similarity s, and the score that vectors are compared by."""
    query = arguments["vectors"].double() - arguments["offset"].double()
    if arguments["normalize"]:
        similarity = F.normalize(query, dim=1) @ arguments["keys"].double().T
        return similarity, similarity
    similarity = query @ arguments["keys"].double().T + arguments["bias"].double()
    return similarity, -(query[:, None] - arguments["keys"].double()).square().sum(-1)


def assert_best(chosen: torch.Tensor, scores: torch.Tensor, tolerance: float) -> None:
    """Along dim 1, nothing beats the chosen one by more than rounding: it is the best one wherever that is decided."""
    assert chosen.dtype == torch.int64
    assert (scores.gather(1, chosen[:, None])[:, 0] >= scores.amax(1) - tolerance).all()


def assert_matches_brute_force(found: tuple, arguments: dict) -> None:
    indices, score, row = found
    similarity, expected = scores_float64(arguments)
    tolerance = 2e-6 * max(1.0, similarity.abs().max().item())
    assert_best(indices, similarity, tolerance)
    assert_best(row, expected.T, tolerance)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), expected.amax(0), rtol=0, atol=tolerance)


@needs_triton
@pytest.mark.parametrize("name", [name for name in cases() if name[0] in ("random", "default", "far", "away")], ids=str)
def test_indices_and_anchors_are_those_of_brute_force_in_float64(results, name):
    assert_matches_brute_force(results[name], cases()[name])


@needs_triton
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_without_anchors_the_indices_are_the_same(results, normalize):
    indices, score, row = results["indices only", normalize]
    assert torch.equal(indices, results["random", 4, 256, normalize][0])
    assert score is None
    assert row is None


@needs_triton
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("num_distinct", REPEATED_CODES)
def test_equal_codes_lose_to_the_first_of_them(results, num_distinct, normalize):
    indices, score, row = results["repeated codes", num_distinct, normalize]
    assert indices.max() < num_distinct
    assert torch.equal(score, score[:num_distinct].repeat(3))
    assert torch.equal(row, row[:num_distinct].repeat(3))


@needs_triton
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("num_distinct", REPEATED_VECTORS)
def test_equal_vectors_lose_to_the_first_of_them(results, num_distinct, normalize):
    indices, _, row = results["repeated vectors", num_distinct, normalize]
    assert torch.equal(indices, indices[torch.arange(280) % num_distinct])
    assert row.max() < num_distinct


@needs_triton
def test_scores_of_zero_are_equal_whatever_their_sign(results):
    indices, score, row = results["zeros"]
    assert indices.tolist() == [0, 0]
    assert score.tolist() == [0, 0]
    assert row.tolist() == [0, 0]


@needs_triton
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_vectors_that_are_not_finite_are_no_anchors_and_have_valid_indices(results, normalize):
    (indices, score, row), arguments = results["broken", normalize], cases()["broken", normalize]
    assert indices.min() >= 0
    assert indices.max() < 20
    finite = {**arguments, "vectors": arguments["vectors"][70:]}
    assert_matches_brute_force((indices[70:], score, row - 70), finite)


@needs_triton
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_codes_that_no_finite_vector_competes_for_keep_the_lowest_score(results, normalize):
    indices, score, row = results["all broken", normalize]
    assert torch.equal(indices, torch.zeros(40, dtype=torch.int64))
    assert torch.equal(score, torch.full((4,), -torch.inf))
    assert torch.equal(row, torch.zeros(4, dtype=torch.int64))


def test_the_module_is_importable_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # makes `import triton` fail
import torch
from looc_ldm.quantizer.search_triton import triton_usable
assert not triton_usable(torch.zeros(1, 4))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def plain_search(vectors, keys, bias, offset, normalize, closest):
    """Stand in for the kernel: the same search in plain torch."""
    query = search.Query(keys, bias, offset)
    return search._search_chunks(vectors, query, normalize), *search._closest_chunks(vectors, query, normalize)


def wrong_code(*args, **kwargs):
    indices, score, row = plain_search(*args, **kwargs)
    indices[1234] += 1 if indices[1234] == 0 else -1
    return indices, score, row


def wrong_anchor(*args, **kwargs):
    indices, score, row = plain_search(*args, **kwargs)
    score[17] += 0.01
    return indices, score, row


def no_compiler(*args, **kwargs):
    raise OSError("no C compiler\nlook at the manual")


@pytest.fixture
def first_use(monkeypatch):
    """A process in which a kernel is used for the first time, on vectors that it takes."""
    search._triton_agrees.cache_clear()
    monkeypatch.setattr(triton_module, "triton_usable", lambda vectors: True)
    yield lambda kernel: monkeypatch.setattr(triton_module, "search_triton", kernel)
    search._triton_agrees.cache_clear()


@pytest.mark.parametrize("kernel", [wrong_code, wrong_anchor, no_compiler])
def test_a_kernel_that_fails_or_differs_is_reported_once_and_not_used(kernel, first_use, caplog):
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = torch.randn(5000, 4, generator=generator), torch.randn(256, 4, generator=generator)
    first_use(kernel)
    found = [search.nearest_codevectors(vectors, codebook, "euclidean", "closest") for _ in range(3)]
    for result in found:
        assert torch.equal(result.indices, torch.cdist(vectors, codebook).argmin(1))
    messages = [record.message for record in caplog.records]
    assert len(messages) == 1
    assert "Please report this line" in messages[0]
    assert "\n" not in messages[0]


def test_a_kernel_that_agrees_is_used_without_a_word(first_use, caplog):
    calls = []
    first_use(lambda *args, **kwargs: calls.append(len(args[0])) or plain_search(*args, **kwargs))
    for _ in range(3):
        search.nearest_codevectors(torch.randn(5000, 4), torch.randn(256, 4), "cosine", "closest")
    assert calls == [4096, 4096, 5000, 5000, 5000]  # a check by each distance, once
    assert not caplog.records


@needs_triton
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_usable_up_to_64_dimensions():
    assert triton_usable(torch.zeros(1, 64, device=DEVICE))
    assert not triton_usable(torch.zeros(1, 65, device=DEVICE))


if __name__ == "__main__":
    torch.save(search_all(), sys.argv[1])
