"""Tiny real components for both trainers: 80 garments in ten folders, an autoencoder and a UNet of a few channels."""

from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator

from looc_ldm import LooCVQModel
from looc_ldm.training import autoencoder
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig, LossConfig, OptimizerConfig
from looc_ldm.training.data import load_image_sets

MODEL = {
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "latent_channels": 8,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 16,
    "codevector_dim": 2,
    "interpolation_factor": 1,
    "distance": "euclidean",
}
UNET = {
    "type": "UNet2DModel",
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "block_out_channels": [16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "add_attention": False,
}


@pytest.fixture(scope="session")
def autoencoder_config(small_data):
    """`autoencoder_config(folder, batch_size=4, model={"anchor": "none"}, loss={...})`, six steps if not told."""

    def make(output_dir: Path, model: dict | None = None, loss: dict | None = None, **settings) -> AutoencoderConfig:
        config = AutoencoderConfig(
            output_dir=str(output_dir),
            total_images=48,
            batch_size=8,
            mixed_precision="no",
            ema_halflife_images=16,
            log_every_images=8,
            preview_every_images=24,
            checkpoint_every_images=24,
            tracker="none",
            data=small_data,
            model={**MODEL, **(model or {})},
            loss=LossConfig(**(loss or {})),
            optimizer=OptimizerConfig(learning_rate=2e-3),
        )
        return replace(config, **settings)

    return make


@pytest.fixture(scope="session")
def autoencoder_run(autoencoder_config, tmp_path_factory) -> Path:
    """The output folder of a finished run of the autoencoder. To be read only."""
    folder = tmp_path_factory.mktemp("runs") / "autoencoder"
    autoencoder.train(autoencoder_config(folder, tracker="tensorboard"))
    return folder


@pytest.fixture
def model(autoencoder_run) -> LooCVQModel:
    """The autoencoder of that run."""
    return LooCVQModel.from_pretrained(autoencoder_run / "model").eval()


@pytest.fixture(scope="module")
def images(small_data):
    """The images that it was trained on."""
    return load_image_sets(small_data, channels=1)[0]


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True, mixed_precision="no")


@pytest.fixture(scope="session")
def diffusion_config(small_data, autoencoder_run):
    """`diffusion_config(folder, class_conditional=True, unet={...})`, six steps if not told."""

    def make(output_dir: Path, **settings) -> DiffusionConfig:
        config = DiffusionConfig(
            output_dir=str(output_dir),
            autoencoder=str(autoencoder_run / "model"),
            total_images=48,
            batch_size=8,
            mixed_precision="no",
            ema_halflife_images=16,
            log_every_images=8,
            preview_every_images=24,
            checkpoint_every_images=24,
            tracker="none",
            data=small_data,
            unet=UNET,
            optimizer=OptimizerConfig(learning_rate=1e-3),
            preview_steps=2,
        )
        return replace(config, **settings)

    return make
