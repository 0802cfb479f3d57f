"""`looc-ldm compare` as somebody uses it: several models on the same images, and what stands in the table."""

import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from looc_ldm import LooCVQModel
from looc_ldm.analysis.comparison import (
    Compared,
    comparison_picture,
    difference_factor,
    distinguishing_names,
    markdown_table,
)
from looc_ldm.commands.main import main
from looc_ldm.models.fingerprint import model_fingerprint
from looc_ldm.models.loading import load_autoencoder
from tiny import noise, refusal, tiny_autoencoder

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

FILES = ["comparison.html", "comparison.json", "comparison.md", "comparison.png", "comparison.svg"]
FILES += ["rate_distortion.png", "rate_distortion.svg"]


def save_model(folder: Path, blocks: int, channels: int = 1, fit: str | None = "pad", **settings) -> Path:
    """A random autoencoder of 16x16 images, f = 2 ** (blocks - 1)."""
    settings = {"codevector_dim": 4, "mid_block_add_attention": False, **settings}
    tiny_autoencoder(channels, blocks, seed=len(folder.parent.name), **settings).save_pretrained(folder)
    if fit is not None:
        (folder / "training.json").write_text(json.dumps({"data": {"fit": fit}}))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Three trainings of grey models: `fine` at 2 bits per pixel of 16x16, `coarse` and `wide` at a quarter."""
    runs = tmp_path_factory.mktemp("runs")
    save_model(runs / "fine" / "model", 2, num_vq_embeddings=256)
    save_model(runs / "coarse" / "model", 3, num_vq_embeddings=16)
    save_model(runs / "wide" / "model", 3, num_vq_embeddings=16)
    return runs


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten grey 14x12 images."""
    folder = tmp_path_factory.mktemp("data") / "images"
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (10, 12, 14), np.uint8)):
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def compared(runs, data, tmp_path_factory) -> Path:
    """Return the folder that `looc-ldm compare fine coarse wide fine` writes."""
    output = tmp_path_factory.mktemp("compared") / "results"
    compare(*(runs / name / "model" for name in ("fine", "coarse", "wide", "fine")), data=data, output=output)
    return output


def arguments(*models, data, **options) -> list[str]:
    given = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", *str(value).split())]
    return ["compare", *map(str, models), "--data", str(data), *given]


def compare(*models, data, **options) -> None:
    main(arguments(*models, data=data, **options))


def record(folder: Path) -> dict:
    return json.loads((folder / "comparison.json").read_text())


def table(text: str) -> list[list[str]]:
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


# The table ------------------------------------------------------------------------------------------------------------


def test_models_are_sorted_by_rate_and_those_of_one_rate_stay_in_their_order(compared):
    head, ruler, *rows = table((compared / "comparison.md").read_text())
    assert [row[0] for row in rows] == ["coarse", "wide", "fine", "fine (2)"]
    rates = [float(row[head.index("bits/pixel ↓")]) for row in rows]
    assert rates == sorted(rates)
    assert rates[0] == rates[1] < rates[2]
    assert all(re.fullmatch("-+:?", cell) for cell in ruler)


def test_bits_and_figures_are_of_the_images_without_their_padding_and_the_same_for_the_same_model(compared):
    coarse, _, fine, again = record(compared)["models"]
    assert (coarse["height"], coarse["width"]) == (12, 14)
    assert coarse["bits_per_pixel"] == 4 * 4 * 4 / (12 * 14)
    assert fine["bits_per_pixel"] == 8 * 8 * 8 / (12 * 14)
    assert fine.pop("name") != again.pop("name")
    assert fine == again


def test_figures_are_those_of_evaluate_reconstruction(compared, runs, data):
    model = runs / "coarse" / "model"
    main(["evaluate", "reconstruction", str(model), "--data", str(data), "--output", "figures.json"])
    alone = json.loads(Path("figures.json").read_text())
    together = record(compared) | record(compared)["models"][0]
    assert [together[name] for name in ("data", "split", "fit")] == [alone[name] for name in ("data", "split", "fit")]
    figures = [name for name in alone if isinstance(alone[name], int | float) and name != "processes"]
    assert {"psnr", "ssim", "l1", "bits_per_pixel", "codebook_use"} <= set(figures)
    for name in figures:
        assert together[name] == pytest.approx(alone[name], rel=1e-6), name
    assert together["fingerprint"] == alone["fingerprints"]["vqvae"] == model_fingerprint(load_autoencoder(str(model)))


def test_codecs_see_what_is_measured_of_the_models(compared, data, runs):
    from looc_ldm.analysis.rate_distortion import codec_curve

    images = [torch.from_numpy(np.array(PIL.Image.open(file)))[None] for file in sorted(data.iterdir())]
    stored = record(compared)["codecs"]["webp"]
    assert record(compared)["codec_images"] == 10
    expected = codec_curve(images, "webp")
    assert [point["bits_per_pixel"] for point in stored] == [point.bits_per_pixel for point in expected]


def test_the_terminal_shows_the_table_and_on_what_it_was_measured(runs, data, capsys):
    compare(runs / "coarse" / "model", data=data, images=3, output="results")
    printed, page, html = (
        capsys.readouterr().out,
        *(Path(f"results/comparison.{kind}").read_text() for kind in ("md", "html")),
    )
    assert table(printed) == table(page) == table(re.sub("</?pre[^>]*>", "\n", html))
    assert html.count("data:image/svg+xml") == 2
    for text in (printed, page, html):
        assert f"images: 3 of {data}, split train, 16x16, fit=pad" in text
        assert "on the 14x12 pixels inside the padding" in text
        assert "--inception-weights" in text  # the option for a figure that was not measured
    assert "looc-ldm compare" in page


def test_the_first_model_decides_how_images_become_square_unless_that_is_given(runs, data, tmp_path):
    cropping = save_model(tmp_path / "cropping" / "model", 3, fit="random_crop")
    for models, options, expected in (
        ([cropping, runs / "coarse" / "model"], {}, ("crop", 16)),
        ([runs / "coarse" / "model", cropping], {"fit": "adm", "resolution": 24}, ("adm", 24)),
    ):
        compare(*models, data=data, output="results", images=1, **options)
        found = record(Path("results"))
        assert (found["fit"], found["resolution"]) == expected
        assert {model["images"] for model in found["models"]} == {1}
    assert (
        "trained at a different resolution: coarse (16x16), cropping (16x16)"
        in Path("results/comparison.md").read_text()
    )


def test_psnr_is_measured_whatever_else_is(runs, data):
    compare(runs / "coarse" / "model", data=data, metrics="l1", output="results", names="mine")
    (model,) = record(Path("results"))["models"]
    assert model["name"] == "mine"
    assert {"psnr", "l1"} <= set(model)
    assert "ssim" not in model


def test_figures_that_depend_on_features_have_a_column_that_names_them():
    figures = {"bits_per_pixel": 1.0, "rfid@768": 12.3456, "unknown": 1}
    head, _, row = table(markdown_table([Compared("a|b", figures, torch.zeros(0))]).replace("\\|", "/"))
    assert head == ["model", "bits/pixel ↓", "rFID@768 ↓"]
    assert row == ["a/b", "1.000", "12.346"]


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["runs/a/model", "runs/b/model"], ["a", "b"]),
        (["runs/a/model", "runs/b/pipeline"], ["a", "b"]),
        (["runs/a/model", "other/a/model"], ["runs/a/model", "other/a/model"]),
        (["runs/a/model", "runs/a/pipeline"], ["runs/a/model", "runs/a/pipeline"]),
        (["user/looc"], ["looc"]),
        (["me/looc", "you/looc"], ["me/looc", "you/looc"]),
        (["runs/a/model", "./runs/a/model/"], ["a", "a (2)"]),
    ],
)
def test_models_have_short_names_if_these_tell_them_apart(models, names, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for model in models:
        if model.count("/") > 1:
            Path(model).mkdir(parents=True, exist_ok=True)
    assert distinguishing_names(models) == names


# The pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 1])
def test_the_picture_holds_originals_reconstructions_and_amplified_differences(channels):
    originals, decoded = (noise(2, channels, 20, 28, seed) for seed in (0, 1))
    models = [Compared("a", {"bits_per_pixel": 1.0, "psnr": 20.0}, decoded)]
    picture = comparison_picture(originals, models, factor=4)
    difference = ((originals.int() - decoded.int()).abs() * 4).clamp(max=255)
    shown = [axes.images[0].get_array() for axes in picture.figure.axes]
    for pixels, image in zip(shown, torch.cat([originals, decoded, difference]), strict=True):
        assert np.array_equal(pixels, image.expand(3, -1, -1).permute(1, 2, 0))
    assert b"difference \xc3\x97 4" in picture.svg()


def test_differences_are_amplified_as_far_as_the_middle_model_is_clipped_little():
    originals = torch.full((1, 1, 20, 20), 100, dtype=torch.uint8)
    exact, near, far = (Compared("", {}, originals + difference) for difference in (0, 30, 120))
    assert [difference_factor(originals, [model]) for model in (exact, near, far)] == [16, 8, 2]
    assert difference_factor(originals, [exact, near, far]) == 8  # one factor for all
    assert difference_factor(originals, [near, far]) == 2
    far.reconstructions[..., 2:, :] = 100  # but for 10 %
    assert difference_factor(originals, [far]) == 2
    far.reconstructions[..., 4:] = 100  # but for 2 %
    assert difference_factor(originals, [far]) == 16


def test_all_files_are_there_and_the_same_comparison_gives_the_same_files(compared, runs, data):
    assert sorted(file.name for file in compared.iterdir()) == FILES
    compare(*(runs / name / "model" for name in ("fine", "coarse", "wide", "fine")), data=data, output="again")
    for name in FILES[3:]:
        assert (compared / name).read_bytes() == Path("again", name).read_bytes(), name


def test_more_images_than_there_are_are_not_asked_for(runs, data):
    compare(runs / "coarse" / "model", data=data, show=100, images=100, codec_images=2, output="results")
    found = record(Path("results"))
    assert (found["models"][0]["images"], found["codec_images"]) == (10, 2)
    assert "codecs over 2 of the images" in Path("results/comparison.md").read_text()


# Refusals -------------------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_compared_are_named_before_anything_is_computed(
    runs, data, tmp_path, capsys, monkeypatch
):
    coarse, fine = runs / "coarse" / "model", runs / "fine" / "model"
    colour = save_model(tmp_path / "colour" / "model", 2, channels=3)

    def compute(*_):
        raise AssertionError("something was computed")

    monkeypatch.setattr(LooCVQModel, "encode", compute)
    assert str(tmp_path / "missing") in refusal(capsys, *arguments(coarse, tmp_path / "missing", data=data))
    line = refusal(capsys, *arguments(coarse, colour, data=data))
    assert f"{str(coarse)!r} takes images of 1 channels and {str(colour)!r} of 3" in line
    line = refusal(capsys, *arguments(fine, coarse, data=data, resolution=18))
    assert str(coarse) in line
    assert "multiple of 4, not 18x18" in line


def test_bad_options_are_refused_in_a_line(runs, data, tmp_path, capsys):
    model = runs / "coarse" / "model"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no images" in refusal(capsys, *arguments(model, data=empty))
    assert "2 names to 1 models" in refusal(capsys, *arguments(model, data=data, names="a b"))
    assert "must be >0" in refusal(capsys, *arguments(model, data=data, images=0))
    assert "--metrics" in refusal(capsys, *arguments(model, data=data, metrics="psnr fid"))
    (tmp_path / "file").write_text("")
    assert "not a folder" in refusal(capsys, *arguments(model, data=data, output=tmp_path / "file"))
