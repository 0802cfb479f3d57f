"""Nearest-codevector search, and the closest vector of each codevector, in one Triton kernel.

The N x K similarities exist only in registers: a warp holds a tile of vectors, goes through the codebook in blocks, and
keeps the best codevector of each vector. Closest vectors are merged by atomic maxima of integers, and so are the same
in every run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MAX_DIM = 64

# Codevectors per tile. A warp then has 8 lanes along codevectors and 4 along rows: reductions take few shuffles.
BLOCK_K = 8

# Copies of the best anchors, so that programs running at the same time rarely meet in one atomic.
REPLICAS = 16

# `_pack(-inf, 0)`, the value of a codevector before any vector competes for it.
NOBODY = (~0x7F800000 << 32) | 0xFFFFFFFF


def triton_usable(vectors: torch.Tensor) -> bool:
    """Whether `search_triton` takes these vectors: Triton is installed, they are on CUDA, and d is at most 64."""
    return triton is not None and vectors.is_cuda and vectors.shape[1] <= MAX_DIM


def jit(**options):
    """Return the decorator `triton.jit(**options)`, or one that does nothing if Triton is missing."""
    return triton.jit(**options) if triton is not None else lambda function: function


@jit()
def _pack(score, row):
    """Pack a score (float32, not NaN) and a row into an int64 that sorts by score, and for equal scores by -row."""
    bits = score.to(tl.int32, bitcast=True)
    # Integers order positive floats as they are, and negative ones once all bits but the sign are flipped.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - row)


def _unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float32 scores and int64 rows that `_pack` packed."""
    ordered = (packed >> 32).to(torch.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), ~packed & 0xFFFFFFFF


@jit(do_not_specialize=["num_vectors"])  # one compilation for all batch sizes
def _search_kernel(
    vectors,  # (N, D)
    table,  # (blocks, D + 1, BLOCK_K): of each block of codevectors, D rows of keys and one of biases
    offset,  # (D,)
    indices,  # (N,)
    packed,  # (REPLICAS, blocks * BLOCK_K)
    num_vectors,
    NUM_BLOCKS: tl.constexpr,  # not a plain number: Triton 3.6's interpreter cannot loop to one with numpy >= 2.4
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CLOSEST: tl.constexpr,
    REPLICAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    tile_rows = tl.arange(0, BLOCK_N)
    tile_codes = tl.arange(0, BLOCK_K)
    rows = first_row + tile_rows
    query = ()  # D tensors (BLOCK_N,): a tensor of D columns could not be taken apart in registers
    squared_norm = tl.zeros((BLOCK_N,), tl.float32)
    for i in tl.static_range(D):
        # Rows past the end are NaN. NaN is not greater than anything and never wins.
        x = tl.load(vectors + rows * D + i, mask=rows < num_vectors, other=float("nan")) - tl.load(offset + i)
        squared_norm = tl.fma(x, x, squared_norm)
        query += (x,)
    if NORMALIZE:
        scale = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(squared_norm), 1e-12))
        for i in tl.static_range(D):
            query += (query[i] * scale,)
        query = query[D:]

    # The best of each lane over all blocks, reduced over the lanes only once, at the end.
    best = tl.full((BLOCK_N, BLOCK_K), float("-inf"), tl.float32)
    best_block = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    for block in range(NUM_BLOCKS):
        if CLOSEST:
            slots = packed + (tl.program_id(0) % REPLICAS * NUM_BLOCKS + block) * BLOCK_K + tile_codes
            # Read from L2: L1 does not see the atomics. A stale value only costs an unnecessary atomic.
            seen = tl.load(slots, cache_modifier=".cg")
        entry = table + block * ((D + 1) * BLOCK_K) + tile_codes
        similarity = tl.load(entry + D * BLOCK_K)[None, :]
        for i in tl.static_range(D):
            similarity = tl.fma(query[i][:, None], tl.load(entry + i * BLOCK_K)[None, :], similarity)
        better = similarity > best  # (BLOCK_N, BLOCK_K); strictly, so that ties keep the lower index
        best = tl.where(better, similarity, best)
        best_block = tl.where(better, block, best_block)
        if CLOSEST:
            score = similarity if NORMALIZE else tl.fma(similarity, 2.0, -squared_norm[:, None])
            # -inf instead of the NaN of a tile without finite rows, 0.0 instead of -0.0: `_pack` would misplace both.
            top = tl.max(score, axis=0) + 0.0
            top = tl.where(top > float("-inf"), top, float("-inf"))
            # True in few tiles once good anchors are known: the others need neither the row nor an atomic.
            if tl.max((_pack(top, first_row) > seen).to(tl.int32), axis=0) > 0:
                row = tl.min(tl.where(score == top[None, :], tile_rows[:, None], BLOCK_N - 1), axis=0)
                candidate = _pack(top, first_row + row)
                tl.atomic_max(slots, candidate, mask=candidate > seen, sem="relaxed")

    top = tl.max(best, axis=1)
    codes = best_block * BLOCK_K + tile_codes[None, :]
    index = tl.min(tl.where(best == top[:, None], codes, 0x7FFFFFFF), axis=1)
    tl.store(indices + rows, index.to(tl.int64), mask=rows < num_vectors)


def block_rows(d: int) -> int:
    """Return the rows per tile: as many as registers hold without spills; each lane holds a quarter of them."""
    return 4 * (16 if d <= 4 else 8 if d <= 16 else 4 if d <= 32 else 2)


def search_triton(
    vectors: torch.Tensor,
    keys: torch.Tensor,
    bias: torch.Tensor,
    offset: torch.Tensor,
    normalize: bool,
    closest: bool,
    block: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the most similar of K codevectors for each of N vectors and, if wanted, the converse.

    With q = vector - offset, divided by max(||q||, 1e-12) if `normalize`, the similarity is s = q . key + bias, in
    float32. Euclidean search is bias = -||key||^2 / 2; its offset keeps far-away vectors precise.

    Args:
        vectors (`torch.Tensor` of shape `(N, d)`, float32, contiguous): Vectors; N < 2^32, d <= 64.
        keys (`torch.Tensor` of shape `(K, d)`, float32): The codevectors, relative to `offset`.
        bias (`torch.Tensor` of shape `(K,)`, float32): Added to the similarity.
        offset (`torch.Tensor` of shape `(d,)`, float32): Subtracted from every vector.
        normalize (`bool`): Whether vectors are normalised (cosine) after that.
        closest (`bool`): Whether to search the best vector of each codevector.
        block (`tuple` of two powers of 2, *optional*): Rows and codevectors per tile, if not chosen by d.

    Returns:
        `tuple`: `indices` `(N,)`, int64, the greatest s, of equal ones the first; some valid index for a vector
        that is not finite. `score` `(K,)`, float32, the greatest s where `normalize`, else the greatest 2 s - ||q||^2,
        that is -||q - key||^2; -inf where no finite vector competes. `row` `(K,)`, int64, the vector it belongs to, of
        equal ones the first; 0 where none competes. The last two are `None` unless `closest`.
    """
    (num_vectors, d), num_codevectors = vectors.shape, len(keys)
    block_n, block_k = block or (block_rows(d), BLOCK_K)
    # The padding of the last block has the bias -inf: its similarity is -inf or NaN and never the greatest.
    table = F.pad(torch.cat([keys, bias[:, None]], dim=1), (0, 0, 0, -num_codevectors % block_k), value=-torch.inf)
    table = table.view(-1, block_k, d + 1).transpose(1, 2).contiguous()  # (blocks, d + 1, block_k)
    indices = torch.empty(num_vectors, dtype=torch.int64, device=vectors.device)
    packed = None
    if closest:
        packed = torch.full((REPLICAS, len(table) * block_k), NOBODY, dtype=torch.int64, device=vectors.device)
    with torch.cuda.device_of(vectors):
        _search_kernel[(triton.cdiv(num_vectors, block_n),)](
            vectors,
            table,
            offset,
            indices,
            packed,
            num_vectors,
            NUM_BLOCKS=len(table),
            D=d,
            NORMALIZE=normalize,
            CLOSEST=closest,
            REPLICAS=REPLICAS,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=1,
            enable_fp_fusion=False,  # every fused multiply-add is written out
        )
    score, row = _unpack(packed.amax(dim=0)[:num_codevectors]) if closest else (None, None)
    return indices, score, row
