"""CVQ-VAE's contrastive term: codevectors are drawn to their closest features and pushed from the far ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F

TEMPERATURE = 0.07

# Similarities held at a time; a codevector's N similarities are always held together, for their order is needed.
CHUNK_ELEMENTS = 2**22


def contrastive_loss(vectors: torch.Tensor, codebook: torch.Tensor, distance: str) -> torch.Tensor:
    """The mean over codevectors of a cross-entropy at temperature 0.07, with a gradient for the codebook alone.

    For each codevector the positive is the mean of the max(1, N // K) highest similarities to the N vectors, and the
    negatives are the N // 2 lowest.

    Args:
        vectors (`torch.Tensor` of shape `(N, d)`, float32): Features, without gradient.
        codebook (`torch.Tensor` of shape `(K, d)`, float32): The codevectors.
        distance (`str`): `"cosine"`, or `"euclidean"` for minus the squared distance.

    The gradient is computed with the loss, in blocks of codevectors: the N x K matrix is never held. Across ranks each
    contrasts its own features, and the gradients are averaged.
    """
    return _loss_and_gradient(codebook, vectors, distance)[0]


@torch.library.custom_op("looc_ldm::contrastive_loss", mutates_args=())
def _loss_and_gradient(
    codebook: torch.Tensor, vectors: torch.Tensor, distance: str
) -> tuple[torch.Tensor, torch.Tensor]:
    cosine = distance == "cosine"
    features = F.normalize(vectors, dim=1) if cosine else vectors
    total, gradients = codebook.new_zeros(()), []
    for block in codebook.split(max(1, CHUNK_ELEMENTS // len(vectors))):
        keys = F.normalize(block, dim=1) if cosine else block
        similarity = keys @ features.T  # (block, N)
        if not cosine:
            similarity = 2 * similarity - keys.square().sum(1, keepdim=True) - features.square().sum(1)
        closest = similarity.topk(max(1, len(vectors) // len(codebook)), dim=1)
        far = similarity.topk(len(vectors) // 2, dim=1, largest=False)
        logits = torch.cat([closest.values.mean(1, keepdim=True), far.values], dim=1) / TEMPERATURE
        total += (logits.logsumexp(1) - logits[:, 0]).sum()
        # The gradient with respect to the similarities, then to the keys, then to the codevectors.
        share = logits.softmax(1) / TEMPERATURE
        positive = (share[:, :1] - 1 / TEMPERATURE) / closest.values.shape[1]
        weights = torch.zeros_like(similarity).scatter_(1, far.indices, share[:, 1:])
        weights.scatter_add_(1, closest.indices, positive.expand_as(closest.values))
        gradient = weights @ features
        if cosine:
            gradient = gradient - keys * (keys * gradient).sum(1, keepdim=True)
            gradients.append(gradient / block.norm(dim=1, keepdim=True).clamp_min(1e-12))
        else:
            gradients.append(2 * (gradient - keys * weights.sum(1, keepdim=True)))
    return total / len(codebook), torch.cat(gradients) / len(codebook)


@_loss_and_gradient.register_fake
def _(codebook, vectors, distance):
    return codebook.new_empty(()), torch.empty_like(codebook)


def _save_gradient(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])


def _backward(ctx, gradient, _):
    return gradient * ctx.saved_tensors[0], None, None


_loss_and_gradient.register_autograd(_backward, setup_context=_save_gradient)
