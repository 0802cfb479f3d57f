"""The record of an evaluation: figures, and all that is needed to repeat them and to know what they are of."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from accelerate import Accelerator

from looc_ldm import __version__
from looc_ldm.commands.options import ComputeOptions
from looc_ldm.utils.files import make_folder, replace_text

PACKAGES = (
    *("torch", "torchvision", "diffusers", "accelerate", "transformers", "datasets", "torch-fidelity", "lpips"),
    *("numpy", "pillow"),
)

# Columns of the Markdown table, where there are such figures; those at a layer or network carry its name.
IN_TABLE = (
    *("psnr", "ssim", "l1", "lpips_vgg", "lpips_alex", "rfid", "fid", "kid", "is", "precision", "recall", "class_fid"),
    *("fd", "kd", "cmmd", "codebook_use", "perplexity", "bits_per_pixel", "bits_per_pixel_entropy"),
)
WIDTH = 24  # of names where figures are printed


def make_record(figures: dict, options: ComputeOptions, model: str, **about) -> dict:
    """Return the JSON object of an evaluation.

    Args:
        figures: What was measured, by name, flat; details may be nested.
        options: Options of the command.
        model: What was measured, as typed.
        **about: Further entries: `weights`, `fingerprints`, `seeds`, `machine`, ...

    Returns:
        `dict`: the figures; the entries of `about`; `dtype`; `versions` of Python and packages; `command`; `version`
        of this package; `markdown`, a table of one row.
    """
    record = {**figures, **about, "dtype": options.dtype, "versions": versions()}
    record |= {"command": options.command_line, "version": __version__}
    return record | {"markdown": markdown_table(record, model)}


def machine(device: torch.device, accelerator: Accelerator | None = None) -> dict[str, str | int]:
    """Return what computed the figures, which do not depend on it but for rounding."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "processes": 1 if accelerator is None else accelerator.num_processes}


def versions() -> dict[str, str]:
    """Return the versions of what computes the figures: Python and the packages that a bug report names."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # some are optional
            continue
    return found


def markdown_table(record: dict, model: str) -> str:
    """Return the main figures as a Markdown table of one row, with its head."""
    cells = {
        "model": f"`{_short(model)}`",
        "data": f"`{_short(record['data'])}`",
        "images": f"{record['images'] if 'images' in record else record['images_first']:,}",
        "protocol": record["protocol"],
    }
    for column in IN_TABLE:
        for name, value in record.items():
            if name.partition("@")[0] == column and isinstance(value, float):
                cells[name] = f"{value:.4g}"
    rows = (cells, ["---"] * len(cells), cells.values())
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _short(name: str) -> str:
    """Return a path without the folders it lies in; a name or hub id as it is."""
    return Path(name).resolve().name if Path(name).exists() else name


def print_record(record: dict, notes: list[str]) -> None:
    """Print one figure per line, then notes, then the table."""
    for name, value in record.items():
        if name in ("command", "version", "markdown", "dtype") or isinstance(value, dict | list):
            continue
        print(f"{name:{WIDTH}} {_shown(value) if isinstance(value, float) else value}")
    for note in notes:
        print(note)
    print(f"\n{record['markdown']}")


def _shown(value: float) -> str:
    """Return a figure with four decimals, or, as these say little of KID, three digits."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.01 else f"{value:.3g}"


def write_record(record: dict, file: Path | None) -> None:
    """Write the JSON beside its place and rename it; nothing where `file` is None. No NaN gets into it."""
    if file is not None:
        make_folder(file.parent)
        replace_text(file, json.dumps(record, indent=2, allow_nan=False) + "\n")


def bias_note(images: int, dim: int, name: str) -> str | None:
    """Return a warning if a Fréchet distance is of fewer images than features."""
    if images >= dim:
        return None
    return (
        f"warning: {name} is of {images:,} images, fewer than its {dim:,} features: it is larger than that of many "
        "images, and compares only with figures of as many"
    )
