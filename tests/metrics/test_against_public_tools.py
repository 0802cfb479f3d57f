"""Figures equal those of torch-fidelity and lpips on the same photos.

The real Inception weights of the test data end at layer 768; at 2048, and for logits, the network has random ones.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch.utils.data import Subset

from looc_ldm.metrics import InceptionFeatures
from looc_ldm.metrics.generation import collect_features, generation_figures

COUNTS = (16, 14)  # the first set is the generated one


@pytest.fixture(scope="module")
def photos(test_data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return photos of two different classes: KID of similar sets is lost in the float32 of torch-fidelity."""
    with tarfile.open(test_data / "imagenette128" / "val.tar") as tar:
        names = sorted(member.name for member in tar if member.isfile())
        chosen = names[: COUNTS[0] * 5 : 5] + names[-COUNTS[1] * 5 :: 5]
        files = [tar.extractfile(name).read() for name in chosen]
    arrays = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return images[: COUNTS[0]], images[COUNTS[0] :]


@pytest.mark.parametrize("layer", ["768", "2048"])
def test_fid_kid_inception_score_precision_and_recall_are_torch_fidelitys(layer, photos, request):
    weights = request.getfixturevalue("inception_weights" if layer == "768" else "untrained_inception")
    has_logits = layer == "2048"
    expected = torch_fidelity.calculate_metrics(
        **{f"input{number}": Subset(images, range(len(images))) for number, images in enumerate(photos, 1)},
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        **{f"feature_layer_{metric}": layer for metric in ("fid", "kid", "prc")},
        **{"fid": True, "kid": True, "kid_subset_size": min(COUNTS), "prc": True, "isc": has_logits},
        **{"cuda": False, "cache": False, "save_cpu_ram": True, "batch_size": 10, "verbose": False},
    )
    network = {"inception": InceptionFeatures(layer, weights, has_logits).load("cpu")}
    sides = [collect_features([images], network, network) for images in photos]
    metrics = ["fid", "kid", "precision_recall", *(["is"] if has_logits else [])]
    figures = generation_figures(metrics, *sides, {"inception": layer})
    names = {
        f"fid@{layer}": torch_fidelity.KEY_METRIC_FID,
        f"kid@{layer}": torch_fidelity.KEY_METRIC_KID_MEAN,
        f"kid_std@{layer}": torch_fidelity.KEY_METRIC_KID_STD,
        f"precision@{layer}": torch_fidelity.KEY_METRIC_PRECISION,
        f"recall@{layer}": torch_fidelity.KEY_METRIC_RECALL,
        "is": torch_fidelity.KEY_METRIC_ISC_MEAN,
        "is_std": torch_fidelity.KEY_METRIC_ISC_STD,
    }
    assert figures[f"fid@{layer}"] > 1e-3
    # Its features are float32. Subsets of all images: the deviation of KID is rounding.
    assert figures == {
        name: pytest.approx(expected[names[name]], rel=1e-3, abs=1e-6 if "std" in name else 0) for name in figures
    }
