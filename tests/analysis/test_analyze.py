"""`looc-ldm analyze` as somebody types it."""

import json
import os

import pytest
import torch
import torch.nn as nn
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image

from looc_ldm import LooCLDMPipeline, LooCVQModel
from looc_ldm.analysis import collect as module
from looc_ldm.cli import main
from looc_ldm.fingerprint import model_fingerprint
from looc_ldm.images import to_float

FIGURES = (
    "codebook_use",
    "segment_use",
    "code_sharing",
    "embedding",
    "rate_distortion",
    "error_map",
    "examples",
    "codes",
)
FILES = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")} | {"analysis.html", "analysis.json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LooCVQModel:
    torch.manual_seed(0)
    model = LooCVQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=32,
        codevector_dim=2,
        sample_size=16,
    )
    nn.init.normal_(model.quantize.embedding.weight)
    return model.eval()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, model):
    """The working directory: `model`, and `images`, of which one is grey."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "MOST_VECTORS", 40)
    model.save_pretrained("model")
    (tmp_path / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(4):
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels[..., 0] if i == 1 else pixels).save(f"images/{i}.png")
    return tmp_path


def error_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["analyze", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_it_writes_every_figure_the_page_and_the_numbers(folder, model, capsys):
    main(["analyze", "model", "--data", "images", "--output", "out"])
    assert set(os.listdir("out")) == FILES
    for name in FIGURES:
        Image.open(f"out/{name}.png").load()
        assert "<text" in (folder / "out" / f"{name}.svg").read_text()
    numbers = json.loads((folder / "out" / "analysis.json").read_text())
    assert numbers["images"] == 4
    assert numbers["fingerprint"] == model_fingerprint(model)
    assert numbers["command"] == "looc-ldm analyze model --data images --output out"
    assert {"torch", "scikit-learn", "matplotlib"} <= set(numbers["versions"])
    assert numbers["seed"] == 0
    assert numbers["data"] == "images"
    pixels = [to_float(_pixels(f"images/{i}.png")) for i in range(4)]
    codes = model.encode_indices(torch.stack(pixels))
    assert numbers["counts"] == torch.bincount(codes.flatten(), minlength=32).tolist()
    assert numbers["dead_codes"] == len(numbers["dead"]) == numbers["counts"].count(0)
    assert "4 images" in capsys.readouterr().out


def _pixels(file: str) -> torch.Tensor:
    image = Image.open(file).convert("RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1)


def test_two_runs_of_one_command_write_the_same_figures_and_numbers(folder):
    arguments = ["analyze", "model", "--data", "images", "--output", "out", "--seed", "3"]
    main(arguments)
    first = {name: (folder / "out" / name).read_bytes() for name in FILES}
    main(arguments)  # replaces the earlier analysis
    assert {name: (folder / "out" / name).read_bytes() for name in FILES} == first


def test_a_pipeline_and_so_many_images(folder, model):
    unet = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        norm_num_groups=4,
    )
    model.register_to_config(scaling_factor=1.0)
    LooCLDMPipeline(model, unet, DDIMScheduler(clip_sample=False)).save_pretrained("pipeline")
    main(["analyze", "pipeline", "--data", "images", "--images", "1", "--dtype", "bfloat16"])
    numbers = json.loads((folder / "analysis" / "analysis.json").read_text())
    assert numbers["images"] == 1
    assert numbers["dtype"] == "bfloat16"
    assert numbers["fingerprint"] == model_fingerprint(model)  # of the weights as they are stored


def test_a_folder_that_holds_something_else_is_not_spoiled(folder, capsys):
    assert "something else than an analysis" in error_of(capsys, "model", "--data", "images", "--output", "images")
    assert sorted(os.listdir("images")) == ["0.png", "1.png", "2.png", "3.png"]
    assert "is not a folder" in error_of(capsys, "model", "--data", "images", "--output", "images/0.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", "--data", "nowhere/at/all"), "nowhere/at/all"),
        (("model", "--data", "empty"), "empty"),
        (("nowhere", "--data", "images"), "no model 'nowhere'"),
        (("model", "--data", "images", "--resolution", "15"), "divisible by 2"),
        (("model", "--data", "images", "--images", "0"), "must be a positive whole number"),
        (("model",), "--data"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_leaves_nothing(folder, arguments, message, capsys):
    (folder / "empty").mkdir()
    assert message in error_of(capsys, *arguments)
    assert not (folder / "analysis").exists()


def test_an_image_that_cannot_be_read_is_named(folder, capsys):
    (folder / "images" / "2.png").write_bytes(b"no image")
    assert "2.png" in error_of(capsys, "model", "--data", "images")
    assert not (folder / "analysis").exists()
