"""Whether samples copy training images, by distances between features."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PERCENTILE = 1  # a sample counts as a copy below this percentile of the held-out images' distances
# Times the spread of the training images: a held-out image that is closer counts as one of them. Of 736 flowers at 64
# pixels, those stored twice with other JPEG settings are at most at 0.09, an image and its mirror image at 0.26.
DUPLICATE = 0.2
BLOCK = 512  # rows of the matrix of distances in memory at a time


@dataclass(frozen=True)
class Memorization:
    """Samples and held-out images compared with the training images."""

    copies: float  # share of the samples that are closer to a training image than `threshold`
    copies_held_out: float  # the same share of the held-out images, about 0.01
    threshold: float  # distance between features
    duplicates: int  # held-out images that are left out, because they are training images, too
    distances: torch.Tensor  # from each sample to the nearest training image, float64 (n,)
    nearest: torch.Tensor  # index of that training image, int64 (n,)


def memorization(samples: torch.Tensor, held_out: torch.Tensor, training: torch.Tensor) -> Memorization:
    """Return the share of samples that are closer to a training image than 99 % of held-out images are.

    A sample counts as a copy if the Euclidean distance of its features to the nearest training image's is below the
    first percentile of the same distances of held-out images. So samples that are as new as real photographs have a
    share of about 0.01, and a model that stores its training images has a share near 1.

    Held-out images that are also training images would lower the percentile, and are left out: those closer than a
    fifth of the root mean square distance of training images from their mean.

    Args:
        samples, held_out, training (`torch.Tensor`): Features `(n, D)`, `(m, D)` and `(k, D)`. With fewer than 100
            held-out images the percentile is close to the smallest distance, and uncertain.

    Raises:
        ValueError: A set is empty, or all held-out images are training images.
    """
    for name, features in (("samples", samples), ("held-out images", held_out), ("training images", training)):
        if not len(features):
            raise ValueError(f"memorization needs {name}, got none.")
    distances, nearest = _to_nearest(samples, training)
    of_held_out, _ = _to_nearest(held_out, training)
    spread = training.double().var(0, correction=0).sum().sqrt()
    kept = of_held_out[of_held_out >= DUPLICATE * spread]
    if not len(kept):
        raise ValueError(f"all {len(held_out):,} held-out images are training images, too.")
    threshold = kept.quantile(PERCENTILE / 100)

    def share(values: torch.Tensor) -> float:
        return (values < threshold).double().mean().item()

    duplicates = len(held_out) - len(kept)
    return Memorization(share(distances), share(kept), threshold.item(), duplicates, distances, nearest)


def _to_nearest(features: torch.Tensor, training: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distance of each vector to the nearest training vector, and its index."""
    # float64: the matrix product behind `cdist` would leave distances of equal vectors far from 0 in float32.
    training = training.double()
    found = [torch.cdist(block.double(), training).min(1) for block in features.split(BLOCK)]
    return torch.cat([block.values for block in found]), torch.cat([block.indices for block in found])
