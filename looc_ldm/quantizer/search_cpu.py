"""Nearest-codevector search on CPUs: a fused loop compiled by numba.

The first search in a process compiles the loop, in about half a second for each number of dimensions. The functions
take and return NumPy arrays; `looc_ldm.quantizer.search` chooses among them and explains the arguments. Rows are
indices of vectors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numpy as np

# Vectors a loop holds at a time, dimension by dimension: they stay in the first-level cache, and SIMD instructions run
# along them.
LANES = 256
SIMD_LANES = 16
# Vectors times codevectors from which further threads pay for their start.
PARALLEL_PAIRS = 2**21


@cache
def numba_available() -> bool:
    """Whether numba, which compiles the fused loop, is installed. Without it the same search is slower."""
    try:
        import numba  # noqa: F401
    except ImportError:  # also raised by a numba that does not know this NumPy
        return False
    return True


def search_fused(
    vectors: np.ndarray, keys: np.ndarray, bias: np.ndarray, offset: np.ndarray, threads: int
) -> np.ndarray:
    """Return the index (N,) of the largest similarity; see `looc_ldm.quantizer.search.Query`."""
    group = 4 if vectors.shape[1] <= 4 else 2
    padding = -len(keys) % group
    keys = np.pad(keys, ((0, padding), (0, 0)))
    bias = np.pad(bias, (0, padding), constant_values=-np.inf)
    loop = _search_loop(vectors.shape[1], group)
    indices = np.empty(len(vectors), np.int64)
    _in_threads(
        lambda start, stop: loop(vectors, keys, bias, offset, start, stop, indices), len(vectors), len(keys), threads
    )
    return indices


def closest_fused(
    vectors: np.ndarray, keys: np.ndarray, bias: np.ndarray, offset: np.ndarray, cosine: bool, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return score and row, each (K,), of the vector closest to each codevector; see `quantizer.search.Query`."""
    loop = _closest_loop(vectors.shape[1])
    found = _in_threads(
        lambda start, stop: loop(vectors, keys, bias, offset, cosine, start, stop), len(vectors), len(keys), threads
    )
    score, row = found[0]
    for other_score, other_row in found[1:]:  # in the order of rows, so that ties go to the first
        better = other_score > score
        score, row = np.where(better, other_score, score), np.where(better, other_row, row)
    return score, row


def _in_threads(work: Callable, num_vectors: int, num_codevectors: int, threads: int) -> list:
    """Run `work(start, stop)` on parts of the vectors in parallel; return the results in the order of the parts.

    Threads of our own rather than numba's: those abort the process when two Python threads use them, or after a fork.
    """
    threads = min(threads, max(1, num_vectors * num_codevectors // PARALLEL_PAIRS), os.cpu_count() or 1)
    starts = [min(num_vectors, LANES * round(i * num_vectors / threads / LANES)) for i in range(threads)]
    parts = [(start, stop) for start, stop in pairwise([*starts, num_vectors]) if start < stop]
    if len(parts) <= 1:
        return [work(0, num_vectors)]
    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(lambda part: work(*part), parts))


@cache
def _search_loop(dim: int, group: int) -> Callable:
    """Return the loop for `dim` dimensions that compares `group` codevectors at a time, both constants to the compiler.

    Only the best *group* of each vector is remembered; which of its codevectors it was is found at the end.
    """
    from numba import njit

    @njit(nogil=True, fastmath={"contract"})
    def loop(vectors, keys, bias, offset, start, stop, indices):
        query = np.empty((dim, LANES), np.float32)
        best = np.empty(LANES, np.float32)
        best_group = np.empty(LANES, np.int32)
        for first in range(start, stop, LANES):
            filled = min(LANES, stop - first)
            for lane in range(LANES):
                for i in range(dim):
                    query[i, lane] = vectors[first + lane, i] - offset[i] if lane < filled else np.float32(0)
                best[lane] = -np.inf
                best_group[lane] = 0
            for k in range(0, len(keys), group):
                for lane in range(LANES):
                    largest = np.float32(-np.inf)
                    for member in range(group):
                        similarity = bias[k + member]
                        for i in range(dim):
                            similarity += query[i, lane] * keys[k + member, i]
                        largest = similarity if similarity > largest else largest
                    better = largest > best[lane]
                    best[lane] = largest if better else best[lane]
                    best_group[lane] = np.int32(k) if better else best_group[lane]
            for lane in range(filled):
                index, largest = best_group[lane], np.float32(-np.inf)
                for k in range(best_group[lane], best_group[lane] + group):
                    similarity = bias[k]
                    for i in range(dim):
                        similarity += query[i, lane] * keys[k, i]
                    if similarity > largest:
                        index, largest = k, similarity
                indices[first + lane] = index

    return loop


@cache
def _closest_loop(dim: int) -> Callable:
    """Return the loop for `dim` dimensions that finds the vector closest to each codevector.

    Like the search, it remembers only the best *block* of vectors of each codevector.
    """
    from numba import njit

    @njit(nogil=True, fastmath={"contract"})
    def fill(vectors, offset, cosine, first, filled, query, scale, shift):
        """Fill in the block's vectors, and `scale` and `shift` of score = scale * similarity - shift."""
        for lane in range(LANES):
            squared = np.float32(0)
            for i in range(dim):
                query[i, lane] = vectors[first + lane, i] - offset[i] if lane < filled else np.float32(0)
                squared += query[i, lane] * query[i, lane]
            scale[lane] = np.float32(1) / max(np.sqrt(squared), np.float32(1e-12)) if cosine else np.float32(2)
            shift[lane] = np.float32(0) if cosine else squared
            if lane >= filled or not np.isfinite(squared):  # never an anchor
                scale[lane], shift[lane] = np.float32(0), np.float32(np.inf)
                for i in range(dim):
                    query[i, lane] = 0

    @njit(nogil=True, fastmath={"contract"})
    def loop(vectors, keys, bias, offset, cosine, start, stop):
        query = np.empty((dim, LANES), np.float32)
        scale, shift = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        running = np.empty(SIMD_LANES, np.float32)
        best = np.full(len(keys), -np.inf, np.float32)
        best_block = np.full(len(keys), start, np.int64)
        for first in range(start, stop, LANES):
            fill(vectors, offset, cosine, first, min(LANES, stop - first), query, scale, shift)
            for k in range(len(keys)):
                for lane in range(SIMD_LANES):
                    running[lane] = -np.inf
                for part in range(0, LANES, SIMD_LANES):
                    for lane in range(SIMD_LANES):
                        score = bias[k]
                        for i in range(dim):
                            score += query[i, part + lane] * keys[k, i]
                        score = scale[part + lane] * score - shift[part + lane]
                        running[lane] = score if score > running[lane] else running[lane]
                largest = running[0]
                for lane in range(1, SIMD_LANES):
                    largest = running[lane] if running[lane] > largest else largest
                if largest > best[k]:
                    best[k], best_block[k] = largest, first
        row = np.zeros(len(keys), np.int64)
        for k in range(len(keys)):
            first = best_block[k]
            filled = min(LANES, stop - first)
            fill(vectors, offset, cosine, first, filled, query, scale, shift)
            largest = np.float32(-np.inf)
            for lane in range(filled):
                score = bias[k]
                for i in range(dim):
                    score += query[i, lane] * keys[k, i]
                score = scale[lane] * score - shift[lane]
                if score > largest:
                    largest, row[k] = score, first + lane
            best[k] = largest
        return best, row

    return loop
