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

import originals
from looc_ldm import LooCLDMPipeline
from looc_ldm.commands.main import main
from looc_ldm.models.loading import load_autoencoder
from tiny import refusal

FLAGS = "--resolution 32 --distance cosine --interpolation-factor 1"
LDM_FLAGS = "--resolution 16 --num-head-channels 16 --prediction-type epsilon --scaling-factor 1"


class Anything:
    """A class that no reader of weights knows."""


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.fixture
def small(tmp_path, monkeypatch) -> dict:
    """Weights of a small LooC model, in the working folder also as `best.pt`, the name the authors save it under."""
    state = originals.small_vqvae().state_dict()
    monkeypatch.chdir(tmp_path)
    torch.save(state, "best.pt")
    return state


@pytest.fixture
def diffusion(tmp_path, monkeypatch) -> dict:
    """Weights of an unconditional LDM, in the working folder also as `model.ckpt`."""
    state = originals.latent_diffusion(originals.unet(attention=(2,)), originals.vqgan())
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state, "global_step": 1, "optimizer_states": []}, "model.ckpt")
    return state


def error_of(command: str, capsys) -> str:
    """Return the one line that a command ends with, which must leave nothing behind."""
    return refusal(capsys, *shlex.split(command))


# Written --------------------------------------------------------------------------------------------------------------


def test_an_autoencoder_folder_that_all_commands_take(small, capsys):
    Path("models/.looc.partial/sub").mkdir(parents=True)  # a conversion that was killed left it
    main(shlex.split(f"convert best.pt --output models/looc {FLAGS}"))
    assert {path.name for path in Path("models").iterdir()} == {"looc"}
    assert {path.name for path in Path("models/looc").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "model.py",
    }
    model = load_autoencoder("models/looc")
    assert model.config._class_name == "LooCSmallVQModel"
    assert torch.equal(model.quantize.usage, small["_vq_vae.embed_prob"])
    output = capsys.readouterr().out
    assert "LooCSmallVQModel: 0.02M parameters." in output
    assert "Codebook: 32 x 4, cosine distance, interpolation factor 1: 1.250 bits per pixel." in output
    assert "anchor closest, codebook_update gradient, gradient straight-through" in output
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
    assert "a pickle of only tensors and plain containers (posix.mkdir)" in error
    torch.save({"state_dict": small, "callbacks": Anything()}, "last.ckpt")
    error = error_of(f"convert last.ckpt --output ours {FLAGS}", capsys)
    assert re.search(r"is refused: .*\([\w.]*Anything\)", error)
    assert "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)" in error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.ckpt", None, "cannot read 'nowhere.ckpt': No such file or directory"),
        ("empty.pt", b"", "cannot read 'empty.pt': it ends too early."),
        ("text.ckpt", b"no weights", "'text.ckpt' is refused: it is neither safetensors nor a pickle"),
        ("text.safetensors", b"no weights", "cannot read 'text.safetensors'"),
        ("list.pt", [torch.ones(1)], "'list.pt' holds no state dict"),
        ("other.pt", {"epoch": 3, "weights": torch.ones(1)}, "its entry 'epoch' is a int"),
        ("plain.pt", pickle.dumps({"a": 1}), "'plain.pt'"),
        ("cut.pt", slice(2000), "cannot read 'cut.pt'"),
    ],
)
def test_what_is_not_a_checkpoint_is_refused(small, name, content, message, capsys):
    if isinstance(content, slice):
        content = Path("best.pt").read_bytes()[content]
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif content is not None:
        torch.save(content, name)
    assert message in error_of(f"convert {name} --output ours {FLAGS}", capsys)


def test_a_folder_that_exists_is_left_alone(small, capsys):
    Path("ours").mkdir()
    assert "'ours' exists already: give a new folder" in error_of(f"convert best.pt --output ours {FLAGS}", capsys)
    assert not list(Path("ours").iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give --distance, --interpolation-factor, --resolution, or --original-config FILE"),
        ("--resolution 0", "--resolution: must be >0, got 0"),
        ("--kind vqgan --resolution 32", "not a VQGAN: unexpected _encoder._conv_1.weight"),
        ("--kind ldm", "unexpected _encoder._conv_1.weight"),
        ("--resolution 30 --distance cosine --interpolation-factor 1", "divisible by 4, got 30x30"),
        ("--original-config nowhere.yaml", "cannot read --original-config 'nowhere.yaml'"),
        ("--num-heads 4 --num-head-channels 8", "exclude each other"),
        ("--scaling-factor nan", "--scaling-factor: must be >0 and <inf, got nan"),
    ],
)
def test_errors_are_one_line(small, flags, message, capsys):
    assert message in error_of(f"convert best.pt --output ours {flags}", capsys)


def test_a_model_of_another_kind_than_said_is_refused(diffusion, capsys):
    assert "no _pre_vq_conv" in error_of(f"convert model.ckpt --output ours --kind looc {FLAGS}", capsys)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"shuffle_scale": "abc"}, "shuffle_scale is 'abc': invalid literal for int()"),
        ({"shuffle_scale": -1}, "shuffle_scale is -1: -1 does not conform to restriction v>=0"),
        ({"distance": ["cos"]}, "distance must be one of cos, l2, got \"['cos']\""),
        ({"anchor": [1]}, "anchor must be one of"),
    ],
)
def test_values_of_a_wrong_type_in_a_small_models_config_are_named(small, setting, message, capsys):
    Path("bad.yaml").write_text(yaml.safe_dump({"dataset": "mnist", "shuffle_scale": 0, "distance": "cos", **setting}))
    assert message in error_of("convert best.pt --output ours --original-config bad.yaml", capsys)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model", "linear_start", "abc"),
        ("model", "image_size", [8, 8]),
        ("unet", "num_heads", "abc"),
        ("unet", "num_head_channels", 0),
    ],
)
def test_values_of_a_wrong_type_in_an_ldms_config_are_named(diffusion, part, name, value, capsys):
    parts: dict = {"model": {}, "unet": {"num_head_channels": 16}, "vqgan": {"resolution": 16}}
    parts[part][name] = value
    first_stage = {"params": {"embed_dim": 4, "ddconfig": parts["vqgan"]}}
    model = {"unet_config": {"params": parts["unet"]}, "first_stage_config": first_stage, **parts["model"]}
    Path("bad.yaml").write_text(yaml.safe_dump({"model": {"params": model}}))
    error = error_of("convert model.ckpt --output ours --original-config bad.yaml", capsys)
    assert f"--original-config: {name} is {value!r}: " in error


def test_a_number_that_yaml_takes_for_text_is_a_number(diffusion, capsys):
    Path("good.yaml").write_text(
        "model: {params: {linear_start: 1e-4, unet_config: {params: {num_head_channels: 16}}, "
        "first_stage_config: {params: {ddconfig: {resolution: 16}}}, image_size: 8}}"
    )
    main(shlex.split("convert model.ckpt --output ours --original-config good.yaml"))
    assert Path("ours/model_index.json").is_file()


@pytest.mark.parametrize("key", ["_vq_vae.embedding.weight", "_encoder._residual_stack._layers.0._block.1.weight"])
def test_weights_of_another_rank_in_a_small_model_are_named(small, key, capsys):
    torch.save({**small, key: torch.ones(2, 2, 2)}, "bad.pt")
    assert f"mis-shaped: {key} is (2, 2, 2)" in error_of(f"convert bad.pt --output ours {FLAGS}", capsys)


FIRST, NET = "first_stage_model.", "model.diffusion_model."


@pytest.mark.parametrize(
    "key",
    [
        "betas",
        "scale_factor",
        f"{FIRST}quantize.embedding.weight",
        f"{NET}middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    ],
)
def test_weights_of_another_rank_in_an_ldm_are_named(diffusion, key, capsys):
    torch.save({**diffusion, key: torch.ones(2, 2, 2)}, "bad.ckpt")
    flags = LDM_FLAGS.replace("--scaling-factor 1", "") if key == "scale_factor" else LDM_FLAGS
    error = error_of(f"convert bad.ckpt --output ours {flags}", capsys)
    assert f"mis-shaped: {key.removeprefix(NET).removeprefix(FIRST)} is (2, 2, 2)" in error


def test_an_output_that_is_a_dangling_link_is_refused_before_any_work(small, capsys):
    Path("ours").symlink_to("nowhere")
    assert "'ours' exists already" in error_of("convert missing.pt --output ours", capsys)
    assert "'ours' is not a folder" in error_of("convert missing.pt --output ours/new", capsys)
