"""Put a trained pipeline into the package: in half precision, measured, and with its card."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from results import ROOT

from looc_ldm import LooCLDMPipeline
from looc_ldm.hub.card import write_card
from looc_ldm.hub.facts import shareable
from looc_ldm.pipelines.sampling import sample_images
from looc_ldm.training.photos.report import side_by_side
from looc_ldm.utils.files import replace_text, write_image

MODELS = ROOT / "looc_ldm" / "data" / "models"
MEASURED = (r"\A---\n.*?^---\n", *(rf"^## {heading}\n.*?(?=^## )" for heading in ("Measured", "Model", "Training")))


def call(*arguments) -> None:
    """Run `looc-ldm`."""
    print("looc-ldm", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "looc_ldm.commands.main", *map(str, arguments)], check=True)


def save_in_half_precision(pipeline: Path, folder: Path) -> LooCLDMPipeline:
    """Save the averaged weights of a pipeline without anything private, and return what was saved."""
    shutil.rmtree(folder, ignore_errors=True)
    # The codebook stays in single precision, as `LooCVQModel` keeps it.
    LooCLDMPipeline.from_pretrained(pipeline, dtype=torch.float16).save_pretrained(folder)
    shutil.copy(pipeline / "training.json", folder)
    for file in folder.rglob("*.json"):  # paths of this machine are private
        settings = shareable(json.loads(file.read_text()))
        settings.pop("_name_or_path", None)
        settings.pop("first_stage", None)  # figures of the training, which the card would show beside the new ones
        replace_text(file, json.dumps(settings, indent=2) + "\n")
    return LooCLDMPipeline.from_pretrained(folder)


def grid(pipe: LooCLDMPipeline, per_class: int, **settings) -> Image.Image:
    """Draw a picture of samples, one row per class."""
    labels = [label for label in sorted(pipe.config.id2label) for _ in range(per_class)]
    drawn = sample_images(pipe, labels, seed=1, batch_size=50, **settings)
    return side_by_side(list(drawn), rows=len(pipe.config.id2label))


def bundle(
    folder: Path, name: str, records: Sequence[Path], samples: Path, most_bytes: int, docs_picture: Path
) -> None:
    """Write the card of a saved pipeline, and move all into the package as the bundled model `name`.

    Args:
        folder: The saved pipeline.
        name: The card's prose is that of the bundled model of this name.
        records: Files of `looc-ldm evaluate ... --output FILE`, for the card's tables.
        samples: The card's picture.
        most_bytes: The script ends with an error if the model is larger.
        docs_picture: File for the same picture, twice as large, in the docs.
    """
    write_card(folder, metrics=records, samples=samples, license="mit")
    card = with_figures((MODELS / name / "README.md").read_text(), (folder / "README.md").read_text())
    replace_text(folder / "README.md", card)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > most_bytes:
        raise SystemExit(f"error: {folder} has {size:,} bytes, more than {most_bytes:,}.")
    shutil.rmtree(MODELS / name)
    shutil.copytree(folder, MODELS / name)
    with Image.open(samples) as image:
        write_image(image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST), docs_picture)


def with_figures(shipped: str, measured: str) -> str:
    """Return the shipped card with the metadata and the tables of a new one."""
    for pattern in MEASURED:
        pattern = re.compile(pattern, re.MULTILINE | re.DOTALL)
        (section,) = pattern.findall(measured)
        shipped = pattern.sub(lambda _, section=section: section, shipped, count=1)
    return shipped
