"""Features of images from the Inception network, on all processes, for the figures that training measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator

from looc_ldm.images import to_uint8
from looc_ldm.metrics.collect import Features
from looc_ldm.metrics.extractors import InceptionFeatures
from looc_ldm.metrics.generation import Network, collect_features
from looc_ldm.metrics.shares import share_of_batches
from looc_ldm.training.config import EvaluationConfig

BATCH = 32  # images the network sees at a time


def features_of_config(evaluation: EvaluationConfig) -> InceptionFeatures:
    """What a config measures with. Raises FileNotFoundError where the weights are not there."""
    weights = evaluation.inception_weights
    return InceptionFeatures(str(evaluation.feature_layer), None if weights is None else Path(weights))


def features_of_share(
    network: Network,
    images_at: Callable[[list[int]], Iterable[torch.Tensor]],
    count: int,
    accelerator: Accelerator,
) -> Features:
    """Features of `count` images, each computed by one of the processes. A collective; complete on the main process.

    Args:
        network: What `InceptionFeatures.load` gave.
        images_at: The images at some of the `count` places, uint8 `(C, H, W)`, in their order.
        count: Of all images.
        accelerator: The processes.
    """
    shares = share_of_batches(count, BATCH, accelerator)
    images = iter(images_at([place for share in shares for place in share]))
    # Fewer at the end where some cannot be read.
    batches = (torch.stack(batch) for share in shares if (batch := list(islice(images, len(share)))))
    return collect_features(batches, {"inception": network}, {"inception"}, accelerator, device=accelerator.device)[
        "inception"
    ]


def read_pixels(batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The images of float batches in [-1, 1], one by one, as uint8 `(C, H, W)`."""
    for batch in batches:
        yield from to_uint8(batch)
