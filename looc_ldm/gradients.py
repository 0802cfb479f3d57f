"""What backward does where a codevector was chosen for a segment."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Numbers that a temporary holds where work on all segments goes in chunks.
CHUNK_ELEMENTS = 2**20
GPU_CHUNK_ELEMENTS = 2**26


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
        chosen = F.embedding(codes, codebook)
        rows = chosen - difference.view(chosen.shape)
        length, chosen_length = (v.norm(dim=-1, keepdim=True).clamp_min(1e-12) for v in (rows, chosen))
        before, after = rows / length, chosen / chosen_length
        middle = F.normalize(before + after, dim=-1)
        # The transpose of I - 2 m m' + 2 a b', which turns b into a in the plane of both.
        turned = gradient - 2 * middle * (middle * gradient).sum(-1, keepdim=True)
        turned = turned + 2 * before * (after * gradient).sum(-1, keepdim=True)
        # A segment a thousand times shorter than its codevector has no direction to turn: straight through.
        ratio = chosen_length / length
        return torch.where(ratio < 1000, turned * ratio, gradient), None, None, None


def sum_by_code(rows: torch.Tensor, indices: torch.Tensor, num_codevectors: int, dtype: torch.dtype) -> torch.Tensor:
    """(N, d) rows and their N codes -> (K, d) sums. Deterministic, but for what torch.compile makes of it on GPUs."""
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        sums = torch.zeros(num_codevectors, rows.shape[1], dtype=dtype)
        size = max(1, CHUNK_ELEMENTS // rows.shape[1])
        for part, codes in zip(rows.split(size), indices.split(size), strict=True):
            sums.index_add_(0, codes, part.to(dtype))
        return sums
    return torch.ops.aten.embedding_dense_backward(rows.to(dtype), indices, num_codevectors, -1, False)  # by sorting
