"""The rows of the paper's small-image tables, and LooC with other rules of learning: which quantizer, which sizes.

A row is trained once for each set of images, however many tables it stands in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn as nn

from looc_ldm import LooCQuantizer
from looc_ldm.baselines import ProductQuantizer, StochasticQuantizer, gaussian_likelihood

N_Q = 128  # channels of the latents in LooC's tables
PUBLISHED = {"distance": "cosine", "codebook_update": "gradient", "gradient": "straight-through"}
EMA = {"codebook_update": "ema", "gradient": "rotation"}
# Suffix of a LooC row's name: settings that differ from the published ones, and their name for readers.
VARIANTS = {
    "": ({}, "published rule"),
    "-no-revival": ({"anchor": "none"}, "published rule without revival"),
    "-rotation": ({"gradient": "rotation"}, "published rule, rotation trick"),
    "-ema": ({"codebook_update": "ema"}, "moving average"),
    "-ema-rotation": (EMA, "moving average, rotation trick"),
    "-ema-euclidean": ({"codebook_update": "ema", "distance": "euclidean"}, "moving average, euclidean distance"),
    # 32 times 0.25: the weight that PQ's encoder sees, because the published loss of PQ is a sum over 32 codebooks.
    "-commitment8": ({"commitment_weight": 8.0}, "published rule, commitment 8"),
    "-ema-rotation-commitment8": (
        {**EMA, "commitment_weight": 8.0},
        "moving average, rotation trick, commitment 8",
    ),
}
RECIPES = [variant for variant in VARIANTS if variant != "-no-revival"]


@dataclass(frozen=True)
class Row:
    """One quantizer in the published small VQ-VAE.

    Attributes:
        name: Name on the command line and in the results.
        method: Name for readers.
        make_quantizer: Makes the quantizer, given the number of batches of the training.
        objective: Loss of `small_vqvae.train` if it is not the published one.
    """

    name: str
    method: str
    make_quantizer: Callable[[int], nn.Module]
    objective: Callable | None = None


def _looc(codevectors: int, dim: int, factor: int = 1, variant: str = "") -> Row:
    changes, words = VARIANTS[variant]
    name = f"looc-{codevectors}x{dim}" + (f"-s{factor}" if factor > 1 else "") + variant
    size = f"{codevectors}×{dim}" + (" (m = 1)" if dim == N_Q else "")
    settings = {"interpolation_factor": factor, **PUBLISHED, **changes}
    method = f"LooC {size}, s={factor}, {words}"
    return Row(name, method, lambda _: LooCQuantizer(N_Q, codevectors, dim, **settings))


def _cvq(name: str, method: str, factor: int = 1, **settings) -> Row:
    """Return LooC with one segment of 64 channels."""
    return Row(name, method, lambda _: LooCQuantizer(64, 512, 64, factor, **settings))


def _rows() -> list[Row]:
    sizes_3 = [(256, dim) for dim in (4, 8, 16, 32, 64)]
    sizes_4 = [(256, 128), (512, 64), (1024, 32), (2048, 16), (4096, 8), (8192, 4)]
    sizes_5 = [(codevectors, 4) for codevectors in (16, 24, 32, 64, 128, 256, 512, 1024)]
    rows = [_looc(*size) for size in dict.fromkeys(sizes_3 + sizes_4 + sizes_5)]
    rows += [_looc(size, 4, variant=variant) for size in (32, 256) for variant in RECIPES[1:]]
    rows += [_looc(256, 4, factor) for factor in (2, 3, 4)]
    rows += [_looc(*size, variant="-no-revival") for size in ((256, 4), (1024, 4))]
    sq = lambda batches: StochasticQuantizer(64, 512, annealing=2 / batches)  # noqa: E731
    pq = lambda _: ProductQuantizer(N_Q, 8, 4, **PUBLISHED)  # noqa: E731
    # Other methods, at their published sizes.
    rows += [
        _cvq("vq-512x64", "VQ-VAE 512×64 (n_q = 64)", anchor="none", **{**PUBLISHED, "distance": "euclidean"}),
        Row("sq-512x64", "SQ-VAE 512×64 (n_q = 64)", sq, gaussian_likelihood),
        _cvq("cvq-512x64", "CVQ-VAE 512×64 (n_q = 64)", **PUBLISHED),
        _cvq("cvq-512x64-s2", "LooC with m = 1, s=2: 512×64 (n_q = 64), published rule", 2, **PUBLISHED),
        Row("pq-32x8x4", "PQ, 32 codebooks of 8×4", pq),
    ]
    return rows


ROWS = {row.name: row for row in _rows()}
TABLES: dict[str, list[str]] = {
    "1": ["vq-512x64", "sq-512x64", "cvq-512x64", "pq-32x8x4", "looc-32x4", "looc-256x4"],
    "3": [f"looc-256x{dim}" for dim in (4, 8, 16, 32, 64)],
    "4": ["looc-256x128", "looc-512x64", "looc-1024x32", "looc-2048x16", "looc-4096x8", "looc-8192x4"],
    "5": [f"looc-{codevectors}x4" for codevectors in (16, 24, 32, 64, 128, 256, 512, 1024)],
    "6": ["cvq-512x64", "cvq-512x64-s2", "looc-256x4", "looc-256x4-s2", "looc-256x4-s3", "looc-256x4-s4"],
    "7": ["looc-256x4-no-revival", "looc-1024x4-no-revival", "looc-256x4", "looc-1024x4"],
    "recipes": [f"looc-{size}{variant}" for size in ("32x4", "256x4") for variant in RECIPES],
    "all": list(ROWS),
}
TABLES["8"] = TABLES["1"]
# Rows of the paper's tables (paper_tables.json) by ours.
PAPER_ROWS: dict[str, dict[str, str]] = {
    "1": {
        "vq-512x64": "vq",
        "sq-512x64": "sq",
        "cvq-512x64": "cvq",
        "pq-32x8x4": "pq",
        "looc-32x4": "looc-32x4",
        "looc-256x4": "looc-256x4",
    },
    **{table: {row: row.removeprefix("looc-") for row in TABLES[table]} for table in ("3", "4", "5")},
}
