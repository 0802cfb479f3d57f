"""The package as a whole: what importing it costs, the names it offers, and which part may know which."""

import ast
import importlib
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

import looc_ldm

ROOT = Path(__file__).resolve().parent.parent
# Imports go from right to left only; parts of one tuple do not know each other. See CONTRIBUTING.md.
LAYERS = (
    ("configs",),
    ("utils",),
    ("quantizer",),
    ("models",),
    ("images",),
    ("codes", "metrics", "baselines"),
    ("hub",),
    ("pipelines",),
    ("analysis", "convert"),
    ("training", "demo"),
    ("commands",),
)
LEVELS = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def python(*arguments: str, cwd: Path, path: str | None = None) -> subprocess.CompletedProcess:
    """A new process in a folder, with a package path or none."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = path
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def modules() -> dict[str, Path]:
    """Return every module of the package by its name; not the code of bundled models, which is for diffusers to run."""
    files = [file for file in sorted((ROOT / "looc_ldm").rglob("*.py")) if "data" not in file.parts[:-1]]
    dotted = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in dotted.items()}


def imports(name: str) -> set[str]:
    """Return the modules of the project that a module imports, anywhere in it; a package stands for its `__init__`."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {_module_of(imported) for imported in found if imported.split(".")[0] == "looc_ldm"} - {name}


def _module_of(imported: str) -> str:
    while imported not in modules():
        imported = imported.rpartition(".")[0]
    return imported


def part(module: str) -> str | None:
    """Return the part that a module belongs to; None for the root package and the old paths in it."""
    name = f"{module}.".split(".")[1]
    return name if name in LEVELS else None


# Importing ------------------------------------------------------------------------------------------------------------


def test_importing_it_loads_neither_torch_nor_diffusers_and_costs_no_more_than_diffusers():
    code = """
import sys, time
started = time.perf_counter()
import looc_ldm
ours = time.perf_counter() - started
assert not {"torch", "diffusers", "numpy"} & set(sys.modules)
import diffusers
assert ours < time.perf_counter() - started - ours
"""
    result = python("-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_metrics_load_torch_fidelity_and_torchvision_only_when_they_need_them():
    code = "import sys, looc_ldm.metrics; assert not {'torch_fidelity', 'torchvision'} & set(sys.modules)"
    result = python("-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", looc_ldm.__all__)
def test_every_public_name_is_there(name):
    assert getattr(looc_ldm, name).__name__ == name
    assert name in dir(looc_ldm)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'looc_ldm' has no attribute 'LoocQuantizer'"):
        _ = looc_ldm.LoocQuantizer


def test_no_file_is_imported_under_two_names():
    names = [name for name in modules() if name != "looc_ldm.demo.page" or find_spec("gradio")]
    for name in names:
        importlib.import_module(name)
    names_of = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and name != "__main__":
            names_of.setdefault(Path(file).resolve(), []).append(name)
    for name in names:
        assert names_of[Path(sys.modules[name].__file__).resolve()] == [name]
    assert not {"training", "pipelines", "configs"} & set(sys.modules)


@pytest.mark.parametrize("place", ["in the checkout's root", "elsewhere, on the package path"])
def test_a_trainer_starts_as_a_module(place, tmp_path):
    command = ["-m", "looc_ldm.training.autoencoder", "--help"]
    if place == "in the checkout's root":
        result = python(*command, cwd=ROOT)
    else:
        result = python(*command, cwd=tmp_path, path=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert "--data.path" in result.stdout
    assert result.stderr == ""


# Layers ---------------------------------------------------------------------------------------------------------------


def test_every_folder_is_a_part():
    folders = {file.parent.name for file in (ROOT / "looc_ldm").glob("*/__init__.py")}
    assert folders == set(LEVELS)


@pytest.mark.parametrize("module", [name for name in modules() if part(name)])
def test_imports_go_one_way(module):
    for imported in imports(module):
        other = part(imported)
        assert imported == "looc_ldm" or other is not None, f"{module} imports {imported}, an old path"
        if other is not None and other != part(module):
            assert LEVELS[other] < LEVELS[part(module)], f"{module} imports {imported}"


def test_no_module_imports_itself_by_a_detour():
    sorter = TopologicalSorter({name: imports(name) - {"looc_ldm"} for name in modules() if name != "looc_ldm"})
    sorter.prepare()  # raises CycleError, which names the modules


OLD_PATHS = {
    "looc_ldm.cli": "main",
    "looc_ldm.card": "write_card",
    "looc_ldm.codes": "read_codes",
    "looc_ldm.image_codes": "encode_image",
    "looc_ldm.hub": "push",
    "looc_ldm.metrics": "psnr",
    "looc_ldm.baselines": "ResidualQuantizer",
    "looc_ldm.convert": "convert_unet",
    "looc_ldm.configs": "names",
    "looc_ldm.pipelines": "LooCLDMPipeline",
    "looc_ldm.quantizer": "LooCQuantizer",
    "looc_ldm.errors": "UserError",
    "looc_ldm.training.autoencoder": "train",
    "looc_ldm.training.diffusion": "train",
    "looc_ldm.training.latents": "cache_data_set",
}


@pytest.mark.parametrize(("module", "name"), OLD_PATHS.items())
def test_documented_module_paths_stay(module, name):
    assert getattr(importlib.import_module(module), name).__name__ == name


@pytest.mark.parametrize("folder", ["pipelines", "training", "configs"])
def test_the_top_level_shows_the_parts_as_links(folder):
    if not (ROOT / folder).is_symlink():
        pytest.skip("this file system has no links")
    assert (ROOT / folder).readlink() == Path("looc_ldm", folder)
