"""Fixtures. Tests that need real data are skipped without LOOC_LDM_TEST_DATA."""

import importlib.util
import os
from pathlib import Path

# Before torch reads it, and for the processes that tests start: two workers share two cores, and what is equal to the
# last bit is so for one number of threads only.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.fixture(scope="session")
def largest_tensor() -> type[LargestTensor]:
    """The context manager that measures tensors."""
    return LargestTensor


@pytest.fixture(scope="session")
def quickstart_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `quickstart` was run in, with untrained networks: what it leaves behind, after a few steps."""
    from looc_ldm import LooCVQModel
    from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig, load_config
    from looc_ldm.training.diffusion import train

    folder = tmp_path_factory.mktemp("user")
    model = folder / "quickstart" / "autoencoder" / "model"
    first = load_config(AutoencoderConfig, "fashion_mnist/autoencoder")
    LooCVQModel(sample_size=32, scaling_factor=1.0, **first.model).save_pretrained(model)
    train(
        load_config(
            DiffusionConfig,
            "fashion_mnist/diffusion",
            output_dir=folder / "quickstart" / "diffusion",
            autoencoder=model,
            total_images=16,
            batch_size=16,
            preview_steps=1,
            tracker="none",
        )
    )
    return folder


@pytest.fixture
def quickstart_folder(quickstart_files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of somebody who ran `looc-ldm quickstart`. To be read only."""
    monkeypatch.chdir(quickstart_files)
    return quickstart_files


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
