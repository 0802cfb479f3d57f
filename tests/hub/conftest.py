"""A hub on loopback for the genuine client, and tiny models to push to it. Nothing here reaches a network.

huggingface_hub reads its address from HF_ENDPOINT when it is imported, which other tests have done by then. In this
process its constants are replaced; new processes get the environment (`hub_environment`).
"""

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import constants
from PIL import Image

from looc_ldm import LooCLDMPipeline, LooCVQModel
from looc_ldm.hub.upload import push
from tiny import import_file, tiny_autoencoder, tiny_pipeline

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGES_SEEN = 640
VALIDATION = {"data": "/home/ada/pets", "split": "test", "protocol": "clean", "images": 32, "height": 16, "width": 16}
VALIDATION |= {"psnr": 21.25, "ssim": 0.75, "l1": 0.0625, "codebook_use": 0.9375, "perplexity": 12.5}
VALIDATION |= {"bits_per_image": 512.0, "bits_per_pixel": 2.0, "num_codevectors": 16, "codevector_dim": 2}


server = import_file(Path(__file__).with_name("server.py"))


@pytest.fixture(autouse=True)
def _no_network(no_network):
    """No test of the hub reaches the real one."""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub, a client that is logged in, and an empty cache."""
    with server.Hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", running.url)  # behind `model_info` and the like
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "stored_tokens"))
        monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setenv("HF_TOKEN", server.GOOD_TOKEN)
        yield running


@pytest.fixture
def hub_environment(hub, tmp_path):
    """Environment of a new process that sees the same hub, with a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    return kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": server.GOOD_TOKEN,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def autoencoder(seed: int = 0) -> LooCVQModel:
    return tiny_autoencoder(seed=seed, scaling_factor=0.7)


def pipeline(kind: str = "num_class_embeds") -> LooCLDMPipeline:
    """Return a pipeline on `autoencoder`, of two classes."""
    return tiny_pipeline(kind, ["cat, kitten", "dog"], autoencoder())


def write_json(file: Path, content: dict) -> Path:
    file.write_text(json.dumps(content))
    return file


def _run_folder(folder: Path, result: str, preview: str, **figures) -> Path:
    """Write what a finished run leaves beside its weights; return the folder for these."""
    (folder / result).mkdir(parents=True)
    (folder / "previews").mkdir()
    for images, colour in ((IMAGES_SEEN // 2, "red"), (IMAGES_SEEN, "green")):
        Image.new("RGB", (16, 16), colour).save(folder / "previews" / f"{images:09d}.png")
    data = {"path": "/home/ada/pets", "split": "train", "validation_split": "test", "resolution": 16, "fit": "crop"}
    training = {
        **figures,
        "facts": {"data set": "/home/ada/pets", "split": "train", "batch size": 32, "seed": 3, "nothing": None},
        "preview": preview,
        "settings": {"output_dir": str(folder), "total_images": IMAGES_SEEN, "seed": 3, "data": data},
        "data": data,
        "images_seen": IMAGES_SEEN,
    }
    write_json(folder / result / "training.json", training)
    for ignored in ("checkpoints/000000640", "logs"):
        (folder / result / ignored).mkdir(parents=True)
        (folder / result / ignored / "optimizer.bin").write_bytes(b"a pickle")
    return folder / result


@pytest.fixture
def autoencoder_folder(tmp_path) -> Path:
    """`model/` of a finished run."""
    folder = _run_folder(tmp_path / "runs" / "pets_ae", "model", "Reconstructions.", validation=VALIDATION)
    autoencoder().save_pretrained(folder)
    autoencoder(seed=1).save_pretrained(folder, variant="non_ema")
    return folder


@pytest.fixture
def pipeline_folder(tmp_path) -> Path:
    """`pipeline/` of a finished run."""
    folder = _run_folder(tmp_path / "runs" / "pets", "pipeline", "Samples, 25 denoising steps.", first_stage=VALIDATION)
    pipe = pipeline()
    pipe.save_pretrained(folder)
    torch.manual_seed(5)
    live = UNet2DModel.from_config(pipe.unet.config)
    live.save_pretrained(folder / "unet", variant="non_ema")
    return folder


@pytest.fixture
def pushed(hub, pipeline_folder):
    """The hub with that pipeline as `ada/pets`."""
    push(pipeline_folder, "ada/pets")
    return hub


@pytest.fixture
def say(capsys, monkeypatch, tmp_path):
    """Runs `looc-ldm`; returns exit status, stdout, and stderr without progress bars."""
    from looc_ldm.commands.main import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        status = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit:
            status = exit.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def make_pipeline():
    """`pipeline` of a kind."""
    return pipeline
