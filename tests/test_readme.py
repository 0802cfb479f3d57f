"""The README's examples are true: its Python runs, its commands parse, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from looc_ldm.commands.main import parse_command
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.config_parsing import parse_config

README = Path(__file__).resolve().parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = "".join(blocks("bash")).splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part) for part in parts if part.startswith(("looc-ldm", "accelerate"))]


def test_python_examples_run_one_after_the_other(quickstart_folder):
    variables: dict = {}
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), variables)
    assert len(commands()) > 5  # else the test of commands says nothing
    assert len(variables["images"]) == 4
    assert variables["images"][0].size == (32, 32)
    assert variables["bits"] == 1024
    assert variables["rate"] == 7 * 7 * 4 * 8
    assert variables["reconstruction"].shape == (1, 3, 32, 32)
    assert variables["indices"].shape == (16, 8, 8, 2)
    assert variables["tokens"].shape == (2, 100, 16)
    assert len(variables["statistics"].segment_use) == 16


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command_examples_parse(command):
    if command[0] == "accelerate":
        module = command.index("-m") + 1
        config_class = AutoencoderConfig if command[module].endswith("autoencoder") else DiffusionConfig
        parse_config(config_class, command[module + 1 :], "accelerate")
    elif command[1] == "train" and command[2] != "photos":
        config_class = AutoencoderConfig if command[2] == "autoencoder" else DiffusionConfig
        parse_config(config_class, command[3:], "looc-ldm")
    else:
        parse_command(command[1:])


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md", "docs/tables.md", "docs/quantizer_recipes.md"])
def test_linked_files_and_pictures_exist(page):
    file = README.parent / page
    targets = re.findall(r"\]\(([^)]+)\)", file.read_text())
    local = [target for target in targets if "://" not in target]
    assert local
    for target in local:
        name, _, heading = target.partition("#")
        linked = file.parent / name if name else file
        assert linked.exists(), target
        if heading:
            lines = linked.read_text().splitlines()
            headings = [line.lstrip("# ").lower().replace(" ", "-") for line in lines if line.startswith("#")]
            assert heading in headings, target
