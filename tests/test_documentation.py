"""README and documentation are true: their Python runs, their commands parse, their links lead somewhere."""

import importlib
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from looc_ldm.commands.main import COMMANDS, parse_command
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.config_parsing import parse_config
from looc_ldm.utils.arguments import CacheLatents, parse_options
from tiny import blocks

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CLUSTER = [file for file in sorted((ROOT / "docs" / "cluster").iterdir()) if file.suffix in (".yaml", ".slurm")]
STAGES = {"autoencoder": AutoencoderConfig, "diffusion": DiffusionConfig}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands() -> list[list[str]]:
    """Return the commands of all pages and of the heads of the cluster's files, without environment variables."""
    texts = [block for page in PAGES for block in blocks(page, "bash")]
    texts += ["\n".join(re.findall(r"^#   (.*)$", file.read_text(), re.MULTILINE)) for file in CLUSTER]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    parts = [re.sub(r"^([A-Z_]+=\S+ +)+", "", part).partition(" > ")[0] for part in parts]
    unique = dict.fromkeys(part for part in parts if part.startswith(("looc-ldm", "accelerate", "torchrun", "sbatch")))
    return [shlex.split(part, comments=True) for part in unique]


# Checks of the variables that the last block of a page leaves behind
RESULTS = {
    "README.md": lambda found: len(found["images"]) == 4 and found["indices"].shape == (16, 8, 8, 2),
    "docs/index.md": lambda found: [image.size for image in found["images"]] == [(64, 64)] * 2,
    "docs/sampling.md": lambda found: len(found["images"]) == 4 and found["roses"].size == (64, 64),
    "docs/quantizer.md": lambda found: (
        found["indices"].shape == (1, 8, 8, 2)
        and found["reconstruction"].shape == (1, 3, 32, 32)
        and found["tokens"].shape == (2, 100, 16)
        and found["bits"] == 1024
        and found["rate"] == 7 * 7 * 4 * 8
        and len(found["statistics"].segment_use) == 16
    ),
    "docs/export.md": lambda found: found["indices"].shape == (2, 8, 8, 2) and found["image"].shape == (2, 1, 32, 32),
}


@pytest.mark.filterwarnings("ignore")  # the exporters' own
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page == "docs/export.md" else page for page in RESULTS]
)
def test_python_examples_run_one_after_the_other(page, quickstart_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    for block in blocks(ROOT / page, "python"):
        exec(compile(block, page, "exec"), found)
    assert RESULTS[page](found)


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command_examples_parse(command):
    if command[0] in ("accelerate", "torchrun"):
        launcher = launch_command_parser() if command[:2] == ["accelerate", "launch"] else get_args_parser()
        parsed = launcher.parse_args(command[2:] if command[0] == "accelerate" else command[1:])
        assert parsed.module
        assert (ROOT / (getattr(parsed, "config_file", None) or "README.md")).is_file()
        if parsed.training_script == "looc_ldm.cli":
            parse_command(parsed.training_script_args)
        elif parsed.training_script == "looc_ldm.training.latents":
            parse_options(CacheLatents, parsed.training_script_args, command[0])
        else:
            stage = parsed.training_script.removeprefix("looc_ldm.training.")
            parse_config(STAGES[stage], parsed.training_script_args, command[0])
    elif command[0] == "sbatch":
        assert ROOT / command[1] in CLUSTER
        parse_config(STAGES[command[2]], command[3:], "sbatch")
    elif command[1] == "train" and command[2] in STAGES:
        if "--print_config" not in command:
            parse_config(STAGES[command[2]], command[3:], "looc-ldm")
    else:
        parse_command(command[1:])


def test_every_command_has_an_example():
    shown = {" ".join(command[1:3]) for command in commands()}
    for name in COMMANDS:
        assert any(f"{words} ".startswith(f"{name} ") for words in shown), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_linked_files_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        name, _, heading = target.partition("#")
        if "://" in target or not (name or heading):
            continue
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if heading:
            lines = linked.read_text().splitlines()
            headings = [line.lstrip("# ").lower().replace(" ", "-") for line in lines if line.startswith("#")]
            assert heading in headings, target


PUBLIC = {
    "looc_ldm": None,
    "looc_ldm.baselines": None,
    "looc_ldm.metrics": None,
    "looc_ldm.hub": None,
    "looc_ldm.codes": ("CodesError", "ImageCodes", "read_codes", "write_codes"),
    "looc_ldm.image_codes": ("decode_image", "encode_image"),
    "looc_ldm.card": ("write_card",),
    "looc_ldm.errors": ("UserError",),
    "looc_ldm.convert": ("read_checkpoint", "settings_of", "convert_autoencoder", "convert_ldm", "convert_unet"),
    "looc_ldm.training.config": ("AutoencoderConfig", "DiffusionConfig", "RunConfig", "LossConfig", "OptimizerConfig"),
}


def test_the_reference_has_every_public_name():
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    for module, names in PUBLIC.items():
        for name in names or importlib.import_module(module).__all__:
            assert f"{module}.{name}" in shown


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_builds_without_warnings_and_loads_nothing_from_the_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    text = "".join(page.read_text() for page in tmp_path.rglob("*.html"))
    loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="?([^"\s>]+)', text)
    loaded += re.findall(r'<link[^>]* rel="?stylesheet"? href="?([^"\s>]+)', text)
    assert loaded
    assert not [address for address in loaded if "://" in address]
    commands_page = (tmp_path / "reference" / "commands.html").read_text()
    assert all(f'id="{name.replace(" ", "-")}"' in commands_page for name in COMMANDS)
