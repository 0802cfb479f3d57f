"""The examples of docs/hub.md are true: its Python runs, its commands parse and name options that there are."""

import re
import shlex
from pathlib import Path

import pytest
from diffusers.utils import logging as diffusers_logging

from looc_ldm.commands.main import parse_command
from looc_ldm.commands.options import Push
from looc_ldm.utils.arguments import make_parser

TEXT = (Path(__file__).resolve().parent.parent.parent / "docs" / "hub.md").read_text()


def blocks(language: str) -> str:
    return "".join(re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))


COMMANDS = [shlex.split(line) for line in blocks("bash").splitlines() if line.startswith("looc-ldm")]


def test_python_examples_run_one_after_the_other(hub, quickstart_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").symlink_to(quickstart_folder / "quickstart")
    diffusers_logging.set_verbosity_error()
    try:
        exec(compile(blocks("python"), "docs/hub.md", "exec"), {})
    finally:
        diffusers_logging.set_verbosity_warning()
    assert "Licence of the weights: mit." in capsys.readouterr().out
    assert hub.repositories["ada/fashion"].private
    assert set(hub.repositories["ada/fashion"].branches) == {"main", "again"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_examples_parse(command):
    parse_command(command[1:])


def test_the_table_of_options_names_those_of_push():
    push = make_parser(Push, "looc-ldm push")
    options = {name for action in push._actions for name in action.option_strings} - {"-h", "--help"}
    assert set(re.findall(r"^\| `(--[\w-]+)", TEXT, re.MULTILINE)) == options
