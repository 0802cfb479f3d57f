"""Time and exactness of the Fréchet distance: statistics and trace of the square root, at 2048 dimensions.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --photos FOLDER --inception-weights FILE

The second also runs a whole FID, at 768 features, of 300 photographs against 300 others, and says where its time goes.

The contestants take turns in one run, and each figure is the fastest of its turns: read the ratios, not the seconds.
Each gets the same two sets of float32 features, positive and correlated as those of the Inception network are:

    looc            FeatureMoments of each set and frechet_distance
    torch-fidelity  fid_features_to_statistics of each set and fid_statistics_to_metric
    scipy           numpy's mean and covariance in float64 and sqrtm of their product, as published

The relative error is that of the distance. What it is compared with costs more time and loses no digits: the trace of
the root is the sum of the singular values of the product of two factors of the covariances, from QR of the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from looc_ldm.files import replace_text
from looc_ldm.metrics.frechet import FeatureMoments, frechet_distance

RESULT = Path(__file__).resolve().parent / "results" / "metrics_cpu.json"
DIM = 2048
PHOTOS, SIDE = 300, 128


def features(count: int, number: int) -> torch.Tensor:
    """A set `(count, DIM)`; all mix the same directions, and each has another mean."""
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0)) / DIM**0.5
    generator = torch.Generator().manual_seed(number)
    directions = torch.randn(count, DIM, generator=generator) * torch.logspace(0, -1.5, DIM)
    return (directions @ mixing + 0.2 + 0.1 * torch.randn(DIM, generator=generator)).relu()


def by_looc(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Distance, and the time at which the statistics were there."""
    moments = [FeatureMoments.from_rows(rows) for rows in (first, second)]
    between = time.perf_counter()
    return frechet_distance(*moments), between


def by_torch_fidelity(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    statistics = [fid_features_to_statistics(rows) for rows in (first, second)]
    between = time.perf_counter()
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID], between


def by_scipy(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    rows = [side.double().numpy() for side in (first, second)]
    means = [side.mean(0) for side in rows]
    covariances = [np.cov(side, rowvar=False) for side in rows]
    between = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a product of covariances of few rows is singular
        root = sqrtm(covariances[0] @ covariances[1]).real
    apart = means[0] - means[1]
    return float(apart @ apart + sum(np.trace(matrix) for matrix in covariances) - 2 * np.trace(root)), between


CONTESTANTS: dict[str, Callable] = {"looc": by_looc, "torch-fidelity": by_torch_fidelity, "scipy": by_scipy}


def exact(first: torch.Tensor, second: torch.Tensor) -> float:
    sides = [rows.double() for rows in (first, second)]
    apart = sides[0].mean(0) - sides[1].mean(0)
    factors = [(rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in sides]
    within = sum(float(factor.square().sum()) for factor in factors)
    triangles = [torch.linalg.qr(factor, mode="r").R for factor in factors]
    return float(apart.square().sum()) + within - 2 * float(torch.linalg.svdvals(triangles[0] @ triangles[1].T).sum())


def cell(count: int, turns: int) -> dict:
    """Figures of every contestant at one number of images a set."""
    sets = features(count, 1), features(count, 2)
    expected = exact(*sets)
    figures = {name: {"statistics_s": [], "root_s": []} for name in CONTESTANTS}
    for _ in range(turns):
        for name, call in CONTESTANTS.items():
            started = time.perf_counter()
            distance, between = call(*sets)
            figures[name]["root_s"].append(time.perf_counter() - between)
            figures[name]["statistics_s"].append(between - started)
            figures[name]["relative_error"] = abs(distance / expected - 1)
    for taken in figures.values():
        totals = [sum(pair) for pair in zip(taken["statistics_s"], taken["root_s"], strict=True)]
        fastest = totals.index(min(totals))
        taken |= {key: round(taken[key][fastest], 4) for key in ("statistics_s", "root_s")}
        taken["seconds"] = round(min(totals), 4)
    for taken in figures.values():
        taken["times_looc"] = round(taken["seconds"] / figures["looc"]["seconds"], 3)
    return {"images": count, "distance": expected, "contestants": figures}


def whole_run(photos: Path, weights: Path) -> dict:
    """Seconds that `looc-ldm evaluate generation` counts: one half as square PNGs, against the other as they are."""
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[: 2 * PHOTOS].tolist()
    if len(order) < 2 * PHOTOS:
        raise SystemExit(f"{photos} holds {len(files)} images; {2 * PHOTOS} are needed.")
    with tempfile.TemporaryDirectory() as folder:
        samples, reference, record = (Path(folder) / name for name in ("samples", "reference", "record.json"))
        samples.mkdir()
        reference.mkdir()
        for number, index in enumerate(order[:PHOTOS]):
            image = ImageOps.fit(Image.open(files[index]).convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC)
            image.save(samples / f"{number}.png")
        for number, index in enumerate(order[PHOTOS:]):
            shutil.copy(files[index], reference / f"{number}{files[index].suffix}")
        command = [sys.executable, "-m", "looc_ldm.cli", "evaluate", "generation", samples, "--reference", reference]
        options = ["--no-cache", "--feature-layer", "768", "--inception-weights", weights, "--output", record]
        subprocess.run([*command, *options], check=True)
        figures = json.loads(record.read_text())
    total = sum(figures["seconds"].values())
    return {
        "photos": PHOTOS,
        "side": SIDE,
        "layer": 768,
        "seconds": figures["seconds"],
        "shares": {name: round(seconds / total, 4) for name, seconds in figures["seconds"].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 3000, 10000], help="images of each set")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--photos", type=Path, help="folder of photographs")
    parser.add_argument("--inception-weights", type=Path, help="torch-fidelity's .pth")
    options = parser.parse_args()
    if (options.photos is None) != (options.inception_weights is None):
        parser.error("--photos and --inception-weights go together")
    by_looc(features(100, 1), features(100, 2))  # starts threads
    record = {
        "command": f"python benchmarks/metrics.py --turns {options.turns}"
        + (" --photos FOLDER --inception-weights FILE" if options.photos is not None else ""),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "turns": options.turns,
        "dim": DIM,
        "versions": {name: version(name) for name in ("torch", "torch-fidelity", "scipy", "numpy")},
        "cells": [],
    }
    for count in options.images:
        record["cells"].append(cell(count, options.turns))
        print(json.dumps(record["cells"][-1]), flush=True)
    if options.photos is not None:
        record["whole_run"] = whole_run(options.photos, options.inception_weights)
        print(json.dumps(record["whole_run"]))
    options.output.parent.mkdir(exist_ok=True)
    replace_text(options.output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
