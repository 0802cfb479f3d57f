"""Results of the benchmarks, one JSON object per line, and the Markdown tables that docs show of them."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from looc_ldm.utils.errors import UserError
from looc_ldm.utils.files import replace_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"


def read_results(file: Path) -> list[dict]:
    """Return the lines of a file, none if it does not exist."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def add_result(file: Path, result: dict) -> None:
    """Append a line to a file. Several processes may do so at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(result) + "\n")


def replace_results(file: Path, results: Sequence[dict], keys: Sequence[str]) -> None:
    """Put results into a file in place of those with the same values of `keys`."""

    def identity(result: dict) -> tuple:
        return tuple(result.get(key) for key in keys)

    new = {identity(result) for result in results}
    kept = [result for result in read_results(file) if identity(result) not in new]
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, "".join(json.dumps(result) + "\n" for result in [*kept, *results]))


def circumstances(device: str, *packages: str) -> dict:
    """Return what a measurement depends on: processor, threads, commit, and versions of torch and other packages."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "code": revision(),
        "versions": {name: version(name) for name in ("torch", "diffusers", *packages)},
    }


def revision() -> str | None:
    """Return the commit, "-dirty" if files have changed since, or None outside of a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def markdown_table(rows: Sequence[dict], align_left: int = 1) -> str:
    """Return rows with the same keys as a Markdown table. None is an empty cell, the first columns are text."""
    head = list(rows[0])
    rule = ["---" if i < align_left else "---:" for i in range(len(head))]
    lines = [head, rule, *([("" if row[key] is None else str(row[key])) for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(file: Path, tables: dict[str, str]) -> None:
    """Write each table between its markers in a page, `<!-- NAME -->` and `<!-- /NAME -->`."""
    page = file.read_text()
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        page, count = pattern.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", page)
        if count != 1:
            raise UserError(f"{str(file)!r} must have the markers of {name!r} once, got them {count} times.")
    replace_text(file, page)
