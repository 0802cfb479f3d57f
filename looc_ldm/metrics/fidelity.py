"""KID, Inception score, precision and recall of features, by torch-fidelity in float64, and CMMD."""

from __future__ import annotations

import torch

SEED = 2020  # torch-fidelity's default, so that its command line gives the same figures
SUBSETS, SUBSET_SIZE = 100, 1000  # for KID
SPLITS = 10  # for the Inception score
NEIGHBORS = 3  # for precision and recall
BATCH = 1000  # rows of a distance matrix in memory at a time: 400 MB per copy for 50,000 columns
CMMD_SIGMA = 10.0  # bandwidth of the kernel
CMMD_BLOCK = 512  # rows of a kernel matrix in memory at a time


def kid(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Return the kernel Inception distance (Binkowski et al. 2018), an unbiased squared MMD of the cubic kernel.

    Unlike FID it does not fall with the number of images.

    Args:
        first, second (`torch.Tensor`): Features `(n, D)` and `(m, D)`.

    Returns:
        `tuple[float, float]`: Mean, which may be slightly negative, and standard deviation over 100 pairs of random
        subsets of min(1000, n, m) features.

    Raises:
        ValueError: Fewer than 2 features on a side.
    """
    from torch_fidelity import metric_kid

    size = min(SUBSET_SIZE, len(first), len(second))
    if size < 2:
        raise ValueError(f"KID needs at least 2 images on each side, got {len(first)} and {len(second)}.")
    found = metric_kid.kid_features_to_metric(
        first.double(), second.double(), kid_subsets=SUBSETS, kid_subset_size=size, rng_seed=SEED, verbose=False
    )
    return found[metric_kid.KEY_METRIC_KID_MEAN], found[metric_kid.KEY_METRIC_KID_STD]


def inception_score(logits: torch.Tensor) -> tuple[float, float]:
    """Return exp of the mean KL divergence from each image's class distribution to that of all (Salimans et al. 2016).

    Args:
        logits (`torch.Tensor`): `(n, classes)`.

    Returns:
        `tuple[float, float]`: Mean and standard deviation over 10 parts of the shuffled images, each from 1 to the
        number of classes.

    Raises:
        ValueError: Fewer images than parts.
    """
    from torch_fidelity import metric_isc

    if len(logits) < SPLITS:
        raise ValueError(f"the Inception score needs at least {SPLITS} images, got {len(logits)}.")
    found = metric_isc.isc_features_to_metric(logits, SPLITS, rng_seed=SEED)
    return found[metric_isc.KEY_METRIC_ISC_MEAN], found[metric_isc.KEY_METRIC_ISC_STD]


def precision_recall(generated: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Return improved precision and recall (Kynkaanniemi et al. 2019).

    The region of a set is the union of balls around its features, each with the distance to the third nearest other
    feature as radius. Precision is the share of generated features in the region of the reference, recall the share of
    reference features in the region of the generated ones.

    Args:
        generated, reference (`torch.Tensor`): Features `(n, D)` and `(m, D)`.

    Returns:
        `tuple[float, float]`: Precision and recall, each from 0 to 1.

    Raises:
        ValueError: Fewer than 4 features on a side.
    """
    from torch_fidelity import metric_prc

    if min(len(generated), len(reference)) <= NEIGHBORS:
        raise ValueError(
            f"precision and recall need at least {NEIGHBORS + 1} images on each side, got {len(generated)} and "
            f"{len(reference)}."
        )
    found = metric_prc.prc_features_to_metric(
        generated.double(),
        reference.double(),
        prc_neighborhood=NEIGHBORS,
        prc_batch_size=BATCH,
        save_cpu_ram=True,  # otherwise the whole matrix: 20 GB for 50,000 images on each side
        verbose=False,
    )
    return found[metric_prc.KEY_METRIC_PRECISION], found[metric_prc.KEY_METRIC_RECALL]


def cmmd(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return 1000 times the squared MMD of the kernel exp(-|x - y|^2 / (2 * 10^2)) (Jayasumana et al. 2024).

    Args:
        first, second (`torch.Tensor`): Normalized CLIP embeddings `(n, D)` and `(m, D)`.

    Returns:
        `float`: The biased estimate, as published: the kernel means include each embedding paired with itself. So it
            is not negative, and 0 for equal sets, up to rounding.
    """
    x, y = first.double(), second.double()
    return 1000 * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y))


def _mean_kernel(x: torch.Tensor, y: torch.Tensor) -> float:
    exponents = (torch.cdist(block, y).square_().mul_(-1 / (2 * CMMD_SIGMA**2)) for block in x.split(CMMD_BLOCK))
    return sum(float(values.exp_().sum()) for values in exponents) / (len(x) * len(y))
