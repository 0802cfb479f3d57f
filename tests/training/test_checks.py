"""Settings that cannot work are refused in one line, before a run writes anything."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from looc_ldm.images.config import DataConfig
from looc_ldm.training import autoencoder, diffusion
from looc_ldm.training.checks import check_config
from looc_ldm.training.config import AutoencoderConfig, LossConfig
from looc_ldm.training.losses import PatchDiscriminator
from looc_ldm.utils.errors import ConfigError


def test_a_batch_must_divide_into_its_accumulation_steps():
    with pytest.raises(ConfigError, match="batch_size=10 must be a multiple of gradient_accumulation_steps=4"):
        check_config(AutoencoderConfig(batch_size=10, gradient_accumulation_steps=4))


@pytest.mark.parametrize("place", [".", "runs/one", "../images/runs"])
def test_an_output_dir_inside_the_data_is_refused(tmp_path, monkeypatch, place):
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path / "images")
    for path in (".", str(tmp_path / "images")):
        with pytest.raises(ConfigError, match=f"output_dir='{re.escape(place)}' is inside data.path='"):
            autoencoder.train(AutoencoderConfig(output_dir=place, data=DataConfig(path=path)))
    assert not list(Path().iterdir())
    check_config(AutoencoderConfig(output_dir="../runs", data=DataConfig(path=".")))


@pytest.mark.parametrize(("layers", "smallest"), [(1, 6), (3, 24), (6, 192)])
def test_a_patchgan_with_too_many_layers_for_the_resolution_is_refused(layers, smallest):
    loss = LossConfig(adversarial_weight=1.0, discriminator_layers=layers)
    check_config(AutoencoderConfig(loss=loss, data=DataConfig(resolution=smallest)))
    assert PatchDiscriminator(1, 4, layers)(torch.zeros(1, 1, smallest, smallest)).numel() == 1
    with pytest.raises(ConfigError, match=f"discriminator_layers={layers} needs images of at least {smallest} pixels"):
        check_config(AutoencoderConfig(loss=loss, data=DataConfig(resolution=smallest - 1)))
    check_config(AutoencoderConfig(loss=replace(loss, adversarial_weight=0.0), data=DataConfig(resolution=4)))


@pytest.mark.parametrize("channels", [{"in_channels": 3}, {"out_channels": 3}])
def test_an_autoencoder_that_does_not_return_the_channels_it_takes_is_refused(autoencoder_config, tmp_path, channels):
    with pytest.raises(ConfigError, match=r"model.in_channels=\d and model.out_channels=\d must be equal"):
        autoencoder.train(autoencoder_config(tmp_path / "run", model=channels))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta_schedule": "scaled_linera"}, "^scheduler: scaled_linera is not implemented"),
        ({"num_train_timesteps": "many"}, "^scheduler: "),
        ({"type": 3}, "^scheduler.type must be the name of a diffusers scheduler, got 3"),
        ({"num_train_timesteps": 1}, r"^preview_steps must be in \[1, 1\], got 2"),
        ({"type": "KarrasVeScheduler"}, "^scheduler: KarrasVeScheduler is for another kind of model"),
    ],
)
def test_arguments_that_a_scheduler_refuses_are_one_line(diffusion_config, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        diffusion.train(diffusion_config(tmp_path / "run", scheduler=settings))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "model",
    [
        {"up_block_types": [1, 1]},
        {"num_vq_embeddings": 0},
        {"norm_num_groups": 0},
        {"block_out_channels": 8},
        {"scaling_factor": -1},
    ],
)
def test_arguments_that_an_autoencoder_refuses_are_one_line(autoencoder_config, tmp_path, model):
    with pytest.raises(ConfigError, match=r"^model: ") as caught:
        autoencoder.train(autoencoder_config(tmp_path / "run", model=model))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
