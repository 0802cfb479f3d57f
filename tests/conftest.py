"""Fixtures. Tests that need real data are skipped without LOOC_LDM_TEST_DATA."""

import logging
import os
import socket
from pathlib import Path

# Before torch reads it, and for the processes that tests start: two workers share two cores, and what is equal to the
# last bit is so for one number of threads only.
os.environ["OMP_NUM_THREADS"] = "1"

import datasets
import numpy as np
import pytest
import torch
import tqdm.std
from accelerate.state import AcceleratorState
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from looc_ldm.images.config import DataConfig
from looc_ldm.training.data import load_image_sets
from tiny import TINY_CLASSES, import_file, tiny_autoencoder, tiny_pipeline

# Accelerate allows a process one precision: tests that leave it to the CPU share that of the others.
torch.cpu._is_avx512_bf16_supported = lambda: False


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


@pytest.fixture(autouse=True)
def _no_bar_is_left():
    """A progress bar that an error leaves open stands in front of the error, and of what the next test writes."""
    before = set(tqdm.std.tqdm._instances)
    yield
    left = [bar.desc for bar in set(tqdm.std.tqdm._instances) - before]
    assert not left, f"bars left open: {left}"


@pytest.fixture(scope="module", autouse=True)
def _accelerate_starts_anew():
    """Accelerate keeps the precision of a process's first training, and refuses a different one."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch):
    """A connection to another machine fails the test."""
    connect = socket.socket.connect

    def connect_to_loopback(self, address):
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost", "::1"), address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_to_loopback)


@pytest.fixture
def diffusers_log(caplog: pytest.LogCaptureFixture):
    """Records of the warnings of diffusers."""
    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        yield caplog
    diffusers_logging.disable_propagation()


@pytest.fixture(scope="session")
def largest_tensor() -> type[LargestTensor]:
    """The context manager that measures tensors."""
    return LargestTensor


@pytest.fixture(scope="session")
def quickstart_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `quickstart` was run in, with untrained networks: what it leaves behind, after a few steps."""
    from looc_ldm import LooCVQModel
    from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
    from looc_ldm.training.config_parsing import load_config
    from looc_ldm.training.diffusion import train

    folder = tmp_path_factory.mktemp("user")
    model = folder / "quickstart" / "autoencoder" / "model"
    first = load_config(AutoencoderConfig, "fashion_mnist/autoencoder")
    LooCVQModel(sample_size=32, scaling_factor=1.0, **first.model).save_pretrained(model)
    # Its precision, bfloat16 where the CPU has AMX, may be another than that of the tests around it.
    AcceleratorState._reset_state(reset_partial_state=True)
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
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture
def quickstart_folder(quickstart_files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of somebody who ran `looc-ldm quickstart`. To be read only."""
    monkeypatch.chdir(quickstart_files)
    return quickstart_files


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny class-conditional pipeline of grey 16x16 images, with random weights."""
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    tiny_pipeline(vqvae=tiny_autoencoder(channels=1)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve 14x14 images, four in the sub-folder of each class of that pipeline."""
    folder = tmp_path_factory.mktemp("data") / "images"
    pixels = np.random.default_rng(0).integers(0, 256, (12, 14, 14), np.uint8)
    for i, image in enumerate(pixels):
        (folder / TINY_CLASSES[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / TINY_CLASSES[i % 3] / f"{i}.png")
    return str(folder)


@pytest.fixture
def in_an_empty_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which holds nothing."""
    folder = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LOOC_LDM_CACHE", str(folder / "cache"))
    return folder


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real images and metric weights that LOOC_LDM_TEST_DATA names."""
    if not os.environ.get("LOOC_LDM_TEST_DATA"):
        pytest.skip("needs real images and metric weights: set LOOC_LDM_TEST_DATA to their folder")
    return Path(os.environ["LOOC_LDM_TEST_DATA"])


@pytest.fixture(scope="session")
def untrained_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole Inception network, its random weights such that no layer forgets the image."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    folder = tmp_path_factory.mktemp("untrained_inception")
    torch.save({}, folder / "nothing.pth")
    torch.manual_seed(0)
    state = Untrained("untrained", ["64"], feature_extractor_weights_path=str(folder / "nothing.pth")).state_dict()
    for name, value in state.items():
        if name.endswith("conv.weight"):
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
    state["fc.weight"].normal_(0, 0.1)
    torch.save(state, folder / "untrained.pth")
    return folder / "untrained.pth"


@pytest.fixture(scope="session")
def inception_weights(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pth of the FID Inception network that holds layers 64, 192 and 768; all later weights are NaN."""
    metric_weights = import_file(test_data / "metrics" / "metric_weights.py")
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(metric_weights.inception_state_dict(metric_weights.inception_template()), path)
    return path


IMAGES_PER_CLASS = 8


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory):
    """Prepared data sets go to a temporary folder, in this process and in those it starts."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="session")
def bundled():
    """Training and validation images of the bundled set, padded to 32x32."""
    config = DataConfig(path="fashion_mnist", validation_split="validation", resolution=32, fit="pad", flip=False)
    return load_image_sets(config, channels=1)


@pytest.fixture(scope="session")
def garments(bundled, tmp_path_factory) -> Path:
    """A folder of 28x28 grey PNGs, one sub-folder a class."""
    train, _ = bundled
    folder = tmp_path_factory.mktemp("images") / "garments"
    for label, name in enumerate(train.classes):
        (folder / name.replace("/", "-")).mkdir(parents=True)
        for index in np.flatnonzero(train.labels() == label)[:IMAGES_PER_CLASS].tolist():
            stored = train.source.read(index).content
            (folder / name.replace("/", "-") / f"{index:04d}.png").write_bytes(stored)
    return folder


@pytest.fixture(scope="session")
def small_data(garments) -> DataConfig:
    """64 of the garments to train on, flipped, and 16 to measure on."""
    return DataConfig(path=str(garments), validation_images=16, resolution=32, fit="pad", num_workers=0)
