"""`looc-ldm convert`: what is read, what is refused, and what is written."""

import os
import pickle
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from looc_ldm import LooCLDMPipeline
from looc_ldm.cli import main
from looc_ldm.loading import load_autoencoder

FLAGS = "--resolution 32 --distance cosine --interpolation-factor 1"
LDM_FLAGS = "--resolution 16 --num-head-channels 16 --prediction-type epsilon --scaling-factor 1"


class Anything:
    """Of a class that no reader of weights knows."""


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.fixture
def small(theirs, tmp_path, monkeypatch) -> dict:
    """Weights of a small LooC model, in the working folder also as `best.pt`, the name the authors save it under."""
    quantizer = theirs.Codebook(32, 4, usage=True, distance="cos")
    state = theirs.make(theirs.SmallVQVAE, 3, 16, 8, 2, 16, quantizer).state_dict()
    monkeypatch.chdir(tmp_path)
    torch.save(state, "best.pt")
    return state


@pytest.fixture
def diffusion(theirs, tmp_path, monkeypatch) -> dict:
    """Weights of an unconditional LDM, in the working folder also as `model.ckpt`."""
    vqgan = theirs.make(theirs.VQGAN, 32, (1, 2), 1, (False, True), 8, 4, theirs.Codebook(64, 4, False))
    unet = theirs.make(theirs.UNet, 4, 32, (1, 2), 1, (2,), num_head_channels=16)
    state = theirs.latent_diffusion(unet, vqgan)
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state, "global_step": 1, "optimizer_states": []}, "model.ckpt")
    return state


def error_of(command: str, capsys) -> str:
    """The one line that a command ends with, which must leave nothing behind."""
    before = {path.name for path in Path().iterdir()}
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(command))
    assert caught.value.code == 2
    assert {path.name for path in Path().iterdir()} == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


# Written --------------------------------------------------------------------------------------------------------------


def test_an_autoencoder_folder_that_all_commands_take(small, capsys):
    main(shlex.split(f"convert best.pt --output models/looc {FLAGS}"))
    assert {path.name for path in Path("models").iterdir()} == {"looc"}
    assert {path.name for path in Path("models/looc").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    model = load_autoencoder("models/looc")
    assert model.config._class_name == "LooCSmallVQModel"
    assert torch.equal(model.quantize.usage, small["_vq_vae.embed_prob"])
    output = capsys.readouterr().out
    assert "LooCSmallVQModel: 0.02M parameters." in output
    assert "Codebook: 32 x 4, cosine distance, interpolation factor 1: 1.250 bits per pixel." in output
    assert "anchor closest, codebook_update gradient" in output
    assert "looc_ldm.training.latents.measure_scaling_factor" in output
    assert output.endswith("looc: models/looc\n")


def test_a_pipeline_folder_that_draws_images(diffusion, capsys):
    main(shlex.split(f"convert model.ckpt --output ldm {LDM_FLAGS}"))
    output = capsys.readouterr().out
    assert "Weights: the live ones." in output
    assert "query, key and value are taken head by head" in output
    pipe = LooCLDMPipeline.from_pretrained("ldm")
    assert pipe.scheduler.config.beta_end == 0.0195
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
    assert images.shape == (2, 16, 16, 3)


@pytest.mark.parametrize("form", ["safetensors", "lightning", "old pickle"])
def test_all_forms_of_checkpoint_are_read(small, form, capsys):
    if form == "safetensors":
        save_file(small, "weights.safetensors")
        file = "weights.safetensors"
    else:
        file = "last.ckpt"
        content = {"state_dict": small, "epoch": 3, "callbacks": {"best": {"score": torch.ones(())}}}
        torch.save(content, file, _use_new_zipfile_serialization=form == "lightning")
    main(shlex.split(f"convert {file} --output ours {FLAGS}"))
    assert torch.equal(load_autoencoder("ours").quantize.codebook, small["_vq_vae.embedding.weight"])


def test_half_precision_weights_become_float32(small):
    torch.save({key: value.half() for key, value in small.items()}, "half.pt")
    main(shlex.split(f"convert half.pt --output ours {FLAGS}"))
    assert load_autoencoder("ours").dtype == torch.float32


def test_the_original_config_stands_in_for_flags(small):
    config = {"dataset": "mnist", "shuffle_scale": 2, "distance": "cos", "split_type": "fixed", "hidden_size": 16}
    Path("cifar.yaml").write_text(yaml.safe_dump(config))
    main(shlex.split("convert best.pt --output ours --original-config cifar.yaml"))
    config = load_autoencoder("ours").config
    assert (config.interpolation_factor, config.segment_layout, config.sample_size) == (2, "patch", 28)


# Refused --------------------------------------------------------------------------------------------------------------


def test_a_pickle_that_could_run_code_is_refused_and_does_not(small, capsys):
    torch.save({"state_dict": small, "callbacks": Bomb()}, "bomb.ckpt")
    error = error_of(f"convert bomb.ckpt --output ours {FLAGS}", capsys)  # which finds no new folder "exploded"
    assert "holds more than tensors and plain containers (posix.mkdir)" in error
    torch.save({"state_dict": small, "callbacks": Anything()}, "last.ckpt")
    error = error_of(f"convert last.ckpt --output ours {FLAGS}", capsys)
    assert re.search(r"\([\w.]*Anything\).*it is refused", error)
    assert "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)" in error


def test_what_is_not_a_checkpoint_is_refused(small, capsys):
    flags = f"--output ours {FLAGS}"
    Path("text.ckpt").write_text("no weights")
    Path("text.safetensors").write_text("no weights")
    torch.save([torch.ones(1)], "list.pt")
    torch.save({"epoch": 3, "weights": torch.ones(1)}, "other.pt")
    Path("plain.pt").write_bytes(pickle.dumps({"a": 1}))
    Path("cut.pt").write_bytes(Path("best.pt").read_bytes()[:2000])
    assert "no checkpoint 'nowhere.ckpt'" in error_of(f"convert nowhere.ckpt {flags}", capsys)
    assert "'text.ckpt'" in error_of(f"convert text.ckpt {flags}", capsys)
    assert "cannot read 'text.safetensors'" in error_of(f"convert text.safetensors {flags}", capsys)
    assert "'list.pt' holds no state dict" in error_of(f"convert list.pt {flags}", capsys)
    assert "its entry 'epoch' is a int" in error_of(f"convert other.pt {flags}", capsys)
    assert "'plain.pt'" in error_of(f"convert plain.pt {flags}", capsys)
    assert "'cut.pt'" in error_of(f"convert cut.pt {flags}", capsys)


def test_a_folder_that_exists_is_left_alone(small, capsys):
    Path("ours").mkdir()
    assert "'ours' exists already: give a new folder" in error_of(f"convert best.pt --output ours {FLAGS}", capsys)
    assert not list(Path("ours").iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give --distance, --interpolation-factor, --resolution, or --original-config FILE"),
        ("--resolution 0", "must be a positive whole number"),
        ("--kind vqgan --resolution 32", "not a VQGAN: surplus _encoder._conv_1.weight"),
        ("--kind ldm", "surplus _encoder._conv_1.weight"),
        ("--resolution 30 --distance cosine --interpolation-factor 1", "divisible by 4, got 30x30"),
        ("--original-config nowhere.yaml", "cannot read --original-config 'nowhere.yaml'"),
        ("--num-heads 4 --num-head-channels 8", "not allowed with"),
        ("--scaling-factor nan", "must be a positive number, got 'nan'"),
    ],
)
def test_errors_are_one_line(small, flags, message, capsys):
    assert message in error_of(f"convert best.pt --output ours {flags}", capsys)


def test_a_model_of_another_kind_than_said_is_refused(diffusion, capsys):
    assert "no _pre_vq_conv" in error_of(f"convert model.ckpt --output ours --kind looc {FLAGS}", capsys)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = capsys.readouterr().out
    for flag in ("--output", "--kind", "--original-config", "--no-ema", "--num-head-channels", "--null-class-label"):
        assert flag in text
