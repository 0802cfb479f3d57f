"""The examples of docs/hub.md are true: its Python runs, and its table names options that there are."""

import re
from pathlib import Path

from diffusers.utils import logging as diffusers_logging

from looc_ldm.commands.options import Push
from looc_ldm.utils.arguments import make_parser
from tiny import blocks

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "hub.md"


def test_python_examples_run_one_after_the_other(hub, quickstart_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").symlink_to(quickstart_folder / "quickstart")
    diffusers_logging.set_verbosity_error()
    try:
        exec(compile("".join(blocks(PAGE, "python")), "docs/hub.md", "exec"), {})
    finally:
        diffusers_logging.set_verbosity_warning()
    assert "Licence of the weights: mit." in capsys.readouterr().out
    assert hub.repositories["ada/fashion"].private
    assert set(hub.repositories["ada/fashion"].branches) == {"main", "again"}


def test_the_table_of_options_names_those_of_push():
    push = make_parser(Push, "looc-ldm push")
    options = {name for action in push._actions for name in action.option_strings} - {"-h", "--help"}
    assert set(re.findall(r"^\| `(--[\w-]+)", PAGE.read_text(), re.MULTILINE)) == options
