"""What backward does where a codevector was chosen for a segment."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Numbers that a temporary holds where work on all segments goes in chunks.
CHUNK_ELEMENTS = 2**20
GPU_CHUNK_ELEMENTS = 2**26
ROTATION_CHUNK_ELEMENTS = 2**17
# Of a gradient by turning: codevector over segment. Trained models stay below but for a segment in many thousands.
LARGEST_SCALE = 32


class QuantizerLoss(torch.autograd.Function):
    """mean((c - sg z)^2) + beta * mean((sg c - z)^2) of the differences c - z; keeps one tensor of z's size."""

    @staticmethod
    def forward(ctx, rows, codebook, difference, indices, commitment_weight, by_gradient):
        ctx.save_for_backward(difference, indices)
        ctx.shape, ctx.num_codevectors = rows.shape, len(codebook)
        ctx.commitment_weight, ctx.by_gradient = commitment_weight, by_gradient
        return (1 + commitment_weight) * difference.square().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        difference, indices = ctx.saved_tensors
        scale = 2 / difference.numel() * gradient
        for_rows = for_codebook = None
        if ctx.needs_input_grad[0]:
            for_rows = (difference * (-ctx.commitment_weight * scale)).view(ctx.shape)
        if ctx.needs_input_grad[1] and ctx.by_gradient:
            for_codebook = sum_by_code(difference, indices, ctx.num_codevectors, torch.float32) * scale
        return for_rows, for_codebook, None, None, None, None


class Rotation(torch.autograd.Function):
    """The identity, whose gradient is that of the rotation and scaling that takes each vector z to its codevector c."""

    @staticmethod
    def forward(ctx, rows, codebook, difference, codes):
        ctx.save_for_backward(codebook.clone(), difference, codes)  # a clone: revival may come before backward
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        codebook, difference, codes = ctx.saved_tensors
        if torch.compiler.is_compiling():  # fused by the compiler
            chosen = F.embedding(codes, codebook)
            return _turn_back(gradient, chosen, chosen - difference.view(chosen.shape)), None, None, None
        d = codebook.shape[1]
        turned = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        size = max(1, (ROTATION_CHUNK_ELEMENTS if gradient.device.type == "cpu" else GPU_CHUNK_ELEMENTS) // d)
        parts = (turned.view(-1, d), gradient.reshape(-1, d), difference.view(-1, d), codes.flatten())
        for out, upstream, offset, chosen in zip(*(part.split(size) for part in parts), strict=True):
            chosen = F.embedding(chosen, codebook)
            out.copy_(_turn_back(upstream, chosen, chosen - offset))
        return turned, None, None, None


def _turn_back(gradient: torch.Tensor, chosen: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The gradients of `chosen` (..., d), pulled back through the matrices that turn and scale `rows` onto them.

    With the unit vectors a of a row, b of its codevector and m of a + b, the rotation is I - 2 m m' + 2 b a'.
    """
    length, chosen_length = (v.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12) for v in (rows, chosen))
    before, after = rows / length, chosen / chosen_length
    middle = before + after
    # Not 2 + 2 a'b, which cancels where they are opposite.
    mirrored = (middle * gradient).sum(-1, keepdim=True) * (2 / middle.square().sum(-1, keepdim=True).clamp_min(1e-12))
    along = 2 * (after * gradient).sum(-1, keepdim=True)
    ratio = chosen_length / length
    turned = ratio * (gradient - middle.mul_(mirrored) + before.mul_(along))
    # A segment that is much shorter than its codevector has next to no direction to turn: straight through.
    return torch.where(ratio < LARGEST_SCALE, turned, gradient)


def sum_by_code(rows: torch.Tensor, indices: torch.Tensor, num_codevectors: int, dtype: torch.dtype) -> torch.Tensor:
    """(N, d) rows and their N codes -> (K, d) sums. Deterministic, but for what torch.compile makes of it on GPUs."""
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        sums = torch.zeros(num_codevectors, rows.shape[1], dtype=dtype)
        size = max(1, CHUNK_ELEMENTS // rows.shape[1])
        for part, codes in zip(rows.split(size), indices.split(size), strict=True):
            sums.index_add_(0, codes, part.to(dtype))
        return sums
    return torch.ops.aten.embedding_dense_backward(rows.to(dtype), indices, num_codevectors, -1, False)  # by sorting
