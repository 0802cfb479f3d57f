"""The Inception score is torch-fidelity's."""

import pytest
import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

from looc_ldm.metrics.inception_score import inception_score


def drawn(count: int, classes: int = 30) -> torch.Tensor:
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("count", [10, 37, 500])
@pytest.mark.parametrize("splits", [1, 3, 10])
@pytest.mark.parametrize("seed", [2020, 1])
def test_it_is_torch_fidelitys(count, splits, seed):
    expected = isc_features_to_metric(drawn(count), splits=splits, rng_seed=seed)
    figures = inception_score(drawn(count), splits, seed)
    assert figures == pytest.approx((expected[KEY_METRIC_ISC_MEAN], expected[KEY_METRIC_ISC_STD]), rel=1e-9, abs=1e-12)


def test_sure_and_balanced_predictions_score_the_number_of_classes():
    logits = 1e4 * torch.eye(5).repeat(20, 1)
    assert inception_score(logits, splits=1) == pytest.approx((5, 0))


def test_equal_predictions_score_one():
    assert inception_score(drawn(1).repeat(50, 1)) == pytest.approx((1, 0), abs=1e-12)


def test_what_has_no_score_is_refused():
    with pytest.raises(ValueError, match="number of images, 4, got 10"):
        inception_score(drawn(4))
    with pytest.raises(ValueError, match="splits"):
        inception_score(drawn(4), splits=0)
    with pytest.raises(ValueError, match=r"\(4,\)"):
        inception_score(drawn(4)[:, 0])
    with pytest.raises(ValueError, match="not finite"):
        inception_score(drawn(40) / 0)
