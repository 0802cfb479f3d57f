"""`looc-ldm evaluate` as somebody types it: what it measures, says and keeps, and what it refuses before any work."""

import json
import os
import shutil
from pathlib import Path
from urllib.error import URLError

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

import looc_ldm
from looc_ldm.commands.main import main
from looc_ldm.metrics import extractors
from looc_ldm.metrics.collect import FeatureCollector
from tiny import refusal, run

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture(scope="module", autouse=True)
def networks_are_built_once():
    """Keep the networks of all commands here. Building one and reading its 95 MB takes a second, twice per command."""
    build, built = extractors._torch_fidelity_network, {}

    def build_once(kind, name, layers, weights, title):
        file = Path(weights or "").resolve()
        if not file.is_file():
            return build(kind, name, layers, weights, title)
        key = (kind, *layers, file, file.stat().st_mtime_ns)
        if key not in built:
            built[key] = build(kind, name, layers, weights, title)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractors, "_torch_fidelity_network", build_once)
        yield


@pytest.fixture
def network(untrained_inception) -> list[str]:
    """Options of a feature network that is quick."""
    return ["--inception-weights", str(untrained_inception), "--feature-layer", "64"]


def measured(capsys, *arguments) -> dict:
    """The record that a command writes."""
    run(capsys, "evaluate", *arguments, "--output", "figures.json")
    return json.loads(Path("figures.json").read_text())


def write_images(folder: str, counts: dict[str, int], size: tuple[int, int] = (14, 14), seed: int = 0) -> str:
    """So many RGB images in each sub-folder."""
    random = np.random.default_rng(seed)
    for name, count in counts.items():
        Path(folder, name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = random.integers(0, 256, (*size[::-1], 3), np.uint8)
            PIL.Image.fromarray(pixels).save(Path(folder, name, f"{i}.png"))
    return folder


def figures_of(record: dict) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, float)}


# Reconstruction -------------------------------------------------------------------------------------------------------


def test_images_cropped_at_random_in_training_are_cropped_at_the_centre_to_be_measured(pipeline, image_folder, capsys):
    folder = Path(pipeline).parent / "cropped"
    shutil.copytree(pipeline, folder)
    (folder / "training.json").write_text(json.dumps({"data": {"fit": "random_crop"}}))
    figures = {}
    for model, fit in ((folder, []), (pipeline, ["--fit", "random_crop"]), (pipeline, ["--fit", "crop"])):
        record = measured(capsys, "reconstruction", model, "--data", image_folder, *fit)
        figures[str(model), *fit] = {name: record[name] for name in ("fit", "psnr", "images")}
    assert len({json.dumps(each) for each in figures.values()}) == 1
    assert record["fit"] == "crop"


def test_evaluate_reconstruction_prints_quality_beside_rate_and_keeps_the_command(pipeline, image_folder, capsys):
    arguments = ["evaluate", "reconstruction", pipeline, "--data", image_folder, "--output", "new/a figure.json"]
    printed = run(capsys, *arguments)
    figures = json.loads(Path("new/a figure.json").read_text())
    assert figures["images"] == 12
    assert figures["bits_per_pixel"] == 2
    assert f"{'psnr':24} {figures['psnr']:.4f}" in printed
    assert f"{'bits_per_pixel':24} 2.0000" in printed
    assert figures["command"] == f"looc-ldm {' '.join(arguments[:-1])} 'new/a figure.json'"
    assert figures["version"] == looc_ldm.__version__
    assert [path.name for path in Path("new").iterdir()] == ["a figure.json"]


def test_a_few_images_are_taken_from_all_over_the_set(pipeline, image_folder, capsys):
    def psnr(*options):
        return measured(capsys, "reconstruction", pipeline, *options)["psnr"]

    # The folder is sorted by class: its first, middle and last images are the first circle, a square and the last 7.
    names = sorted(path for path in Path(image_folder).rglob("*.png"))
    Path("three").mkdir()
    shutil.copy(names[0], "three/0.png")
    shutil.copy(names[6], "three/1.png")
    shutil.copy(names[11], "three/2.png")
    assert psnr("--data", image_folder, "--images", 3) == pytest.approx(psnr("--data", "three"), abs=1e-3)


def test_evaluate_generation_prints_fid_and_kid_beside_the_rate(pipeline, image_folder, network, capsys):
    evaluate = ["evaluate", "generation", pipeline, "--data", image_folder, "--output", "figures.json", *network]
    printed = run(capsys, *evaluate, "--images", 6, "--steps", 1, "--guidance-scale", 1.5)
    figures = json.loads(Path("figures.json").read_text())
    assert (figures["images_first"], figures["images_second"]) == (6, 12)
    assert figures["fid@64"] > 0
    assert (figures["bits_per_pixel"], figures["num_inference_steps"], figures["guidance_scale"]) == (2, 1, 1.5)
    assert f"{'fid@64':24} {figures['fid@64']:.4f}" in printed


def test_the_record_says_what_is_needed_to_repeat_the_figures(pipeline, image_folder, network, capsys):
    record = measured(capsys, "reconstruction", pipeline, "--data", image_folder, *network)
    assert {"psnr", "ssim", "l1", "rfid@64", "kid@64", "kid_std@64", "dead_codes", "code_entropy"} <= record.keys()
    assert record["protocol"] == "clean"
    assert len(record["weights"]["inception"]["sha256"]) == 64
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["seeds"] == {"kid": 2020}
    assert record["fingerprints"].keys() == {"vqvae"}
    assert (record["data"], record["split"], record["fit"]) == (image_folder, "train", "crop")
    head, rule, row = record["markdown"].splitlines()
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert len(rule.split(" | ")) == len(cells)
    assert cells["psnr"] == f"{record['psnr']:.4g}"
    assert cells["protocol"] == "clean"


def test_what_is_not_measured_is_said_with_the_option_that_changes_it(pipeline, image_folder, capsys):
    printed = run(capsys, "evaluate", "reconstruction", pipeline, "--data", image_folder)
    for names, option in (
        ("lpips_vgg", "--lpips-vgg-weights FILE"),
        ("lpips_alex", "--lpips-alex-weights FILE"),
        ("rfid, kid", "--inception-weights FILE"),
    ):
        assert f"not measured: {names} (give {option}, or --metrics {names.replace(',', '')} to download" in printed
    assert "not measured" not in run(
        capsys, "evaluate", "reconstruction", pipeline, "--data", image_folder, "--metrics", "l1"
    )


def test_only_the_named_figures_are_measured(pipeline, image_folder, capsys):
    record = measured(capsys, "reconstruction", pipeline, "--data", image_folder, "--metrics", "l1", "psnr")
    assert {"l1", "psnr", "bits_per_pixel", "perplexity"} <= record.keys()
    assert not {"ssim", "rfid@2048"} & record.keys()


def test_the_paper_protocol_measures_jpegs(pipeline, image_folder, network, capsys):
    arguments = ["reconstruction", pipeline, "--data", image_folder, *network]
    clean, paper = (measured(capsys, *arguments, "--protocol", name) for name in ("clean", "paper"))
    assert paper["protocol"] == "paper"
    assert paper["weights"]["inception"]["pil_resize"] == 229
    assert paper["psnr"] != clean["psnr"]
    assert paper["perplexity"] == clean["perplexity"]


def test_a_metric_whose_weights_cannot_be_had_is_refused_before_anything_is_computed(
    pipeline, image_folder, monkeypatch, capsys
):
    def no_network(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", no_network)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    monkeypatch.setattr("looc_ldm.commands.shared.load_autoencoder", lambda *args: pytest.fail("the model was loaded"))
    command = ["reconstruction", pipeline, "--data", image_folder, "--metrics"]
    assert "--inception-weights" in refusal(capsys, "evaluate", *command, "rfid")
    assert "--lpips-vgg-weights" in refusal(capsys, "evaluate", *command, "lpips_vgg")
    assert "--lpips-alex-weights" in refusal(capsys, "evaluate", *command, "psnr", "lpips_alex")
    assert "--inception-weights" in refusal(capsys, "evaluate", "generation", pipeline, "--reference", image_folder)
    for metric, option in (("fd@dinov2", "--dinov2"), ("cmmd", "--clip")):
        arguments = ["--metrics", metric, option, "no/such/folder/here"]
        assert option in refusal(capsys, "evaluate", "generation", pipeline, "--reference", image_folder, *arguments)


def test_a_few_reconstructions_are_called_biased(pipeline, image_folder, network, capsys):
    printed = run(capsys, "evaluate", "reconstruction", pipeline, "--data", image_folder, *network)
    assert "warning: rfid@64 is measured on 12 images, fewer than its 64 features" in printed


# Generation: where samples come from ---------------------------------------------------------------------------------


def test_an_npz_of_samples_has_the_figures_of_the_folder_it_was_exported_from(network, capsys):
    fakes, reals = write_images("fakes", {"a": 5, "b": 5}), write_images("reals", {"a": 6, "b": 6}, seed=1)
    metrics = ["--metrics", "fid", "kid", "precision_recall", "class_fid"]
    from_folder = measured(
        capsys, "generation", fakes, "--reference", reals, *network, *metrics, "--export-npz", "new/fakes.npz"
    )
    from_npz = measured(capsys, "generation", "new/fakes.npz", "--reference", reals, *network, *metrics)
    assert figures_of(from_npz) == pytest.approx(figures_of(from_folder), rel=1e-9)
    assert from_folder["fid@64"] > 0
    stored = np.load("new/fakes.npz")
    assert (stored["arr_0"].shape, stored["arr_0"].dtype) == ((10, 14, 14, 3), np.uint8)
    assert stored["arr_1"].tolist() == [0] * 5 + [1] * 5
    first = np.asarray(PIL.Image.open("fakes/a/0.png"))
    assert np.array_equal(stored["arr_0"][0], first)


def test_samples_that_a_model_draws_are_exported_as_they_are_measured(pipeline, image_folder, network, capsys):
    draw = ["generation", pipeline, "--reference", image_folder, *network, "--images", 7, "--steps", 1]
    drawn = measured(capsys, *draw, "--export-npz", "drawn.npz")
    stored = np.load("drawn.npz")
    assert stored["arr_0"].shape == (7, 16, 16, 3)
    assert stored["arr_1"].tolist() == [2, 2, 2, 0, 0, 1, 1]  # the folder's 7, circle, square, as the model has them
    again = measured(capsys, "generation", "drawn.npz", "--reference", image_folder, *network)
    assert again["fid@64"] == pytest.approx(drawn["fid@64"], rel=1e-6)
    assert drawn["seeds"] == {"samples": 0, "kid": 2020}


def test_grey_alpha_and_palette_samples_count_as_what_a_viewer_shows(network, capsys):
    write_images("reals", {"": 6}, seed=1)
    write_images("fakes", {"": 4})
    Path("others").mkdir()
    for i, file in enumerate(sorted(Path("fakes").glob("*.png"))):
        PIL.Image.open(file).convert("L").save(file)
        grey = PIL.Image.open(file)
        kinds = [grey, grey.convert("RGB"), grey.convert("RGBA"), grey.convert("P")]
        kinds[i].save(Path("others", file.name))
    assert {PIL.Image.open(file).mode for file in Path("others").iterdir()} == {"L", "RGB", "RGBA", "P"}
    fids = [
        measured(capsys, "generation", name, "--reference", "reals", *network)["fid@64"] for name in ("fakes", "others")
    ]
    assert fids[0] == pytest.approx(fids[1], rel=1e-9)


def test_samples_of_several_sizes_are_refused_with_two_of_them_named(network, capsys):
    write_images("fakes", {"a": 3})
    write_images("fakes", {"b": 1}, size=(15, 14))
    write_images("reals", {"": 4})
    command = ["generation", "fakes", "--reference", "reals", "--fit", "crop", "--no-cache", *network]
    message = refusal(capsys, "evaluate", *command)
    assert "b/0.png is 15x14 and " in message
    assert "a/0.png 14x14: samples must have one size" in message


def test_real_images_of_several_sizes_are_brought_to_that_of_the_samples(network, capsys):
    write_images("fakes", {"": 4})
    write_images("reals", {"a": 3}, size=(20, 30))
    write_images("reals", {"b": 3}, size=(40, 15))
    assert measured(capsys, "generation", "fakes", "--reference", "reals", *network)["images_second"] == 6


def test_samples_that_are_not_of_the_size_of_the_real_images_are_pointed_out(network, capsys):
    write_images("fakes", {"": 4})
    write_images("reals", {"": 4}, size=(28, 28))
    command = ["evaluate", "generation", "fakes", "--reference", "reals", *network]
    assert "warning: samples of 14x14 are compared with images of 28x28" in run(capsys, *command, "--resolution", 28)
    assert "are compared with" not in run(capsys, *command)


def test_the_real_images_that_are_read_are_counted_and_can_be_fewer(network, capsys):
    fakes, reals = write_images("fakes", {"": 4}), write_images("reals", {"a": 4, "b": 4}, seed=1)
    command = ["evaluate", "generation", fakes, "--reference", reals, *network]
    main([*command, "--output", "all.json"])
    assert (
        "reading 8 real images to compare the samples with (--reference-images N reads fewer)"
        in capsys.readouterr().err
    )
    main([*command, "--reference-images", "6", "--output", "few.json"])
    assert "reading 6 real images" in capsys.readouterr().err
    everything, few = (json.loads(Path(name).read_text()) for name in ("all.json", "few.json"))
    assert (everything["images_second"], few["images_second"]) == (8, 6)
    assert few["fid@64"] != everything["fid@64"]
    assert few["reference"] != everything["reference"]
    main(command)
    assert "reading" not in capsys.readouterr().err  # their features were kept


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generation MODEL", "required: data"),
        ("generation MODEL --data DATA --protocol papr", "one of clean, paper, got 'papr'"),
        ("reconstruction MODEL --data DATA --protocol papr", "one of clean, paper, got 'papr'"),
        ("generation MODEL --data DATA --metrics fid@vgg", "got 'fid@vgg'"),
        ("reconstruction MODEL --data DATA --metrics fid", "got 'fid'"),
        ("generation MODEL --data DATA --inception-weights no.pth", "no.pth"),
        ("generation MODEL --data DATA INCEPTION --images 1", "at least 2 samples and real images, got 1"),
        (
            "generation flat --data DATA INCEPTION --metrics precision_recall",
            "at least 4 samples and real images, got 2",
        ),
        ("generation MODEL --data flat INCEPTION --metrics precision_recall", "real images, got 10000 and 2"),
        ("generation MODEL --data DATA INCEPTION --cache file", "'file' is not a folder"),
        ("generation MODEL --data DATA INCEPTION --export-npz file/x.npz", "'file' is not a folder"),
        ("generation MODEL --data empty INCEPTION", "no images in the folder empty"),
        ("generation empty --data DATA INCEPTION", "no images in the folder empty"),
        ("reconstruction MODEL --data empty", "no images in the folder empty"),
        ("generation DATA --data DATA INCEPTION --images 5", "--images does not go with"),
        ("generation no.npz --data DATA INCEPTION", "no file 'no.npz'"),
        ("generation text.npz --data DATA INCEPTION", "cannot read 'text.npz'"),
        ("generation statistics.npz --data DATA INCEPTION", "only statistics, no samples"),
        ("generation MODEL --data statistics.npz INCEPTION", "fid needs the images of the reference"),
        ("generation MODEL --data statistics.npz INCEPTION --fit adm", "--fit does not go with"),
        (
            "generation MODEL --data statistics.npz INCEPTION --reference-images 4",
            "--reference-images does not go with",
        ),
        ("generation flat --data DATA INCEPTION --metrics class_fid", "samples have no classes"),
        ("generation DATA --data flat INCEPTION --metrics class_fid", "reference has no classes"),
        ("generation zoo --data DATA INCEPTION --metrics class_fid", "has no class 'ape'"),
        ("generation partly.npz --data DATA INCEPTION --metrics class_fid", "samples have images without a class"),
        ("generation MODEL --data partly.npz INCEPTION --metrics class_fid", "reference has images without a class"),
        ("generation MODEL --data zoo INCEPTION --metrics class_fid", "different classes"),
        ("generation MODEL --data DATA INCEPTION --metrics memorization", "memorization needs --training-data"),
        ("generation flat --data DATA INCEPTION --metrics memorization", "memorization needs --training-data"),
        ("generation MODEL --data DATA INCEPTION --training-data flat", "serves --metrics memorization only"),
        ("generation zoo --data DATA INCEPTION --metrics memorization --training-data empty", "no images in"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2_with_nothing_written(
    command, message, pipeline, image_folder, network, capsys
):
    Path("file").write_text("not a folder")
    Path("text.npz").write_text("not a zip")
    Path("empty").mkdir()
    np.savez("statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez("partly.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8), arr_1=[0, 1, 2, -1])
    write_images("flat", {"": 2})
    write_images("zoo", {"ape": 2, "bee": 2, "cat": 2, "dog": 2})
    for name, value in (("MODEL", pipeline), ("DATA", image_folder), ("INCEPTION", " ".join(network))):
        command = command.replace(name, value)
    assert message in refusal(capsys, "evaluate", *command.split())


# Generation: figures -------------------------------------------------------------------------------------------------


def test_copies_of_training_images_are_counted_and_shown(network, capsys):
    known = write_images("known", {"a": 8, "b": 8})
    held_out = write_images("held_out", {"a": 8, "b": 8}, seed=1)
    shutil.copytree(Path(known, "a"), "samples/a")
    write_images("samples/new", {"": 8}, seed=2)
    for i in range(2):  # photographs that are in both splits
        shutil.copy(Path(known, "b", f"{i}.png"), Path(held_out, "b", f"copied_{i}.png"))
    command = ["generation", "samples", "--data", held_out, *network, "--metrics", "memorization"]
    record = measured(capsys, *command, "--training-data", known)
    assert record["copies@64"] >= 0.5
    assert 0 < record["copies_held_out@64"] <= 2 / 16
    found = record["memorization"]
    assert (found["training_images"], found["held_out_images"], found["duplicates"]) == (16, 16, 2)
    assert found["closest"][0]["distance"] < 1e-3 * found["threshold"]
    assert {Path(pair["name"]).name for pair in found["closest"][:8]} == {f"{i}.png" for i in range(8)}
    assert "2 real images that are training images" in " ".join(record["notes"])
    assert "data:image/svg+xml" in Path("figures.html").read_text()
    with PIL.Image.open("figures.png") as picture:
        assert picture.width > picture.height > 0


def test_a_model_knows_its_training_images_and_which_were_held_out(pipeline, image_folder, network, capsys):
    shutil.copytree(pipeline, "pipeline")
    data = {"path": image_folder, "split": "train", "validation_split": None, "validation_images": 4, "fit": "crop"}
    Path("pipeline/training.json").write_text(json.dumps({"data": data, "training_images": 8}))
    command = ["generation", "pipeline", "--data", image_folder, "--split", "validation", *network]
    command += ["--metrics", "memorization", "--images", "4", "--steps", "1"]
    record = measured(capsys, *command)
    assert record["memorization"]["training_images"] == 8
    assert (record["memorization"]["held_out_images"], record["memorization"]["duplicates"]) == (4, 0)
    assert record["training_split"] == "train, without those held out"
    assert len(record["memorization"]["closest"]) == 4


def test_class_fid_names_the_classes_that_are_too_small(network, capsys):
    fakes, reals = (
        write_images("fakes", {"a": 3, "b": 2, "c": 1}),
        write_images("reals", {"a": 4, "b": 4, "c": 4}, seed=1),
    )
    command = ["generation", fakes, "--reference", reals, *network, "--metrics", "class_fid"]
    record = measured(capsys, *command)
    assert record["class_fid"]["per_class"].keys() == {"a", "b"}
    assert record["class_fid_classes"] == 2
    assert record["class_fid@64"] == pytest.approx(sum(record["class_fid"]["per_class"].values()) / 2)
    assert record["class_fid"]["biased"] == {"a": 3, "b": 2}
    printed = run(capsys, "evaluate", *command)
    assert "warning: class_fid leaves out c (1 generated and 4 reference images" in printed
    assert "warning: class_fid uses classes with fewer images than the 64 features: b (2), a (3)\n" in printed


def test_classes_are_matched_by_name_and_not_by_place(network, capsys):
    reals = write_images("reals", {"a": 4, "b": 4, "c": 4}, seed=1)
    shutil.copytree("reals", "some")
    shutil.rmtree("some/a")  # b and c are now the first and the second
    command = ["generation", "some", "--reference", reals, *network, "--metrics", "class_fid"]
    record = measured(capsys, *command)
    assert record["class_fid"]["per_class"] == pytest.approx({"b": 0, "c": 0}, abs=1e-6)
    assert record["class_fid"]["skipped"].keys() == {"a"}


def test_each_class_is_drawn_in_its_share_of_the_reference(pipeline, network, capsys):
    write_images("reals", {"circle": 6, "square": 2, "7": 4})
    draw = ["generation", pipeline, "--reference", "reals", *network, "--images", 6, "--steps", 1]
    run(capsys, "evaluate", *draw, "--export-npz", "drawn.npz")
    labels = np.load("drawn.npz")["arr_1"].tolist()  # the model's: circle, square, 7
    assert [labels.count(label) for label in range(3)] == [3, 1, 2]


def test_other_classes_than_the_models_are_said_and_all_of_the_models_are_drawn(pipeline, network, capsys):
    write_images("zoo", {"ape": 2, "bee": 2})
    draw = ["evaluate", "generation", pipeline, "--reference", "zoo", *network, "--images", 6, "--steps", 1]
    assert "the reference does not have the model's classes" in run(capsys, *draw, "--export-npz", "drawn.npz")
    assert np.load("drawn.npz")["arr_1"].tolist() == [0, 0, 1, 1, 2, 2]
    # As many, under names that the model has not: by number they would be compared with strangers.
    write_images("zoo", {"cow": 2})
    assert "the reference does not have the model's classes" in run(capsys, *draw)


def test_what_sample_has_drawn_is_measured_with_its_classes(pipeline, network, capsys):
    reals = write_images("reals", {"circle": 4, "square": 4, "7": 4}, (16, 16))
    run(capsys, "sample", pipeline, "--images", 3, "--steps", 1, "--output", "drawn")
    record = measured(capsys, "generation", "drawn", "--reference", reals, *network, "--metrics", "fid", "class_fid")
    assert record["images_first"] == 9
    assert record["class_fid"]["per_class"].keys() == {"circle", "square", "7"}


def test_samples_are_never_read_by_splits(network, capsys):
    write_images("fakes", {"bus": 3, "test": 3, "train": 3})
    command = ["generation", "fakes", "--reference", write_images("reals", {"": 4}), *network, "--metrics", "fid"]
    assert measured(capsys, *command, "--no-cache")["images_first"] == 9
    assert not Path("cache").exists()


def test_statistics_of_other_features_are_refused_before_anything_is_written(pipeline, untrained_inception, capsys):
    np.savez("published.npz", mu=np.zeros(64), sigma=np.eye(64))
    command = ["generation", pipeline, "--reference", "published.npz", "--metrics", "fid", "--images", 2]
    command += ["--inception-weights", untrained_inception, "--steps", 1, "--export-npz", "drawn.npz"]
    assert "fid needs the images of the reference" in refusal(capsys, "evaluate", *command)


def test_the_inception_score_and_published_statistics(network, capsys):
    write_images("fakes", {"": 10})
    write_images("reals", {"": 4}, seed=1)
    images = measured(capsys, "generation", "fakes", "--reference", "reals", *network, "--metrics", "is", "fid")
    assert images["is"] >= 1

    (file,) = Path("cache").iterdir()
    rows = load_file(file)["moments.rows"].numpy()
    statistics = {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}
    np.savez("published.npz", **statistics)
    others = np.random.default_rng(2).integers(0, 256, (5, 14, 14, 3), np.uint8)
    np.savez("batch.npz", others, **statistics)
    command = ["generation", "fakes", *network, "--metrics", "fid"]
    published = measured(capsys, *command, "--reference", "published.npz")
    batch = measured(capsys, *command, "precision_recall", "--reference", "batch.npz")
    for record in (published, batch):
        assert record["fid@64"] == pytest.approx(images["fid@64"], rel=1e-4)
        assert "stored in the reference" in record["fid_reference"]
    assert "images_second" not in published
    assert batch["images_second"] == 5
    assert {"precision@64", "recall@64"} <= batch.keys()


def test_figures_of_several_networks_come_from_one_pass(network, capsys):
    write_images("fakes", {"": 5})
    write_images("reals", {"": 6}, seed=1)
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(hidden_size=8, image_size=28, patch_size=14, **layers)).save_pretrained("tiny-dinov2")
    text = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 9, "max_position_embeddings": 8, **layers}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"hidden_size": 8, "intermediate_size": 8, "image_size": 16, "patch_size": 8, **layers}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained("tiny-clip")
    capsys.readouterr()
    metrics = ["fid", "fd@dinov2", "kd@dinov2", "precision_recall@dinov2", "cmmd"]
    networks = [*network, "--dinov2", "tiny-dinov2", "--clip", "tiny-clip"]
    record = measured(capsys, "generation", "fakes", "--reference", "reals", *networks, "--metrics", *metrics)
    names = {"fid@64", "fd@tiny-dinov2", "kd@tiny-dinov2", "precision@tiny-dinov2", "cmmd@tiny-clip"}
    assert names <= record.keys()
    assert record["weights"].keys() == {"inception", "dinov2", "clip"}
    equal = measured(capsys, "generation", "reals", "--reference", "reals", *networks, "--metrics", *metrics)
    assert equal["fd@tiny-dinov2"] == pytest.approx(0, abs=1e-6)
    assert equal["cmmd@tiny-clip"] == pytest.approx(0, abs=1e-6)
    assert (equal["precision@tiny-dinov2"], equal["recall@tiny-dinov2"]) == (1, 1)
    assert record["fd@tiny-dinov2"] > 1e-6
    command = ["generation", "fakes", "--reference", "reals", "--dinov2", "tiny-dinov2", "--metrics", "fd@dinov2"]
    paper = measured(capsys, *command, "--protocol", "paper")  # samples go through no JPEG
    assert paper["fd@tiny-dinov2"] == pytest.approx(record["fd@tiny-dinov2"], rel=1e-6)


# The cache -----------------------------------------------------------------------------------------------------------


def test_features_of_the_real_images_are_computed_once(network, capsys, monkeypatch):
    fakes, reals = write_images("fakes", {"": 4}), write_images("reals", {"": 5}, seed=1)
    seen = []
    update = FeatureCollector.update

    def counted(self, outputs, places=None):
        seen.append(len(outputs["features"]))
        update(self, outputs, places)

    monkeypatch.setattr(FeatureCollector, "update", counted)
    command = ["generation", fakes, "--reference", reals, *network]
    first = measured(capsys, *command)
    assert seen == [4, 5]
    assert measured(capsys, *command)["fid@64"] == first["fid@64"]
    assert seen == [4, 5, 4]
    measured(capsys, *command, "--metrics", "fid", "precision_recall")
    assert seen == [4, 5, 4, 4]
    measured(capsys, *command, "--protocol", "paper")
    assert seen[4:] == [4, 5]
    PIL.Image.new("RGB", (14, 14), "red").save("reals/3.png")
    assert measured(capsys, *command)["fid@64"] != first["fid@64"]
    assert seen[6:] == [4, 5]
    state = torch.load(network[1], weights_only=True)
    torch.save({name: x * 1.5 if name == "Conv2d_1a_3x3.conv.weight" else x for name, x in state.items()}, "other.pth")
    for other in (
        ["--fit", "pad"],
        ["--resolution", 10],
        ["--feature-layer", 192],
        ["--inception-weights", "other.pth"],
    ):
        seen.clear()
        measured(capsys, *command, *other)
        assert seen == [4, 5], other


# Many processes ------------------------------------------------------------------------------------------------------


def on_two_processes(*arguments) -> None:
    """Start the command as a launcher does, on two CPU processes that talk through gloo."""
    debug_launcher(_main, args=([str(argument) for argument in arguments],), num_processes=2)


def _main(arguments: list[str]) -> None:
    # A fork has what accelerate knew of its parent, if a test before this one has asked it: that it is alone.
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    main(arguments)


def test_two_processes_measure_what_one_does_on_the_same_samples(pipeline, image_folder, network, monkeypatch, capsys):
    monkeypatch.setattr("looc_ldm.commands.generation_features.READ_BATCH", 5)  # both read some of the reference
    command = ["evaluate", "generation", pipeline, "--reference", image_folder, *network, "--images", 7, "--steps", 1]
    command += ["--batch-size", 3, "--no-cache", "--metrics", "fid", "kid", "precision_recall", "class_fid"]
    records = []
    for measure, name in ((lambda *a: run(capsys, *a), "one"), (on_two_processes, "two")):
        measure(*command, "--output", f"{name}.json", "--export-npz", f"{name}.npz")
        records.append(json.loads(Path(f"{name}.json").read_text()))
    assert [record["machine"]["processes"] for record in records] == [1, 2]
    assert figures_of(records[1]) == pytest.approx(figures_of(records[0]), rel=1e-6)
    one, two = (np.load(f"{name}.npz") for name in ("one", "two"))
    assert np.array_equal(one["arr_0"], two["arr_0"])
    assert np.array_equal(one["arr_1"], two["arr_1"])


def test_two_processes_measure_the_reconstructions_of_one(pipeline, network, monkeypatch, capsys):
    monkeypatch.setattr("looc_ldm.commands.evaluate_reconstruction.READ_BATCH", 4)
    write_images("many", {"": 10})
    command = ["evaluate", "reconstruction", pipeline, "--data", "many", *network]
    run(capsys, *command, "--output", "one.json")
    on_two_processes(*command, "--output", "two.json")
    one, two = (json.loads(Path(f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["images"] == 10
    assert figures_of(two) == pytest.approx(figures_of(one), rel=1e-6)
