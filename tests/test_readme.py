"""The README's examples are true: its Python runs, its commands parse, its tables are those of the results."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from looc_ldm.cli import parse_command
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
    elif command[1] == "train":
        config_class = AutoencoderConfig if command[2] == "autoencoder" else DiffusionConfig
        parse_config(config_class, command[3:], "looc-ldm")
    else:
        parse_command(command[1:])


def test_there_are_commands_to_check():
    assert len(commands()) > 5


def test_linked_files_and_pictures_exist():
    targets = re.findall(r"\]\(([^)]+)\)", README.read_text())
    local = [target for target in targets if "://" not in target]
    assert "docs/samples.png" in local
    for target in local:
        file, _, heading = target.partition("#")
        assert (README.parent / file).exists(), target
        if heading:
            lines = (README.parent / file).read_text().splitlines()
            headings = [line.lstrip("# ").lower().replace(" ", "-") for line in lines if line.startswith("#")]
            assert heading in headings, target


@pytest.fixture
def readme(monkeypatch):
    """The script that writes sections of the README."""
    monkeypatch.syspath_prepend(README.parent / "benchmarks")
    import readme

    return readme


@pytest.mark.parametrize("section", ["quantizer", "sampling", "tiling", "training", "metrics"])
def test_figures_are_those_of_the_results(readme, section):
    """Nobody has typed them."""
    written = README.read_text().split(f"<!-- {section} -->\n")[1].split(f"\n<!-- /{section} -->")[0]
    assert written == getattr(readme, section)()


def test_the_tables_are_those_of_the_results(readme, tmp_path):
    import tables_page

    tables_page.write_page(tmp_path)
    assert (README.parent / "docs" / "tables.md").read_text() == (tmp_path / "tables.md").read_text()
    assert f"<!-- tables -->\n{tables_page.summary()}\n<!-- /tables -->" in README.read_text()
    recipes = README.parent / "docs" / "quantizer_recipes.md"
    assert recipes.read_text() == readme.recipes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: SECTION"),
        (["tabels"], "invalid choice: 'tabels' (choose from 'costs', 'quickstart',"),
        (["tables", "folder"], "quickstart needs the folder that it has made, and no other section takes one"),
        (["quickstart"], "quickstart needs the folder that it has made, and no other section takes one"),
        (["quickstart", "nowhere"], "no figures.json in 'nowhere': it must be the folder of a finished quickstart."),
    ],
)
def test_bad_input_of_the_writer_is_one_line(readme, monkeypatch, tmp_path, capsys, arguments, message):
    before = README.read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["readme.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        readme.main()
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert README.read_text() == before
