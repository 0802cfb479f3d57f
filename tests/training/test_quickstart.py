"""`looc-ldm quickstart` leaves a report that stands on its own, and says what it left out."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from looc_ldm.metrics import InceptionFeatures
from looc_ldm.training import quickstart as module
from looc_ldm.training.config_parsing import load_config
from looc_ldm.training.photos import chain
from looc_ldm.training.quickstart import quickstart

CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
FEW = {"total_images": 64, "log_every_images": 32, "preview_every_images": 64, "checkpoint_every_images": 32}
FEW["data__validation_images"] = 20


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The quickstart with a few steps of each stage and a few samples: its folder and what it said. Offline."""

    def refuse(*args, **kwargs):
        raise AssertionError("quickstart must not try to download")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_config", functools.partial(load_config, **FEW))
        patch.setattr(chain, "SAMPLES_PER_CLASS", 2)
        patch.setattr(chain, "SAMPLING_STEPS", 2)
        patch.setattr("urllib.request.urlopen", refuse)
        patch.setattr("torch.hub.download_url_to_file", refuse)
        folder = tmp_path_factory.mktemp("quickstart") / "out"
        said: list[str] = []
        quickstart(folder, None, said.append)
        yield folder, said


def test_report_holds_samples_of_every_class_figures_and_curves(miniature):
    folder, _ = miniature
    report = (folder / "report.html").read_text()
    for name in CLASSES:
        assert f"<span>{name}</span>" in report
    assert "PSNR" in report
    assert "bits per pixel" in report
    assert report.count("<svg") == 2


def test_pictures_and_figures_are_files_too(miniature):
    folder, _ = miniature
    assert (folder / "samples.png").is_file()
    assert (folder / "reconstructions.png").is_file()
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["reconstruction"]["images"] == FEW["data__validation_images"]
    assert figures["reconstruction"]["bits_per_pixel"] == pytest.approx(1024 / 784)


def test_report_is_self_contained(miniature):
    folder, _ = miniature
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', (folder / "report.html").read_text())
    assert any(source.startswith("data:image/png") for source in sources)
    assert [source for source in sources if not source.startswith(("data:", "#"))] == []


def test_without_inception_weights_fid_is_left_out_and_said_so(miniature):
    folder, said = miniature
    assert "--inception-weights" in (folder / "report.html").read_text()
    assert any("--inception-weights" in line for line in said)
    assert json.loads((folder / "figures.json").read_text())["generation"] == {}


def test_run_again_with_inception_weights_it_only_measures_and_reports(miniature, untrained_inception):
    folder, _ = miniature
    weights = [*folder.glob("*/model/*.safetensors"), *folder.glob("*/pipeline/*/*.safetensors")]
    before = {file: file.stat().st_mtime_ns for file in weights}
    assert len(before) == 5  # both variants of both stages, and the first stage inside the pipeline
    again = shutil.copytree(folder, folder.with_name("again"))
    quickstart(again, InceptionFeatures("64", untrained_inception), lambda line: None)
    assert {file: (again / file.relative_to(folder)).stat().st_mtime_ns for file in weights} == before
    figures = json.loads((again / "figures.json").read_text())
    assert figures["reconstruction"]["rfid@64"] > 0
    assert figures["generation"]["images_first"] == FEW["data__validation_images"]
    assert "FID@64" in (again / "report.html").read_text()


@pytest.mark.slow
def test_the_real_quickstart_reaches_24_db_at_most_2_bits_per_pixel(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # all cores
    command = [sys.executable, "-m", "looc_ldm", "quickstart", "--output", tmp_path / "out"]
    subprocess.run(command, env=environment, check=True)
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["reconstruction"]["psnr"] >= 24
    assert figures["reconstruction"]["bits_per_pixel"] <= 2
    assert figures["reconstruction"]["codebook_use"] > 0.95
    assert figures["seconds"] > 0
