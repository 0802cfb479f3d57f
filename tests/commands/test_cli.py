"""`looc-ldm` as somebody types it: what it makes, and the one line with which it refuses what it cannot do."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import PIL.Image
import pytest
import torch
import yaml
from diffusers import UNet2DModel

import looc_ldm
from looc_ldm import LooCLDMPipeline
from looc_ldm.commands.class_labels import class_folders
from looc_ldm.commands.main import COMMANDS, main, parse_command
from tiny import refusal, run, stopped

# Words in the help, beside the options that every command has of its own.
HELP = {
    "": [*COMMANDS, "--version"],
    "train": ["train photos", "train autoencoder", "train diffusion"],
    "train photos": ["FOLDER", "--hours", "--autoencoder.KEY VALUE"],
    "evaluate": ["evaluate reconstruction", "evaluate generation"],
    "train autoencoder": ["--config", "--data.path", "--model", "images per optimizer step"],
    "train diffusion": ["--config", "--data.path", "--unet", "images per optimizer step"],
    "cache-latents": ["--batch-size", "accelerate launch"],
    "encode": ["MODEL", "IMAGES", "side of images in pixels"],
    "evaluate generation": ["SAMPLES", "--reference", "number of denoising steps", "--guidance-scale"],
    "push": ["FOLDER", "USER/NAME"],
}


pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


# Help and versions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", HELP)
def test_every_command_has_a_help_that_names_its_options(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split()).lower()
    assert [word for word in HELP[command] if word.lower() not in shown] == []


@pytest.mark.parametrize("command", [name for name in COMMANDS if "Config" not in COMMANDS[name][0]])
def test_every_option_is_explained_and_says_its_default_or_that_it_is_required(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    _, _, described = capsys.readouterr().out.partition("options:")
    options = [" ".join(option.split()) for option in described.split("\n  --")[1:]]
    assert options
    for option in options:
        assert "default: " in option or "required" in option
        assert len(option.partition("(")[0].split()) > 3, option


def test_versions_are_printed_for_a_bug_report(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code in (0, None)
    printed = capsys.readouterr().out
    assert f"looc-ldm {looc_ldm.__version__}\n" in printed
    assert f"torch {torch.__version__.split('+')[0]}" in printed
    for package in ("python", "torchvision", "diffusers", "accelerate", "transformers", "datasets", "torch-fidelity"):
        assert f"\n{package} " in printed


def test_hyphens_and_underscores_are_equal_and_the_options_cannot_be_changed():
    hyphens = parse_command(["sample", "starter", "--guidance-scale", "2", "--batch-size=3", "--labels", "1", "a_b"])
    underscores = parse_command(
        ["sample", "starter", "--guidance_scale", "2", "--batch_size=3", "--labels", "1", "a_b"]
    )
    assert replace(hyphens[1], command_line="") == replace(underscores[1], command_line="")
    assert (hyphens[1].guidance_scale, hyphens[1].batch_size, hyphens[1].labels) == (2, 3, ["1", "a_b"])
    assert hyphens[1].command_line.startswith("looc-ldm sample starter --guidance-scale 2")
    with pytest.raises(FrozenInstanceError):
        hyphens[1].seed = 1


def test_the_home_folder_is_found_in_every_value(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    _, options = parse_command(["encode", "~/model", "~/images", "b~/c", "--output=~/codes"])
    assert (options.model, options.images) == ("/home/ada/model", ["/home/ada/images", "b~/c"])
    assert options.output == Path("/home/ada/codes")


def test_help_and_wrong_options_are_answered_without_waiting_for_torch():
    code = """
import sys
from looc_ldm.commands.main import COMMANDS, main
for command in ("--help", "draw", *(f"{name} --bogus 1" for name in COMMANDS)):
    try:
        main(command.split())
    except SystemExit as stopped:
        assert stopped.code == (0 if command == "--help" else 2), command
    assert "--bogus" in command or "jsonargparse" not in sys.modules
assert not {"torch", "diffusers", "numpy"} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == 1 + len(COMMANDS)


# Results of the commands --------------------------------------------------------------------------------------------


def test_sample_writes_each_image_and_a_grid_with_a_row_a_class(pipeline, capsys):
    printed = run(capsys, "sample", pipeline, "--steps", 2, "--images", 2, "--output", "new/samples")
    assert "6 images" in printed
    files = sorted(str(path.relative_to("new")) for path in Path("new").rglob("*.png"))
    classes = [(2, "7"), (0, "circle"), (1, "square")]
    drawn = [f"samples/{name}/{2 * label + i:05d}.png" for label, name in classes for i in (0, 1)]
    assert files == ["samples.png", *drawn]
    assert PIL.Image.open("new/samples/circle/00000.png").size == (16, 16)
    grid = PIL.Image.open("new/samples.png")
    assert grid.size == (32, 48)
    assert "warning" not in printed
    fewer = run(capsys, "sample", pipeline, "--steps", 2, "--images", 1, "--output", "new/samples")
    # Files are numbered over all classes, so the images of the last two classes have new names now.
    assert "warning: new/samples had images before: 1 were replaced, 5 are still there" in fewer
    second_of_class_1 = grid.crop((16, 16, 32, 32)).convert("L")
    assert second_of_class_1.tobytes() == PIL.Image.open("new/samples/square/00003.png").tobytes()


def test_without_names_all_classes_are_drawn(pipeline, capsys):
    nameless = LooCLDMPipeline.from_pretrained(pipeline)
    nameless.register_to_config(id2label=None)
    nameless.save_pretrained("nameless")
    assert "3 images in samples" in run(capsys, "sample", "nameless", "--steps", 1, "--images", 1)
    assert sorted(path.name for path in Path("samples").iterdir()) == ["0", "1", "2"]


def test_class_names_decide_nothing_but_the_name_of_a_folder(pipeline, capsys):
    hostile = LooCLDMPipeline.from_pretrained(pipeline)
    hostile.register_to_config(id2label={0: "..", 1: "n" * 300, 2: "/a\0b"})
    hostile.save_pretrained("hostile")
    run(capsys, "sample", "hostile", "--steps", 1, "--images", 1, "--output", "new/samples")
    files = sorted(str(path.relative_to("new")) for path in Path("new").rglob("*.png"))
    assert files == ["samples.png", "samples/-a-b/00002.png", "samples/0/00000.png", f"samples/{'n' * 90}/00001.png"]


def test_folders_of_classes_are_unique_and_at_most_100_bytes():
    names = dict(
        enumerate(
            ["crane", "Crane", "crane (1)", ".", "__x", "\u4e2d" * 99, "\u4e2d" * 98, "a/b", "COL: 1?", "Con", "com1.x"]
        )
    )
    folders = class_folders(names)
    expected = [
        "crane",
        "Crane (1)",
        "crane (1) (2)",
        "3",
        "x",
        "\u4e2d" * 30,
        "\u4e2d" * 30 + " (6)",
        "a-b",
        "COL- 1-",
        "-Con",
        "-com1.x",
    ]
    assert list(folders.values()) == expected
    assert all(len(folder.encode()) <= 100 for folder in folders.values())


def test_labels_are_names_or_indices_a_name_comes_before_an_index_and_the_seed_decides(pipeline, capsys):
    def samples(folder, *labels):
        run(capsys, "sample", pipeline, "--steps", 2, "--images", 1, "--output", folder, "--labels", *labels)
        return PIL.Image.open(f"{folder}.png").tobytes()

    assert samples("a", "Circle", "1", "7") == samples("b", "0", "square", "2")
    assert samples("a", "Circle", "1", "7") != samples("b", "1", "square", "2")
    assert samples("a", "1", "--seed", 0) == samples("a", "1") != samples("a", "1", "--seed", 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sample_and_evaluate_run_in_the_dtype_and_on_the_device_that_are_named(dtype, pipeline, image_folder, capsys):
    options = ["--dtype", dtype, "--device", "cpu"]
    run(capsys, "sample", pipeline, "--steps", 1, *options)
    run(capsys, "evaluate", "reconstruction", pipeline, "--data", image_folder, "--output", "figures.json", *options)
    assert json.loads(Path("figures.json").read_text())["dtype"] == dtype


def test_reconstruct_writes_originals_above_reconstructions_and_names_the_rate(pipeline, image_folder, capsys):
    printed = run(capsys, "reconstruct", pipeline, image_folder, "--images", 3, "--output", "new/grid.png")
    assert PIL.Image.open("new/grid.png").size == (3 * 16, 2 * 16)
    assert "512 bits per image, 2 bits per pixel" in printed  # 8x8 positions, 2 codes each, 4 bits a code; 16x16 pixels


def test_images_become_square_as_in_training_unless_told_otherwise(pipeline, image_folder, capsys):
    folder = Path(pipeline).parent / "trained"
    shutil.copytree(pipeline, folder)
    (folder / "training.json").write_text(json.dumps({"data": {"fit": "pad"}}))
    padded, cropped = f"{512 / 14**2:.4g} bits per pixel", "2 bits per pixel"
    assert padded in run(capsys, "reconstruct", folder, image_folder)
    assert cropped in run(capsys, "reconstruct", folder, image_folder, "--fit", "crop")
    assert cropped in run(capsys, "reconstruct", pipeline, image_folder)


def write_config(name: str, image_folder: str, **settings) -> None:
    """Write `name.yaml`, the config of a training of one step whose folder is `name`."""
    data = {"path": image_folder, "validation_images": 3, "resolution": 16, "num_workers": 0}
    common = {"data": data, "total_images": 8, "batch_size": 8, "tracker": "none", "mixed_precision": "no"}
    Path(f"{name}.yaml").write_text(yaml.safe_dump({**common, "output_dir": name, **settings}))


MODEL = {"block_out_channels": [8], "norm_num_groups": 4, "vq_embed_dim": 4, "num_vq_embeddings": 16}
MODEL |= {"codevector_dim": 2, "interpolation_factor": 1}


def test_training_ends_with_its_figures_its_folder_and_the_next_command(image_folder, capsys, caplog):
    unet = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    unet |= {"norm_num_groups": 4, "add_attention": False}
    write_config("first", image_folder, model=MODEL)
    write_config("second", image_folder, unet=unet, preview_steps=1)
    with caplog.at_level("INFO", "looc_ldm"):
        assert run(capsys, "train", "autoencoder", "--config", "first.yaml").split()[-1] == "first/model"
        assert re.search(r"held-out images 3, psnr [\d.]+, ssim .*bits_per_pixel", caplog.text)
        following = f"--autoencoder first/model --data.path {image_folder} --data.validation_split null"
        assert f"next: looc-ldm train diffusion --config CONFIG {following}" in caplog.text
        run(capsys, "train", "diffusion", "--config", "second.yaml", *following.split())
    assert "next: looc-ldm sample second/pipeline" in caplog.text
    assert f"next: looc-ldm evaluate generation second/pipeline --data {image_folder}" in caplog.text


def test_the_held_out_images_of_a_model_are_the_validation_split_of_its_data(image_folder, capsys, caplog):
    write_config("run", image_folder, model=MODEL)
    run(capsys, "train", "autoencoder", "--config", "run.yaml")
    measure = ["evaluate", "reconstruction", "run/model", "--data", image_folder, "--output", "figures.json"]
    run(capsys, *measure, "--split", "validation")
    measured = json.loads(Path("figures.json").read_text())
    trained = json.loads(Path("run/model/training.json").read_text())["validation"]
    assert (measured["images"], measured["split"]) == (3, "train, held out")
    assert measured["psnr"] == pytest.approx(trained["psnr"], rel=1e-5)
    assert "was trained on these images" not in caplog.text
    run(capsys, *measure)
    assert "the model was trained on these images; --split validation measures on those held out" in caplog.text
    shutil.copytree(image_folder, "more")
    shutil.copyfile(next(Path("more").rglob("*.png")), "more/circle/another.png")
    description = json.loads(Path("run/model/training.json").read_text())
    description["data"]["path"] = "more"
    Path("run/model/training.json").write_text(json.dumps(description))
    measure[4] = "more"
    assert "'more' has changed since the training" in refusal(capsys, *measure, "--split", "validation")


# Refusals of the commands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "COMMAND"),
        ("draw", "'draw'"),
        ("train unet", "'train unet'"),
        ("train autoencoder --batchsize 8", "did you mean 'batch_size'"),
        ("sample", "required: model"),
        ("sample MODEL --images 0", "--images: must be >0, got 0"),
        ("sample MODEL --seed 4294967296", "--seed: must be >=0 and <4294967296, got 4294967296"),
        ("sample MODEL --dtype int8", "must be one of 'float32', 'bfloat16', 'float16', got int8"),
        ("sample MODEL --device cuda:99", "--device cuda:99"),
        ("sample MODEL --labels sqare", "unknown class name 'sqare'; did you mean square"),
        ("sample MODEL --labels 4", "class label must be in [0, 4)"),
        ("sample MODEL --labels 3", "3 stands for no class"),
        ("sample MODEL --steps 1001", "1001"),
        ("sample /no/such/folder", "'/no/such/folder'"),
        ("sample MODEL/vqvae", "no model_index.json"),
        ("sample MODEL --output file/folder", "'file' is not a folder"),
        ("reconstruct /no/such/folder DATA", "'/no/such/folder'"),
        ("reconstruct MODEL/unet DATA", "holds a UNet2DModel, not a LooCVQModel"),
        ("reconstruct MODEL empty", "no images in the folder empty"),
        ("reconstruct MODEL DATA --resolution 15", "divisible by 2, got 15x15"),
        ("reconstruct MODEL DATA --resolution 8 --fit pad", "fit=pad"),
        ("reconstruct MODEL DATA --split tain", "'tain'"),
        ("reconstruct MODEL DATA --output file/grid.png", "'file' is not a folder"),
        ("reconstruct MODEL DATA --output empty", "is a folder"),
        ("reconstruct MODEL DATA --output grids", "must be a .png file, got 'grids'"),
        ("evaluate reconstruction MODEL --data DATA --resolution 10", "at least 11x11"),
        ("evaluate reconstruction MODEL --data DATA --inception-weights no.pth", "no.pth"),
        ("quickstart --inception-weights no.pth", "no.pth"),
        ("quickstart --output file", "'file"),
        ("cache-latents --config no/such", "no config 'no/such'"),
        ("cache-latents --config fashion_mnist/diffusion --autoencoder MODEL/unet", "not a LooCVQModel"),
        ("cache-latents --config fashion_mnist/diffusion --output file", "'file' is not a folder"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2_with_nothing_written(command, message, pipeline, image_folder, capsys):
    Path("file").write_text("not a folder")
    Path("empty").mkdir()
    assert message in refusal(capsys, *command.replace("MODEL", pipeline).replace("DATA", image_folder).split())


@pytest.mark.parametrize(
    ("file", "content"), [("vqvae/config.json", "{"), ("vqvae/diffusion_pytorch_model.safetensors", "cut off")]
)
@pytest.mark.parametrize("command", [["sample"], ["evaluate", "reconstruction", "--data", "DATA"]], ids=" ".join)
def test_a_damaged_model_is_refused(command, file, content, pipeline, image_folder, capsys, in_an_empty_folder):
    shutil.copytree(pipeline, "damaged")
    Path("damaged", file).write_text(content)
    command = [argument.replace("DATA", image_folder) for argument in command]
    assert "damaged" in refusal(capsys, *command, "damaged")


def test_labels_for_an_unconditional_model_are_refused(pipeline, capsys):
    unconditional = LooCLDMPipeline.from_pretrained(pipeline)
    unconditional.unet = UNet2DModel.from_config(unconditional.unet.config, num_class_embeds=None)
    unconditional.register_to_config(id2label=None, null_class_label=None)
    unconditional.save_pretrained("unconditional")
    capsys.readouterr()
    assert "this model is unconditional" in refusal(capsys, "sample", "unconditional", "--labels", "circle")
    assert "4 images" in run(capsys, "sample", "unconditional", "--steps", 1)


def test_an_image_that_cannot_be_read_is_named(pipeline, image_folder, capsys):
    shutil.copytree(image_folder, "images")
    cut_off = Path("images/circle/0.png")
    cut_off.write_bytes(cut_off.read_bytes()[:60])
    last_line = stopped(capsys, "evaluate", "reconstruction", pipeline, "--data", "images")[-1]
    assert last_line.startswith(f"error: cannot read {cut_off.resolve()}: ")


def test_a_refusal_in_a_process_of_its_own_is_one_line_without_a_traceback(pipeline):
    command = [sys.executable, "-m", "looc_ldm", "sample", pipeline, "--labels", "sqare"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: unknown class name 'sqare'; did you mean square?\n"
    assert result.stdout == ""
