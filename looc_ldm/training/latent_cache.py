"""Cached latents on the disk: a folder of shards, and a description that is written when all of them are there.

    latents-00000-of-00157.safetensors   `latents` and, if the data is flipped, `flipped` (n, c, h, w), float16;
                                         `labels` and `indices`, the image's place in the data set, (n,), int64
    description.json                     format, fingerprint, shards, mean and deviation

Every file is written beside its place and renamed. Each shard says in its metadata what it was made from.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from looc_ldm.training.moments import Moments
from looc_ldm.utils.errors import ConfigError
from looc_ldm.utils.files import replace_bytes

FORMAT = 3  # of a cache's files; also raised when the same images would give other latents than before
DESCRIPTION = "description.json"
SHARD_BYTES = 64 * 2**20
# Small data sets are cut into smaller shards: there are some for each process, and an interruption costs little.
SHARDS, LEAST_IMAGES = 64, 64
METADATA = "looc_ldm"  # one entry, since safetensors writes several in any order, and equal shards are equal files


class LatentCache:
    """Cached latents, memory-mapped. Each process opens the shards itself, when it first reads from them.

    Raises ConfigError if the folder holds no cached latents, an encoding that is not complete, or an older format.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        description = read_description(self.folder)
        if description is None:
            raise ConfigError(f"no cached latents in {str(self.folder)!r}, or not all of them yet.")
        self.shape: tuple[int, int, int] = tuple(description["latent_shape"])  # c, h, w
        self.flipped: bool = description["flipped"]  # whether there are latents of the mirrored images, too
        self.classes: list[str] = description["classes"]  # empty if the data has none
        self.unreadable: int = description["unreadable"]  # images that could not be read and have no latents
        self.precision: str = description["precision"]  # what the encoder computed in
        self.moments = Moments(**description["moments"])  # of all latents, those of mirrored images included
        self.standard_deviation = self.moments.standard_deviation
        self.channel_mean, self.channel_std = self.moments.channel_mean, self.moments.channel_std
        self.size = sum(shard["bytes"] for shard in description["shards"])
        self._files = [shard["file"] for shard in description["shards"]]
        self._ends = list(accumulate(shard["images"] for shard in description["shards"]))
        self._opened: dict[int, dict[str, torch.Tensor | np.ndarray]] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int, flipped: bool = False) -> tuple[torch.Tensor, int]:
        """Return latents `(c, h, w)` before quantization, not scaled, and the label (-1 without classes).

        They are float16: rounding moves them by at most 0.05 %, far less than the noise that they are trained with.

        Args:
            index: In [0, len).
            flipped: Return those of the mirrored image; only if there are such.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}.")
        number = bisect_right(self._ends, index)
        shard = self._shard(number)
        row = index - (self._ends[number - 1] if number else 0)
        return shard["flipped" if flipped else "latents"][row], int(shard["labels"][row])

    @property
    def labels(self) -> np.ndarray:
        """All labels, int64 `(len,)`; -1 without classes."""
        return np.concatenate([self._shard(number)["labels"] for number in range(len(self._files))])

    @property
    def indices(self) -> np.ndarray:
        """Indices in the data set of the images that have latents, int64 `(len,)`, rising."""
        return np.concatenate([self._shard(number)["indices"] for number in range(len(self._files))])

    def __reduce__(self):
        # A loader's worker that is not forked opens the files itself, instead of getting a copy of all latents.
        return LatentCache, (self.folder,)

    def _shard(self, number: int) -> dict[str, torch.Tensor | np.ndarray]:
        if number not in self._opened:
            # Mapped, not read; no file stays open, however many shards there are.
            with safe_open(self.folder / self._files[number], framework="pt") as file:
                shard = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            shard |= {name: shard[name].numpy() for name in ("labels", "indices")}  # numbers of these are read faster
            self._opened[number] = shard
        return self._opened[number]


@dataclass(frozen=True)
class Shards:
    """How the images of a data set are divided into files: the same for any number of processes."""

    folder: Path
    images: int  # of the data set
    images_per_shard: int  # the last shard has the rest

    @classmethod
    def fitting(cls, folder: Path, images: int, image_bytes: int, shard_bytes: int = SHARD_BYTES) -> Shards:
        """Cut into shards of at most `shard_bytes`, where an image has `image_bytes`."""
        return cls(folder, images, max(1, min(shard_bytes // image_bytes, max(LEAST_IMAGES, images // SHARDS))))

    def __len__(self) -> int:
        return -(-self.images // self.images_per_shard)

    def file(self, number: int) -> Path:
        """Return the file of one shard."""
        return self.folder / f"latents-{number:05d}-of-{len(self):05d}.safetensors"

    def span(self, number: int) -> range:
        """Return the indices of the images of one shard, in the data set."""
        return range(self.images)[number * self.images_per_shard :][: self.images_per_shard]


def check_cache_folder(folder: Path) -> None:
    """Raise ConfigError for a folder that holds something else than cached latents, or the beginning of them."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    ours = re.compile(r"latents-\d+-of-\d+\.safetensors|unreadable\.txt|\..*")
    if DESCRIPTION not in names and not all(map(ours.fullmatch, names)):
        raise ConfigError(f"latents={str(folder)!r} holds something else than cached latents; give a new folder.")


def read_description(folder: Path) -> dict | None:
    """Return the description of a complete cache; None if there is none. Raises ConfigError for a different format."""
    file = folder / DESCRIPTION
    if not file.is_file():
        return None
    try:
        description = json.loads(file.read_text())
    except ValueError:
        description = None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ConfigError(
            f"{str(file)!r} is not the description of cached latents, or in the format of another version of looc-ldm: "
            "give a new folder, or delete this one if it holds latents, and they are encoded anew."
        )
    return description


def write_shard(file: Path, tensors: dict[str, torch.Tensor], about: dict) -> None:
    """Write a shard and what it was made from beside its place, and rename it. Raises UserError if that fails."""
    replace_bytes(file, save(tensors, {METADATA: json.dumps(about, sort_keys=True)}))


def read_about(file: Path) -> dict | None:
    """Return what a shard was made from; None for a file that is missing, cut off, or no shard."""
    try:
        with safe_open(file, framework="pt") as opened:
            return json.loads((opened.metadata() or {})[METADATA])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
