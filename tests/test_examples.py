"""The examples run, and the commands in them parse."""

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from looc_ldm.commands.main import parse_command
from tiny import TINY_CLASSES

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run_script(name: str, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_quantizer_in_a_model_of_ones_own_learns(monkeypatch, capsys):
    run_script("quantizer_in_your_model.py", monkeypatch, "--steps", "200")
    figures = capsys.readouterr().out.splitlines()
    assert float(figures[0].removeprefix("PSNR ").partition(" dB at 4.00 bits per pixel")[0]) > 14
    assert figures[1].endswith("% of the codebook is used")


def test_samples_are_one_row_per_class(monkeypatch, tmp_path, pipeline):
    grid = tmp_path / "grid.png"
    run_script("sample.py", monkeypatch, pipeline, "--output", str(grid), "--columns", "2", "--steps", "4")
    assert Image.open(grid).size == (2 * 16, len(TINY_CLASSES) * 16)


def test_the_commands_of_the_script_for_own_images_parse(tmp_path):
    command = tmp_path / "looc-ldm"
    command.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/commands\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", EXAMPLES / "own_images.sh", "photos", "runs/mine", "0.5"], env=environment, check=True)
    commands = [shlex.split(line) for line in (tmp_path / "commands").read_text().splitlines()]
    assert [parse_command(words)[0] for words in commands] == [
        "train photos",
        "evaluate reconstruction",
        "analyze",
        "sample",
    ]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    text = (EXAMPLES / "first_steps.ipynb").read_text()
    assert "--total_images 16000" in text  # two minutes for a reader; the test needs only a few steps
    notebook = nbformat.reads(text.replace("--total_images 16000", "--total_images 1600"), as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs" / "first_steps" / "model" / "training.json").is_file()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output
    )
    assert "bits per pixel" in printed
    assert "of the codebook is used" in printed
