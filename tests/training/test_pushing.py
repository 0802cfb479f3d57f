"""Uploads during training, by the genuine client to a hub on loopback, and to hubs that fail."""

import json
import logging
import os
import socket
import time
from pathlib import Path

import pytest

from looc_ldm import LooCVQModel
from looc_ldm.training import autoencoder
from looc_ldm.training.pushing import Pusher
from looc_ldm.training.run import Run
from tiny import import_file, tiny_autoencoder

ROOT = Path(__file__).resolve().parent.parent.parent
ID = "ada/garments"


server = import_file(ROOT / "tests" / "hub" / "server.py")


@pytest.fixture
def client(monkeypatch, tmp_path):
    """`client(url, token)`: what processes that are started from now on believe to be the hub, and log in with."""

    def use(url: str, token: str = server.GOOD_TOKEN) -> None:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE"))]:
            if name != "HF_DATASETS_CACHE":
                monkeypatch.delenv(name)
        settings = {"HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.fixture
def hub(client):
    with server.Hub() as running:
        client(running.url)
        yield running


@pytest.fixture
def silent_hub(client):
    """A hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client(f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield


@pytest.fixture
def pusher(tmp_path, caplog):
    caplog.set_level(logging.INFO, "looc_ldm")
    pusher = Pusher(tmp_path / "upload.partial", ID, private=True)
    yield pusher
    pusher.finish(seconds=0)


@pytest.fixture(scope="module")
def model() -> LooCVQModel:
    return tiny_autoencoder()


def saver(model: LooCVQModel):
    def save(folder: Path) -> Path:
        model.save_pretrained(folder / "model")
        return folder / "model"

    return save


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "looc_ldm.training.pushing"]


def test_a_snapshot_is_uploaded_as_it_was_to_a_private_repository(hub, pusher, model, caplog):
    pusher.push_snapshot(saver(model), "after 16 images")
    kept = (pusher.folder / "model" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert pusher.finish()
    assert hub.messages == ["after 16 images"]
    assert hub.repositories[ID].private
    assert hub.repositories[ID].files()["diffusion_pytorch_model.safetensors"] == kept
    assert said(caplog) == ["pushed to ada/garments: after 16 images"]
    assert not pusher.folder.exists()


@pytest.mark.slow
def test_a_run_pushes_its_checkpoints_and_its_result_to_a_private_repository(
    hub, autoencoder_config, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "looc_ldm")
    config = autoencoder_config(tmp_path / "run", push_to_hub=ID, checkpoint_every_images=16, total_images=32)
    save_checkpoint = Run.save_checkpoint

    def after_the_last_upload(run):
        """The second checkpoint comes when the first one's upload has ended."""
        run._pusher.finish()
        save_checkpoint(run)

    monkeypatch.setattr(Run, "save_checkpoint", after_the_last_upload)
    result = autoencoder.train(config)
    repository = hub.repositories[ID]
    assert repository.private
    assert hub.messages == ["Model after 16 images", "Model after 32 images, the end of training"]
    first, last = (repository.commits[sha] for sha in list(repository.commits)[1:])
    weights = "diffusion_pytorch_model.safetensors"
    assert last[weights] == (result / weights).read_bytes() != first[weights]
    assert json.loads(first["training.json"])["images_seen"] == 16
    assert {"README.md", "config.json", "config.yaml", "diffusion_pytorch_model.non_ema.safetensors"} <= first.keys()
    assert not [line for line in said(caplog) if not line.startswith(("pushed", "waiting"))]
    assert not (tmp_path / "run" / "upload.partial").exists()


def test_a_checkpoint_that_comes_while_an_upload_runs_is_left_out_and_the_end_does_not_wait_for_ever(
    silent_hub, pusher, model, caplog
):
    began = time.monotonic()
    pusher.push_snapshot(saver(model), "after 16 images")
    assert time.monotonic() - began < 2
    pusher.push_snapshot(lambda folder: pytest.fail("nothing is saved"), "after 32 images")
    assert said(caplog) == ["not pushed to ada/garments, because the last upload still runs: after 32 images"]
    assert not pusher.finish(seconds=0.1)
    assert said(caplog)[-1].startswith("not pushed to ada/garments: after 16 images: the upload was ended before")
    assert not pusher.folder.exists()
    assert time.monotonic() - began < 10


def test_the_result_does_not_wait_for_an_older_model_and_says_how_to_push_it_again(
    silent_hub, pusher, model, caplog, tmp_path
):
    result = saver(model)(tmp_path)
    began = time.monotonic()
    pusher.push_snapshot(saver(model), "after 16 images")
    pusher.push_result(result, "the end", seconds=0.1)
    assert time.monotonic() - began < 10
    _, waiting, failed, hint = said(caplog)
    assert waiting.startswith("waiting for the upload")
    assert failed.startswith("not pushed to ada/garments: the end: the upload was ended before")
    assert hint == f"try again with `looc-ldm push {result} ada/garments`"
    assert (result / "config.json").is_file()


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / "upload.partial" / "model").mkdir(parents=True)
    Pusher(tmp_path / "upload.partial", ID, private=True)
    assert not (tmp_path / "upload.partial").exists()


@pytest.mark.slow
def test_a_token_that_is_refused_is_one_warning(hub, client, pusher, model, caplog):
    client(hub.url, "hf_bad")
    pusher.push_snapshot(saver(model), "after 16 images")
    pusher.finish()
    (line,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "after 16 images: error: ada/garments at" in line.getMessage()
    assert "\n" not in line.getMessage()
    assert ID not in hub.repositories


@pytest.mark.slow
def test_a_hub_that_is_gone_in_the_middle_of_an_upload_and_then_back_gets_the_next_one(hub, pusher, model, caplog):
    hub.failing_upload = 1
    pusher.push_snapshot(saver(model), "after 16 images")
    pusher.finish()
    assert f"after 16 images: error: ada/garments at {hub.url}: " in said(caplog)[-1]
    hub.failing_upload = None
    pusher.push_snapshot(saver(model), "after 32 images")
    pusher.finish()
    assert hub.messages == ["after 32 images"]


@pytest.mark.slow
def test_without_a_network_the_run_goes_on(client, autoencoder_config, tmp_path, caplog):
    with socket.create_server(("127.0.0.1", 0)) as free:
        client(f"http://127.0.0.1:{free.getsockname()[1]}")  # nobody listens there in a moment
    result = autoencoder.train(autoencoder_config(tmp_path / "run", push_to_hub=ID))
    assert json.loads((result / "training.json").read_text())["images_seen"] == 48
    *failed, hint = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert (
        "not pushed to ada/garments: Model after 48 images, the end of training: error: ada/garments at " in failed[-1]
    )
    assert hint == f"try again with `looc-ldm push {result} ada/garments`"
