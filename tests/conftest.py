"""Fixtures on real data. Tests that need them are skipped without LOOC_LDM_TEST_DATA."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real images and metric weights that LOOC_LDM_TEST_DATA names."""
    if not os.environ.get("LOOC_LDM_TEST_DATA"):
        pytest.skip("needs real images and metric weights: set LOOC_LDM_TEST_DATA to their folder")
    return Path(os.environ["LOOC_LDM_TEST_DATA"])


@pytest.fixture(scope="session")
def inception_weights(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pth of the FID Inception network that holds layers 64, 192 and 768; all later weights are NaN."""
    spec = importlib.util.spec_from_file_location("metric_weights", test_data / "metrics" / "metric_weights.py")
    metric_weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(metric_weights)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(metric_weights.inception_state_dict(metric_weights.inception_template()), path)
    return path
