"""The README's examples are true: its Python runs, its commands parse, and its tables are those of the scripts."""

import re
import shlex
from pathlib import Path

import pytest

from looc_ldm import LooCVQModel, cli
from looc_ldm.arguments import make_parser
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig, load_config, parse_config
from looc_ldm.training.diffusion import train as train_diffusion

README = Path(__file__).resolve().parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = "".join(blocks("bash")).splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part) for part in parts if part.startswith(("looc-ldm", "accelerate"))]


@pytest.fixture
def quickstart_folder(tmp_path, monkeypatch) -> Path:
    """What a quickstart leaves behind, untrained: the quickstart's networks, and a few steps of its second stage."""
    monkeypatch.chdir(tmp_path)
    first = load_config(AutoencoderConfig, "fashion_mnist/autoencoder")
    model = LooCVQModel(sample_size=32, scaling_factor=1.0, **first.model)
    model.save_pretrained("quickstart/autoencoder/model")
    train_diffusion(
        load_config(
            DiffusionConfig,
            "fashion_mnist/diffusion",
            output_dir="quickstart/diffusion",
            autoencoder="quickstart/autoencoder/model",
            total_images=16,
            batch_size=16,
            preview_steps=1,
            tracker="none",
        )
    )
    return tmp_path


def test_python_examples_run_one_after_the_other(quickstart_folder):
    variables: dict = {}
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), variables)
    assert len(variables["images"]) == 4
    assert variables["images"][0].size == (32, 32)
    assert variables["bits"] == 1024
    assert variables["reconstruction"].shape == (1, 3, 32, 32)
    assert variables["indices"].shape == (16, 8, 8, 2)
    assert variables["tokens"].shape == (2, 100, 16)
    assert len(variables["statistics"].segment_use) == 16


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command_examples_parse(command):
    if command[0] == "accelerate":
        config_class = AutoencoderConfig if command[3].endswith("autoencoder") else DiffusionConfig
        parse_config(config_class, command[4:], "accelerate")
    elif command[1] == "train":
        config_class = AutoencoderConfig if command[2] == "autoencoder" else DiffusionConfig
        parse_config(config_class, command[3:], "looc-ldm")
    else:
        make_parser(cli.COMMANDS).parse_args(command[1:])


def test_there_are_commands_to_check():
    assert len(commands()) > 5


def test_linked_files_and_pictures_exist():
    targets = re.findall(r"\]\(([^)]+)\)", README.read_text())
    local = [target for target in targets if "://" not in target]
    assert "docs/samples.png" in local
    for target in local:
        assert (README.parent / target).exists(), target
