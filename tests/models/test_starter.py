"""The bundled models: they are small, load in three lines, and draw what they are asked for."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import looc_ldm
from looc_ldm.commands import main as cli
from looc_ldm.images.config import DataConfig
from looc_ldm.images.image_set import load_image_set
from looc_ldm.metrics import evaluate_reconstruction
from looc_ldm.models.loading import load_autoencoder, model_folder
from looc_ldm.models.starter import bundled_models, starter_model
from looc_ldm.pipelines.sampling import sample_images
from looc_ldm.training.data import float_batches
from looc_ldm.utils.errors import ModelError
from tiny import refusal

PER_CLASS = 4
GARMENTS = Path(starter_model("fashion_mnist"))
MOST_MIB = {"fashion_mnist": 12, "flowers": 24}


@pytest.fixture(scope="module")
def images():
    """The bundled validation images of Fashion-MNIST."""
    return load_image_set(DataConfig(path="fashion_mnist", split="validation", resolution=32, fit="pad"), 1)


@pytest.mark.parametrize("name", bundled_models())
def test_it_is_small_and_stored_in_half_precision(name):
    folder = Path(starter_model(name))
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= MOST_MIB[name] * 2**20
    weights = [load_file(file) for file in folder.rglob("*.safetensors")]
    assert len(weights) == 2  # first stage and UNet
    dtypes = {name.startswith("quantize."): set() for part in weights for name in part}
    for part in weights:
        for name, value in part.items():
            if value.is_floating_point():
                dtypes[name.startswith("quantize.")].add(value.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.float16}}  # the codebook decides by small differences


@pytest.mark.parametrize("name", bundled_models())
def test_three_lines_give_images(name):
    pipe = looc_ldm.LooCLDMPipeline.from_pretrained(starter_model(name))
    first = pipe.config.id2label[0]
    drawn = pipe(class_labels=[first, 4], guidance_scale=2.0, num_inference_steps=4).images
    assert [image.size for image in drawn] == [(pipe.vqvae.config.sample_size,) * 2] * 2
    assert pipe.dtype == torch.float32  # the files are half as large, the arithmetic is not half as precise


def test_a_name_chooses_the_model_and_an_unknown_one_is_refused_with_those_there_are():
    assert looc_ldm.starter_model() == looc_ldm.starter_model("flowers")
    assert "fashion_mnist" in bundled_models()
    with pytest.raises(ModelError, match=r"no bundled model 'roses': there are .*fashion_mnist"):
        looc_ldm.starter_model("roses")


def test_most_samples_look_most_like_the_class_that_was_asked_for(images):
    """Told by the nearest mean of real images, which puts a good half of real ones into their class, of ten."""
    pixels = torch.stack([images[i][0] for i in range(len(images))]).flatten(1) / 255
    labels = torch.tensor(images.labels())
    means = torch.stack([pixels[labels == label].mean(0) for label in range(10)])

    def share(drawn: torch.Tensor, of: torch.Tensor) -> float:
        return (torch.cdist(drawn, means).argmin(1) == of).float().mean().item()

    pipe = looc_ldm.LooCLDMPipeline.from_pretrained(GARMENTS)
    asked = torch.arange(10).repeat_interleave(PER_CLASS)
    drawn = sample_images(pipe, asked.tolist(), seed=0, batch_size=40, num_inference_steps=12, guidance_scale=2.0)
    drawn = torch.stack(list(drawn)).flatten(1) / 255
    assert share(drawn, asked) > share(pixels, labels) - 0.05 > 0.5
    spread = torch.stack([drawn[asked == label].std(0).mean() for label in range(10)])
    assert spread.min() > 0.02  # and the samples of one class differ


def test_its_first_stage_keeps_what_images_show(images):
    """Images it was trained on: the bundled ones are a part of its data."""
    model = load_autoencoder("fashion_mnist")
    figures = evaluate_reconstruction(model, float_batches(images), images.content_size, None)
    assert figures["psnr"] > 25
    assert figures["codebook_use"] == 1


def test_the_command_line_knows_them_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["sample", "fashion_mnist", "--labels", "bag", "--images", "2", "--steps", "2", "--output", "out"])
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2
    with Image.open(tmp_path / "out.png") as grid:
        assert grid.size == (64, 32)
    cli.main(["reconstruct", "fashion_mnist", "fashion_mnist", "--split", "validation", "--images", "2"])
    assert "bits per pixel" in capsys.readouterr().out
    assert model_folder("starter") == Path(starter_model())
    error = refusal(capsys, "sample", "roses")
    assert f"'roses': neither bundled (starter, {', '.join(bundled_models())})" in error


@pytest.mark.usefixtures("in_an_empty_folder")
@pytest.mark.parametrize("name", ["starter", "flowers"])
def test_a_folder_of_that_name_comes_first_if_it_holds_a_model(name, pipeline, capsys):
    Path(name, "class").mkdir(parents=True)  # for example a data set
    assert model_folder(name).parent.name == "models"
    shutil.copytree(pipeline, Path(name, "pipeline"))
    assert f"Give '{name}/pipeline'" in refusal(capsys, "sample", name)
    shutil.copytree(pipeline, name, dirs_exist_ok=True)
    assert model_folder(name) == Path(name)
