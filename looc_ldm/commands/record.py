"""The record of an evaluation: its figures, and everything that is needed to repeat them."""

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

# Columns of the Markdown table, if there are such figures. Those at a layer or network carry its name.
IN_TABLE = (
    *("psnr", "ssim", "l1", "lpips_vgg", "lpips_alex", "rfid", "fid", "kid", "is", "precision", "recall", "class_fid"),
    *("copies", "fd", "kd", "cmmd", "codebook_use", "perplexity", "bits_per_pixel", "bits_per_pixel_entropy"),
)


def make_record(figures: dict, options: ComputeOptions, model: str, **about) -> dict:
    """Return the JSON object of an evaluation.

    It holds the figures by name, the entries of `about` (`weights`, `fingerprints`, `seeds`, `machine`, ...), `dtype`,
    `versions`, `command`, `version`, and `markdown`, a table of one row for this model.
    """
    record = {**figures, **about, "dtype": options.dtype, "versions": versions()}
    record |= {"command": options.command_line, "version": __version__}
    return record | {"markdown": markdown_table(record, model)}


def machine(accelerator: Accelerator) -> dict[str, str | int]:
    """Return the device and the number of processes. Figures do not depend on them, rounding apart."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "processes": accelerator.num_processes}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that figures depend on, and that a bug report names."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # some are optional
            continue
    return found


def markdown_table(record: dict, model: str) -> str:
    """Return the main figures as a Markdown table of one row, with its head."""

    def short(name: str) -> str:  # no folders of this machine
        return Path(name).resolve().name if Path(name).exists() else name

    cells = {
        "model": f"`{short(model)}`",
        "data": f"`{short(record['data'])}`",
        "images": f"{record['images'] if 'images' in record else record['images_first']:,}",
        "protocol": record["protocol"],
    }
    for column in IN_TABLE:
        for name, value in record.items():
            if name.partition("@")[0] == column and isinstance(value, float):
                cells[name] = f"{value:.4g}"
    rows = (cells, ["---"] * len(cells), cells.values())
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_and_print(record: dict, file: Path | None) -> None:
    """Write the JSON file, if one is given; print one figure per line, then `notes`, then the table.

    Raises:
        ValueError: A figure is NaN or infinite. Nothing is written.
    """
    if file is not None:
        make_folder(file.parent)
        replace_text(file, json.dumps(record, indent=2, allow_nan=False) + "\n")
    for name, value in printed_figures(record):
        print(f"{name:24} {value}")
    print("\n".join([*record["notes"], "", record["markdown"]]))


def printed_figures(record: dict) -> list[tuple[str, str]]:
    """Return names and values of the figures, as they are shown to the user."""
    shown = []
    for name, value in record.items():
        if name in ("command", "version", "markdown", "dtype") or isinstance(value, dict | list):
            continue
        if isinstance(value, float):  # four decimals say little of KID
            value = f"{value:.4f}" if value == 0 or abs(value) >= 0.01 else f"{value:.3g}"
        shown.append((name, str(value)))
    return shown


def bias_note(images: int, dim: int, name: str) -> list[str]:
    """Return a warning if a Fréchet distance is of fewer images than features, else an empty list."""
    if images >= dim:
        return []
    return [
        f"warning: {name} is measured on {images:,} images, fewer than its {dim:,} features: it is too large, and "
        "comparable only at the same number of images"
    ]
