"""`looc-ldm analyze` as somebody types it."""

import json
import os

import pytest
import torch
from PIL import Image

from looc_ldm import LooCVQModel
from looc_ldm.analysis import collect as module
from looc_ldm.commands.main import main
from looc_ldm.images.pixels import to_float, to_pil
from looc_ldm.models.fingerprint import model_fingerprint
from tiny import noise, refusal, tiny_autoencoder, tiny_pipeline

FIGURES = ["codebook_use", "segment_use", "code_sharing", "embedding"]
FIGURES += ["rate_distortion", "error_map", "examples"]
FILES = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")} | {"analysis.html", "analysis.json"}


@pytest.fixture(scope="module")
def model() -> LooCVQModel:
    return tiny_autoencoder(num_vq_embeddings=32, interpolation_factor=2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, model):
    """The working directory: `model`, and `images`, of which one is grey."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "MOST_VECTORS", 40)
    model.save_pretrained("model")
    (tmp_path / "images").mkdir()
    for i, image in enumerate(noise(4, channels=3)):
        to_pil(image[:1] if i == 1 else image).save(f"images/{i}.png")
    return tmp_path


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
    pixels = noise(4, channels=3)
    pixels[1] = pixels[1, :1]  # the grey image
    codes = model.encode_indices(to_float(pixels))
    assert numbers["counts"] == torch.bincount(codes.flatten(), minlength=32).tolist()
    assert numbers["dead_codes"] == len(numbers["dead"]) == numbers["counts"].count(0)
    assert "4 images" in capsys.readouterr().out


def test_a_single_segment_has_no_figures_of_segments_even_in_the_folder_of_another_analysis(folder):
    main(["analyze", "model", "--data", "images", "--output", "out"])
    tiny_autoencoder(codevector_dim=4).save_pretrained("single")
    main(["analyze", "single", "--data", "images", "--output", "out"])
    assert FILES - set(os.listdir("out")) == {f"{name}.{kind}" for name in FIGURES[1:3] for kind in ("png", "svg")}


def test_two_runs_of_one_command_write_the_same_figures_and_numbers(folder):
    arguments = ["analyze", "model", "--data", "images", "--output", "out", "--seed", "3"]
    main(arguments)
    first = {name: (folder / "out" / name).read_bytes() for name in FILES}
    main(arguments)  # replaces the earlier analysis
    assert {name: (folder / "out" / name).read_bytes() for name in FILES} == first


def test_a_pipeline_and_so_many_images(folder, model):
    tiny_pipeline("unconditional", vqvae=model).save_pretrained("pipeline")
    main(["analyze", "pipeline", "--data", "images", "--images", "1", "--dtype", "bfloat16"])
    numbers = json.loads((folder / "analysis" / "analysis.json").read_text())
    assert numbers["images"] == 1
    assert numbers["dtype"] == "bfloat16"
    assert numbers["fingerprint"] == model_fingerprint(model)  # the stored weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", "--data", "nowhere/at/all"), "nowhere/at/all"),
        (("model", "--data", "empty"), "empty"),
        (("nowhere", "--data", "images"), "no model 'nowhere'"),
        (("model", "--data", "images", "--resolution", "15"), "divisible by 2"),
        (("model", "--data", "images", "--images", "0"), "--images: must be >0, got 0"),
        (("model",), "required: data"),
        (("model", "--data", "images", "--output", "images"), "does not hold an analysis"),
        (("model", "--data", "images", "--output", "images/0.png"), "is not a folder"),
        (("model", "--data", "unreadable"), "2.png"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_leaves_nothing(folder, arguments, message, capsys):
    (folder / "empty").mkdir()
    (folder / "unreadable").mkdir()
    (folder / "unreadable" / "2.png").write_bytes(b"no image")
    assert message in refusal(capsys, "analyze", *arguments)
