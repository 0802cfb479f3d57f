"""Features of images from the Inception network, on all processes, and how far two sets of them are apart.

What `looc_ldm.metrics.fid_and_kid` does in one process for images that are there; here they are drawn, and divided.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator

from looc_ldm.metrics.generation import KID_SUBSET_SIZE, SEED, InceptionFeatures
from looc_ldm.training.config import EvaluationConfig

BATCH = 32  # images the network sees at a time


def features_of_config(evaluation: EvaluationConfig) -> InceptionFeatures:
    """What a config measures with. Raises FileNotFoundError where the weights are not there."""
    weights = evaluation.inception_weights
    return InceptionFeatures(str(evaluation.feature_layer), None if weights is None else Path(weights))


def inception(features: InceptionFeatures, device: torch.device) -> nn.Module:
    """torch-fidelity's network: uint8 images `(B, 3, H, W)` to a tuple with their features `(B, layer)`."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", [features.layer], feature_extractor_weights_path=features.weights_path, verbose=False
    )
    return network.to(device)


def image_features(network: nn.Module, images: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Features `(n, layer)`, on the device, of uint8 images `(C, H, W)`."""
    images = iter(images)
    parts = [torch.empty(0, int(network.features_list[0]), device=device)]
    while batch := list(islice(images, BATCH)):
        parts.extend(network(torch.stack(batch).expand(-1, 3, -1, -1).to(device)))
    return torch.cat(parts)


def gathered(share: torch.Tensor, count: int, accelerator: Accelerator) -> torch.Tensor:
    """The rows of all processes, on the CPU, in the order 0, 1, ..., where process r of R has the rows r, r + R, ...

    A collective. Of at most `count` rows: a process may have fewer than its share.
    """
    length = -(-count // accelerator.num_processes)
    filled = F.pad(share, (0, 0, 0, length - len(share)), value=torch.nan)
    rows = accelerator.gather(filled).view(accelerator.num_processes, length, -1).transpose(0, 1).flatten(0, 1)
    return rows[~rows.isnan().any(1)].cpu()


def fid_and_kid_of_features(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """FID and KID of two sets of features, as `looc_ldm.metrics.fid_and_kid` has them."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    moments = (fid_features_to_statistics(features) for features in (first, second))
    fid = fid_statistics_to_metric(*moments, verbose=False)[KEY_METRIC_FID]
    subset = min(KID_SUBSET_SIZE, len(first), len(second))
    kid = kid_features_to_metric(first, second, kid_subset_size=subset, rng_seed=SEED, verbose=False)
    return fid, kid[KEY_METRIC_KID_MEAN]
