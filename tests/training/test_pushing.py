"""Uploads during training, by the genuine client to a hub on loopback, and to hubs that fail."""

import json
import logging
import os
import socket
import time
from pathlib import Path

import pytest

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
def pusher():
    pusher = Pusher(ID, private=True)
    yield pusher
    pusher.wait(0)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved model."""
    tiny_autoencoder().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_uploaded_to_a_private_repository(hub, pusher, folder):
    pusher.push(folder, "after 16 images")
    assert pusher.wait()
    assert hub.messages == ["after 16 images"]
    assert hub.repositories[ID].private
    name = "diffusion_pytorch_model.safetensors"
    assert hub.repositories[ID].files()[name] == (folder / name).read_bytes()


@pytest.mark.slow
def test_a_run_pushes_its_checkpoints_and_its_result_to_a_private_repository(
    hub, autoencoder_config, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "looc_ldm")
    config = autoencoder_config(tmp_path / "run", push_to_hub=ID, checkpoint_every_images=16, total_images=32)
    save_checkpoint = Run.save_checkpoint

    def after_the_last_upload(run):
        """The second checkpoint comes when the first one's upload has ended."""
        run._pusher.wait()
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
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert not (tmp_path / "run" / "upload.partial").exists()


def test_the_end_does_not_wait_for_ever_and_the_result_not_for_an_older_model(silent_hub, pusher, folder):
    began = time.monotonic()
    pusher.push(folder, "after 16 images")
    assert pusher.busy
    assert time.monotonic() - began < 2
    pusher.push(folder, "the end")
    assert not pusher.wait(0.1)
    assert not pusher.busy
    assert time.monotonic() - began < 10


def test_a_checkpoint_that_comes_while_an_upload_runs_is_left_out(silent_hub, autoencoder_config, tmp_path, caplog):
    caplog.set_level(logging.INFO, "looc_ldm")
    run = Run(autoencoder_config(tmp_path / "run", push_to_hub=ID), "model")
    run.push(tiny_autoencoder().save_pretrained)
    run.images_seen = 8
    run.push(lambda folder: pytest.fail("nothing is saved"))
    run._pusher.wait(0)
    assert caplog.messages[-1] == "not pushed, because the last upload still runs: Model after 8 images"


@pytest.mark.slow
def test_without_a_network_the_run_goes_on(client, autoencoder_config, tmp_path, caplog, capfd):
    with socket.create_server(("127.0.0.1", 0)) as free:
        client(f"http://127.0.0.1:{free.getsockname()[1]}")  # nobody listens there in a moment
    result = autoencoder.train(autoencoder_config(tmp_path / "run", push_to_hub=ID))
    assert json.loads((result / "training.json").read_text())["images_seen"] == 48
    assert caplog.messages[-1] == f"not pushed: try `looc-ldm push {result} ada/garments`"
    assert "error: ada/garments at " in capfd.readouterr().err
