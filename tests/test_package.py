"""The package as a whole: what importing it costs, the names it offers, and which part may know which."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import looc_ldm

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"looc_ldm": "looc_ldm", "pipelines": "looc_ldm.pipelines", "training": "looc_ldm.training"}
LAYERS = ("looc_ldm", "looc_ldm.pipelines", "looc_ldm.training", "command line")
COMMAND_LINE = ("looc_ldm.__main__", "looc_ldm.cli", "looc_ldm.quickstart", "looc_ldm.commands")


def python(*arguments: str, cwd: Path, path: str | None = None) -> subprocess.CompletedProcess:
    """A new process in a folder, with a package path or none."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = path
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def modules() -> dict[str, Path]:
    """Every module of the checkout, by the name under which it is imported."""
    found = {}
    for folder, package in PARTS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            if file.relative_to(ROOT / folder).parts[0] == "data":
                continue  # code of bundled models, for diffusers to run
            parts = [package, *file.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = file
    return found


def layer(name: str) -> int:
    """Of a module, or of a name in it."""
    if f"{name}.".startswith(tuple(f"{module}." for module in COMMAND_LINE)):
        return LAYERS.index("command line")
    return next(i for i in (2, 1, 0) if f"{name}.".startswith(f"{LAYERS[i]}."))


def imports(file: Path) -> set[str]:
    """What a file imports of the project, anywhere in it but for type checkers."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            for name in node.names:
                public = looc_ldm._HOME_OF.get(name.name) if node.module == "looc_ldm" else None
                found.add(public or f"{node.module}.{name.name}")
    return {name for name in found if name.split(".")[0] in (*PARTS, "configs", "benchmarks", "tests")}


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
    for name in modules():
        importlib.import_module(name)
    names_of = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and name != "__main__":
            names_of.setdefault(Path(file).resolve(), []).append(name)
    for name in modules():
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


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module):
    for imported in imports(modules()[module]):
        assert imported.split(".")[0] == "looc_ldm", f"{module} imports {imported}"
        assert layer(imported) <= layer(module), f"{module} imports {imported}"


def test_the_layers_are_seen_where_they_are():
    assert {layer(module) for module in modules()} == {0, 1, 2, 3}
    assert "looc_ldm.pipelines.sampling.sample_images" in imports(ROOT / "looc_ldm" / "commands" / "sample.py")
    assert "looc_ldm.quantizer.LooCQuantizer" in imports(ROOT / "looc_ldm" / "autoencoder.py")
