"""Backward passes of the loss, and of the replacement of a segment z by its codevector c."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from looc_ldm.quantizer.chunks import chunk_elements

ROTATION_CHUNK_ELEMENTS = 2**17  # on CPUs: it has several temporaries at a time
# Largest |c| / |z| that is rotated. In trained models only a segment in many thousands exceeds it.
LARGEST_SCALE = 32


class QuantizerLoss(torch.autograd.Function):
    """Codebook and commitment loss: mean((c - sg z)^2) + beta * mean((sg c - z)^2), from the differences c - z.

    Apart from indices, it saves only the differences for backward, one tensor of z's size.
    """

    @staticmethod
    def forward(ctx, segments, codebook, difference, indices, commitment_weight, by_gradient):
        ctx.save_for_backward(difference, indices)
        ctx.shape, ctx.num_codevectors = segments.shape, len(codebook)
        ctx.commitment_weight, ctx.by_gradient = commitment_weight, by_gradient
        return (1 + commitment_weight) * difference.square().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        difference, indices = ctx.saved_tensors
        scale = 2 / difference.numel() * gradient
        for_segments = for_codebook = None
        if ctx.needs_input_grad[0]:
            for_segments = (difference * (-ctx.commitment_weight * scale)).view(ctx.shape)
        if ctx.needs_input_grad[1] and ctx.by_gradient:
            for_codebook = sum_by_codevector(difference, indices, ctx.num_codevectors, torch.float32) * scale
        return for_segments, for_codebook, None, None, None, None


class Rotation(torch.autograd.Function):
    """Identity in forward; backward uses the gradient of the rotation and scaling that maps each segment z to its c.

    Source: "Restructuring vector quantization with the rotation trick", ICLR 2025.
    """

    @staticmethod
    def forward(ctx, segments, codebook, difference, indices):
        ctx.save_for_backward(codebook.clone(), difference, indices)  # a clone: revival may come before backward
        return segments.view_as(segments)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        codebook, difference, indices = ctx.saved_tensors
        if torch.compiler.is_compiling():  # fused by the compiler
            codevectors = F.embedding(indices, codebook)
            segments = codevectors - difference.view(codevectors.shape)
            return _rotate_back(gradient, codevectors, segments), None, None, None
        d = codebook.shape[1]
        rotated = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        on_cpu = gradient.device.type == "cpu"
        size = max(1, (ROTATION_CHUNK_ELEMENTS if on_cpu else chunk_elements(gradient.device)) // d)
        tensors = (rotated.view(-1, d), gradient.reshape(-1, d), difference.view(-1, d), indices.flatten())
        for out, upstream, apart, chosen in zip(*(tensor.split(size) for tensor in tensors), strict=True):
            codevectors = F.embedding(chosen, codebook)
            out.copy_(_rotate_back(upstream, codevectors, codevectors - apart))
        return rotated, None, None, None


def _rotate_back(gradient: torch.Tensor, codevectors: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """Pull gradients of codevectors (..., d) back through the matrices that rotate and scale segments onto them.

    With the unit vectors a of a segment, b of its codevector and m of a + b, the rotation is I - 2 m m' + 2 b a'.
    """
    length, target_length = (v.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12) for v in (segments, codevectors))
    before, after = segments / length, codevectors / target_length
    middle = before + after
    # Not 2 + 2 a'b, which cancels where they are opposite.
    mirrored = (middle * gradient).sum(-1, keepdim=True) * (2 / middle.square().sum(-1, keepdim=True).clamp_min(1e-12))
    along = 2 * (after * gradient).sum(-1, keepdim=True)
    ratio = target_length / length
    rotated = ratio * (gradient - middle.mul_(mirrored) + before.mul_(along))
    # A segment that is much shorter than its codevector has next to no direction to rotate: straight through.
    return torch.where(ratio < LARGEST_SCALE, rotated, gradient)


def sum_by_codevector(
    vectors: torch.Tensor, indices: torch.Tensor, num_codevectors: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return (K, d) sums of (N, d) vectors by their N indices. Deterministic, unless compiled for a GPU."""
    if vectors.device.type == "cpu" and not torch.compiler.is_compiling():
        sums = torch.zeros(num_codevectors, vectors.shape[1], dtype=dtype)
        size = max(1, chunk_elements(vectors.device) // vectors.shape[1])
        for part, chosen in zip(vectors.split(size), indices.split(size), strict=True):
            sums.index_add_(0, chosen, part.to(dtype))
        return sums
    return torch.ops.aten.embedding_dense_backward(vectors.to(dtype), indices, num_codevectors, -1, False)  # by sorting
