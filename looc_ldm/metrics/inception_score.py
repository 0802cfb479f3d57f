"""The Inception score of images, from the logits of the Inception network."""

from __future__ import annotations

import numpy as np
import torch

SEED = 2020  # torch-fidelity's default, so that its command line gives the same figure


def inception_score(logits: torch.Tensor, splits: int = 10, seed: int = SEED) -> tuple[float, float]:
    """exp of the mean KL divergence from each image's class distribution to that of all (Salimans et al. 2016).

    Args:
        logits (`torch.Tensor`): `(n, classes)`.
        splits (`int`, defaults to 10): Parts that the shuffled images are cut into.
        seed (`int`, defaults to 2020): Of the shuffle, which is torch-fidelity's.

    Returns:
        `tuple[float, float]`: Mean and standard deviation over the parts, each from 1 to the number of classes.

    Raises:
        ValueError: Fewer images than `splits`, `splits` below 1, another shape, or logits that are not finite.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (n, classes), got {tuple(logits.shape)}.")
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits must be from 1 to the number of images, {len(logits)}, got {splits}.")
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite.")
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
    logits = logits.detach().cpu()[order].double()
    scores = []
    for part in range(splits):
        log_p = logits[part * len(logits) // splits : (part + 1) * len(logits) // splits].log_softmax(1)
        # 0 * log 0 is 0 where a class has no probability anywhere
        log_mean = log_p.logsumexp(0) - np.log(len(log_p))
        divergence = (log_p.exp() * (log_p - log_mean)).sum(1)
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))
