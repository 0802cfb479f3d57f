"""`looc-ldm train photos` goes from a folder to a model and a report, and after a kill to the same bits."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from looc_ldm.training import diffusion
from looc_ldm.training.photos import chain, plan
from looc_ldm.training.photos.train import train_photos
from looc_ldm.training.run import Run
from looc_ldm.utils.arguments import TrainPhotos, parse_options
from looc_ldm.utils.errors import UserError

HOURS = 0.004  # 14 s: stage 1 sees 72 images, stage 2 152
MORE_HOURS = 0.005
AUTOENCODER = {
    "batch_size": 8,
    "model.block_out_channels": [8, 8, 8, 8],
    "model.norm_num_groups": 4,
    "model.latent_channels": 8,
    "model.mid_block_add_attention": "false",
    "model.vq_embed_dim": 6,
}
DIFFUSION = {"batch_size": 8, "unet.block_out_channels": [8, 16], "unet.norm_num_groups": 4, "preview_steps": 1}
DIFFUSION |= {"unet.attention_head_dim": 4}


class Killed(Exception):
    """Stands for SIGKILL: nothing is saved."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """36 small photographs of two classes, and a file that is none."""
    folder = tmp_path_factory.mktemp("data") / "my photographs"
    for i in range(36):
        file = folder / ("day" if i % 2 else "night") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (9, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((80, 90), Image.Resampling.BICUBIC).save(file)
    (folder / "day" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_samples():
    """Two samples of one step per class, and speeds that are not measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "SAMPLES_PER_CLASS", 2)
        patch.setattr(chain, "SAMPLING_STEPS", 1)
        patch.setattr(plan, "measure_speeds", lambda *args: {"autoencoder": 20.0, "diffusion": 40.0})
        yield


def train(folder: Path, output: Path, hours: float = HOURS, *more: str) -> list[str]:
    """Run the command, and return its lines."""
    arguments = [str(folder), "--output", str(output), "--resolution", "64", "--hours", str(hours), *more]
    for stage, settings in (("autoencoder", AUTOENCODER), ("diffusion", DIFFUSION)):
        arguments += [f"--{stage}.{name}={value}" for name, value in settings.items()]
    said: list[str] = []
    train_photos(parse_options(TrainPhotos, arguments, "looc-ldm train photos"), None, said.append)
    return said


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> tuple[Path, list[str]]:
    """A finished training: its folder, not to be changed, and what it said."""
    output = tmp_path_factory.mktemp("runs") / "photos"
    return output, train(folder, output)


def weights(output: Path) -> dict[str, str]:
    files = output.glob("*/[mp][oi]*/**/*.safetensors")  # model and pipeline
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_it_says_what_it_found_plans_and_offers_next(finished):
    output, said = finished
    text = "\n".join(said)
    for part in (
        "37 images",
        "2 classes: day 19, night 18",
        "broken.png",
        "--lpips-weights FILE",
        "stage 1 on 72 images",
    ):
        assert part in text
    for command in ("train photos", "sample", "evaluate reconstruction", "evaluate generation", "push"):
        assert f": looc-ldm {command}" in text
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == ["autoencoder", "diffusion", "latents"]


def test_the_report_stands_on_its_own(finished):
    output, _ = finished
    report = (output / "report.html").read_text()
    headings = re.findall("<h2>(.*?)</h2>", report)
    assert headings == [
        "Samples, one row per class",
        "Held-out images above, reconstructions below",
        "Figures",
        "Loss",
        "While it was trained",
        "Time spent",
        "Next",
    ]
    for part in (
        "<span>night</span>",
        "bits per pixel",
        "after 72 images",
        "--inception-weights FILE",
        "looc-ldm push",
    ):
        assert part in report
    assert not re.findall(r'(?:src|href)="(?!data:|#)', report)
    figures = json.loads((output / "figures.json").read_text())
    assert figures["reconstruction"]["images"] == 3
    assert figures["plan"]["diffusion_images"] == [152]
    assert set(figures["seconds"]) == {"stage 1", "stage 2", "samples and figures"}


def test_killed_inside_and_between_the_stages_it_ends_with_the_same_bits(folder, finished, tmp_path, monkeypatch):
    output = tmp_path / "killed"
    after_step = Run.after_step

    def kill_at(result: str, images: int):
        def step(self, finite):
            after_step(self, finite)
            if self.folder.result.name == result and self.images_seen == images:
                raise Killed

        monkeypatch.setattr(Run, "after_step", step)

    def kill(config):
        raise Killed

    kill_at("model", 32)
    with pytest.raises(Killed):
        train(folder, output)
    spent = json.loads((output / "time.json").read_text())["stage 1"]
    kill_at("pipeline", 88)
    monkeypatch.setattr(plan, "measure_speeds", kill)  # no second time
    with monkeypatch.context() as patch:
        patch.setattr(diffusion, "train", kill)
        with pytest.raises(Killed):
            train(folder, output)
    assert json.loads((output / "time.json").read_text())["stage 1"] > spent
    with pytest.raises(Killed):
        train(folder, output)
    monkeypatch.setattr(Run, "after_step", after_step)
    train(folder, output)
    assert weights(output) == weights(finished[0])
    assert len(weights(output)) == 5
    one, other = (json.loads((place / "figures.json").read_text()) for place in (output, finished[0]))
    assert one["reconstruction"] == other["reconstruction"]


def test_more_hours_go_to_stage_2_and_fewer_are_refused(folder, finished, tmp_path):
    output = tmp_path / "more"
    shutil.copytree(finished[0], output)
    before = weights(output)
    said = train(folder, output, MORE_HOURS)
    assert any("stage 2 goes on" in line for line in said)
    after = weights(output)
    assert {name: after[name] for name in before} == before
    assert (output / "diffusion_2" / "pipeline" / "training.json").is_file()
    assert "diffusion_2" in (output / "report.html").read_text()
    with pytest.raises(UserError, match=f"--hours {HOURS}: .* is planned with --hours {MORE_HOURS}"):
        train(folder, output, HOURS)
    with pytest.raises(UserError, match=r"--classes none: .* is planned with --classes auto"):
        train(folder, output, MORE_HOURS, "--classes", "none")


@pytest.mark.parametrize("setting", ["--autoencoder.output_dir=x", "--diffusion.data.path=x"])
def test_settings_that_options_say_are_refused(setting, folder, tmp_path):
    with pytest.raises(UserError, match="FOLDER, --output and --resolution say this"):
        train(folder, tmp_path / "out", HOURS, setting)
    assert list(tmp_path.iterdir()) == []


def test_an_output_among_the_photographs_is_refused(folder):
    with pytest.raises(UserError, match=r"is inside data\.path"):
        train(folder, folder / "out")
    assert not (folder / "out").exists()
