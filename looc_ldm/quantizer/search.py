"""Search the codevector nearest to each of N vectors, and the vector closest to each of K codevectors.

`nearest_codevectors` chooses a back end by device and size. The N x K matrix of similarities is never held. All back
ends compute in float32 and give ties to the lowest index. Codevectors whose similarities differ by less than float32's
rounding are ties that back ends may break differently. 20,000 codevectors of 2 dimensions, for example, lie so densely
by cosine that an exported search returns a different, equally near codevector for a fifth of the vectors.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from looc_ldm.quantizer import search_cpu, search_triton
from looc_ldm.quantizer.anchors import Anchors, draw_by_similarity, draw_uniformly
from looc_ldm.quantizer.chunks import chunk_elements

logger = logging.getLogger(__name__)

DISTANCES = ("cosine", "euclidean")

# Matrix kernels sum the columns of a last, partial tile in another order, and the similarities to equal codevectors
# then differ in the last bit. Padding the codebook to a multiple of this lets ties go to the lowest index.
TILE = 16

FUSED_DIMENSIONS = 16  # up to so many the fused loop is faster than a matrix product; measured on 2 CPU cores


class SearchResult(NamedTuple):
    """Result of `nearest_codevectors`."""

    indices: torch.Tensor  # (N,) int64: the nearest codevector of each vector
    counts: torch.Tensor  # (K,) int64: how often each was chosen
    anchors: Anchors | None


class Query(NamedTuple):
    """A search as every back end computes it: argmax over k of (z - offset) . key_k + bias_k.

    By cosine that is the cosine times the vector's length; by euclidean distance, up to a term that is the same for
    all k, minus half the squared distance: no root, and, since both sides are taken relative to the codebook's mean,
    without cancellation far from the origin.
    """

    keys: torch.Tensor  # (K, d)
    bias: torch.Tensor  # (K,)
    offset: torch.Tensor  # (d,)


def nearest_codevectors(
    vectors: torch.Tensor, codebook: torch.Tensor, distance: str, anchor: str = "none"
) -> SearchResult:
    """Return the index of the nearest codevector for each vector, and the anchors that revival asks for.

    Args:
        vectors (`torch.Tensor` of shape `(N, d)`, float32): Vectors, for instance segments.
        codebook (`torch.Tensor` of shape `(K, d)`, float32): The codevectors.
        distance (`str`): `"cosine"` compares directions only, `"euclidean"` positions.
        anchor (`str`): Vector that each codevector would be revived with (CVQ-VAE): `"closest"`, the most similar one;
            `"probrandom"`, one drawn with probability softmax(similarity) over the N vectors; `"random"`, any one;
            `"none"`, no anchors. A vector that is not finite is never closest or drawn by similarity.

    Under `torch.compile` the same back ends run, as one operator of the graph; `torch.export` gets plain operators,
    whose matrix products are as exact as the settings that the exported program runs under.
    """
    if is_exporting():
        if anchor != "none":
            raise RuntimeError("LooCQuantizer can be exported in eval mode only.")
        indices = _search_blocks(vectors, codebook, distance)
        return SearchResult(indices, _count(indices, len(codebook)), None)
    implementation = torch.ops.looc_ldm.search if torch.compiler.is_compiling() else _search
    indices, counts, score, row = implementation(vectors, codebook, distance, anchor)
    anchors = None if anchor == "none" else Anchors(score, vectors[row])
    return SearchResult(indices, counts, anchors)


def is_exporting() -> bool:
    """Whether `torch.export`, `torch.jit.trace` or an ONNX exporter records a graph, which needs plain operators."""
    # torch.compiler.is_exporting() is true under torch.compile as well in torch 2.11.
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def is_recording() -> bool:
    """Whether values are unknown, because `torch.compile` or an exporter records a graph."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _search(
    vectors: torch.Tensor, codebook: torch.Tensor, distance: str, anchor: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return indices, counts, and the scores and rows in `vectors` of the anchors (empty without anchors)."""
    query, cosine = _query(codebook, distance), distance == "cosine"
    vectors, closest = vectors.contiguous(), anchor == "closest"
    num_codevectors, dim = codebook.shape
    score, row = codebook.new_empty(0), torch.empty(0, dtype=torch.int64, device=codebook.device)
    if search_triton.triton_usable(vectors) and _triton_agrees(vectors.device):
        indices, *found = search_triton.search_triton(vectors, *query, normalize=cosine, closest=closest)
        if closest:
            score, row = found
    else:
        on_cpu = vectors.device.type == "cpu"
        fused = on_cpu and dim <= FUSED_DIMENSIONS and search_cpu.numba_available()
        arrays = [tensor.detach().numpy() for tensor in (vectors, *query)] if on_cpu else []
        threads = torch.get_num_threads()
        if fused:
            indices = torch.from_numpy(search_cpu.search_fused(*arrays, threads))
        else:
            indices = _search_chunks(vectors, query, cosine)
        if closest and fused:
            score, row = map(torch.from_numpy, search_cpu.closest_fused(*arrays, cosine, threads))
        elif closest:
            score, row = _closest_chunks(vectors, query, cosine)
    if anchor == "random":
        score, row = draw_uniformly(vectors, num_codevectors)
    elif anchor == "probrandom":
        score, row = draw_by_similarity(vectors, codebook, distance)
    return indices, _count(indices, num_codevectors), score, row


@cache
def _triton_agrees(device: torch.device) -> bool:
    """Whether the Triton kernel agrees with plain torch on 4,096 vectors; checked once per process and device.

    Similarities are compared, not indices, because of rounding. A difference is a warning.
    """
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = (torch.randn(n, 4, generator=generator).to(device) for n in (4096, 256))
    try:
        for distance in DISTANCES:
            query, cosine = _query(codebook, distance), distance == "cosine"
            indices, score, _ = search_triton.search_triton(vectors, *query, normalize=cosine, closest=True)
            similarity = _relative(vectors, query, cosine).double() @ query.keys.double().T + query.bias
            found = similarity.gather(1, indices[:, None])[:, 0]
            worst = max(
                (similarity.amax(1) - found).max().item(),
                (score - _closest_chunks(vectors, query, cosine)[0]).abs().max().item(),
            )
            if not worst < 1e-4:
                raise RuntimeError(f"by {distance} distance it differs from plain torch by {worst:.2g}")
    except Exception as error:  # whatever its compiler or driver raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning(
            "The Triton search on %s is switched off, and the search is slower: %s. "
            "Please report this line with the versions of torch and triton and the name of the GPU.",
            device,
            reason,
        )
        return False
    return True


_operator = torch.library.custom_op(
    "looc_ldm::search",
    _search,
    mutates_args=(),
    schema="(Tensor vectors, Tensor codebook, str distance, str anchor) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.nondeterministic_seeded,),
)


@_operator.register_fake
def _(vectors, codebook, distance, anchor):
    int64 = {"dtype": torch.int64, "device": vectors.device}
    found = 0 if anchor == "none" else codebook.shape[0]
    return (  # shapes, since len() would fix the size in a graph
        torch.empty(vectors.shape[0], **int64),
        torch.empty(codebook.shape[0], **int64),
        vectors.new_empty(found),
        torch.empty(found, **int64),
    )


def _query(codebook: torch.Tensor, distance: str) -> Query:
    if distance == "cosine":
        zeros = torch.zeros_like(codebook[:, 0])
        return Query(F.normalize(codebook, dim=1), zeros, torch.zeros_like(codebook[0]))
    offset = codebook.mean(0)
    keys = codebook - offset
    return Query(keys, -0.5 * keys.square().sum(1), offset)


def _count(indices: torch.Tensor, num_codevectors: int) -> torch.Tensor:
    if indices.device.type == "cpu" and not is_recording():
        return torch.bincount(indices, minlength=num_codevectors)
    # On a GPU, bincount waits for the device to learn the largest index.
    zeros = torch.zeros(num_codevectors, dtype=torch.int64, device=indices.device)
    return zeros.scatter_add_(0, indices, torch.ones_like(indices))


def _relative(vectors: torch.Tensor, query: Query, cosine: bool) -> torch.Tensor:
    return F.normalize(vectors, dim=1) if cosine else vectors - query.offset


def _search_chunks(vectors: torch.Tensor, query: Query, cosine: bool) -> torch.Tensor:
    """Search in plain torch, for all devices and sizes: chunks of vectors against all codevectors."""
    num_codevectors = len(query.keys)
    padding = -num_codevectors % TILE
    keys, bias = F.pad(query.keys, (0, 0, 0, padding)), F.pad(query.bias, (0, padding))
    indices = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    with _full_precision(vectors.device):
        for chunk in _chunks(vectors, num_codevectors):
            similarity = torch.addmm(bias, _relative(vectors[chunk], query, cosine), keys.T)
            indices[chunk] = similarity[:, :num_codevectors].max(dim=1).indices
    return indices


def _closest_chunks(vectors: torch.Tensor, query: Query, cosine: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return score and row of the vector closest to each codevector, in plain torch."""
    best = torch.full_like(query.bias, -torch.inf)
    row = torch.zeros(len(best), dtype=torch.int64, device=best.device)
    with _full_precision(vectors.device):
        for chunk in _chunks(vectors, len(best)):
            relative = _relative(vectors[chunk], query, cosine)
            score = torch.addmm(query.bias, relative, query.keys.T)
            if not cosine:  # along N, ||z||^2 matters: -||z - c||^2
                score = 2 * score - relative.square().sum(1, keepdim=True)
            score, at = score.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf).max(dim=0)
            row = torch.where(score > best, at + chunk.start, row)
            best = torch.maximum(best, score)
    return best, row


def _search_blocks(vectors: torch.Tensor, codebook: torch.Tensor, distance: str) -> torch.Tensor:
    """Search by a graph that does not depend on N: all vectors against blocks of codevectors."""
    query = _query(codebook, distance)
    relative = _relative(vectors, query, distance == "cosine")
    size = max(64, len(codebook) // 128)
    best, indices = None, None
    for start in range(0, len(codebook), size):
        keys, bias = query.keys[start : start + size], query.bias[start : start + size]
        padding = -len(keys) % TILE
        similarity = torch.addmm(F.pad(bias, (0, padding)), relative, F.pad(keys, (0, 0, 0, padding)).T)
        largest, at = similarity[:, : len(keys)].max(dim=1)
        if best is None:
            best, indices = largest, at
        else:
            indices = torch.where(largest > best, at + start, indices)
            best = torch.maximum(best, largest)
    return indices


def _chunks(vectors: torch.Tensor, num_codevectors: int) -> list[slice]:
    size = max(1, chunk_elements(vectors.device) // num_codevectors)
    return [slice(start, start + size) for start in range(0, len(vectors), size)]


@contextmanager
def _full_precision(device: torch.device):
    """Compute matrix products in float32 even if the user allows TF32 or bfloat16, which choose wrong codevectors."""
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before
