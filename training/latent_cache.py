"""Cached latents on the disk: a folder of shards, and a description that is written when all of them are there.

    latents-00000-of-00157.safetensors   `latents` and, where the data is flipped, `flipped` (n, c, h, w), float16;
                                         `labels` and `indices`, the image's place in the data set, (n,), int64
    description.json                     format, fingerprint, shards, mean and deviation
    unreadable.txt                       names of images that could not be read and have no latents, one a line

Every file is written beside its place and renamed. Each shard says in its metadata what it was made from.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from looc_ldm.errors import ConfigError
from looc_ldm.files import renamed_when_complete
from looc_ldm.training.moments import Moments

FORMAT = 3  # of a cache's files; also raised when the same images would give other latents than before
DESCRIPTION, UNREADABLE = "description.json", "unreadable.txt"
SHARD_BYTES = 64 * 2**20
# Small data sets are cut into smaller shards: there are some for each process, and an interruption costs little.
SHARDS, LEAST_IMAGES = 64, 64
METADATA = "looc_ldm"  # one entry, since safetensors writes several in any order, and equal shards are equal files
_SHARD = r"latents-\d{5,}-of-\d{5,}\.safetensors"
_OWN_FILES = re.compile(
    rf"description\.json|unreadable\.txt|{_SHARD}|\.(description\.json|unreadable\.txt)\.partial"
    rf"|\.{_SHARD}\.[0-9a-f]+\.partial|\.seen-by-all-[0-9a-f]+"
)


class LatentCache:
    """Cached latents, memory-mapped. Each process opens the shards itself, when it first reads from them.

    Attributes:
        shape (`tuple[int, int, int]`): c, h, w of the latents.
        flipped (`bool`): Whether there are latents of the mirrored images, too.
        classes (`list[str]`): Names of the classes; empty where the data has none.
        unreadable (`int`): Images that could not be read and have no latents.
        precision (`str`): What the encoder computed in.
        moments (`Moments`): Of all latents, those of mirrored images included.
        standard_deviation (`float`): Of all latents about their mean.
        channel_mean, channel_std (`list[float]`): Of each channel.
        size (`int`): Bytes on the disk.

    Raises:
        ConfigError: The folder holds no cached latents, an encoding that is not complete, or an older format.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        description = read_description(self.folder)
        if description is None:
            raise ConfigError(f"no cached latents in {str(self.folder)!r}, or not all of them yet.")
        self.shape = tuple(description["latent_shape"])
        self.flipped = description["flipped"]
        self.classes = description["classes"]
        self.unreadable = description["unreadable"]
        self.precision = description["precision"]
        self.moments = Moments(**description["moments"])
        self.standard_deviation = self.moments.standard_deviation
        self.channel_mean, self.channel_std = self.moments.channel_mean, self.moments.channel_std
        self.size = sum(shard["bytes"] for shard in description["shards"])
        self._files = [shard["file"] for shard in description["shards"]]
        self._ends = list(accumulate(shard["images"] for shard in description["shards"]))
        self._opened: dict[int, dict[str, torch.Tensor]] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int, flipped: bool = False) -> tuple[torch.Tensor, int]:
        """Latents `(c, h, w)` before quantization, not scaled, and the label (-1 without classes).

        They are float16: rounding moves them by at most 0.05 %, far less than the noise that they are trained with.

        Args:
            index: In [0, len).
            flipped: Those of the mirrored image; only where there are such.
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
        """The places in the data set of the images that have latents, int64 `(len,)`, rising."""
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
    """How the images of a data set are divided into files: the same whatever the number of processes.

    Attributes:
        folder (`Path`): Of the cache.
        images (`int`): In the data set.
        images_per_shard (`int`): Of the last one, the rest.
    """

    folder: Path
    images: int
    images_per_shard: int

    @classmethod
    def fitting(cls, folder: Path, images: int, image_bytes: int, shard_bytes: int = SHARD_BYTES) -> Shards:
        """Of at most `shard_bytes`, where an image has `image_bytes`."""
        return cls(folder, images, max(1, min(shard_bytes // image_bytes, max(LEAST_IMAGES, images // SHARDS))))

    def __len__(self) -> int:
        return -(-self.images // self.images_per_shard)

    def file(self, number: int) -> Path:
        """Of one shard."""
        return self.folder / f"latents-{number:05d}-of-{len(self):05d}.safetensors"

    def span(self, number: int) -> range:
        """Indices of the images of one shard, in the data set."""
        first = number * self.images_per_shard
        return range(first, min(first + self.images_per_shard, self.images))


def check_cache_folder(folder: Path) -> None:
    """Raises ConfigError for a folder that holds something else than cached latents, or the beginning of them."""
    if not folder.is_dir():
        return
    names = [entry.name for entry in folder.iterdir()]
    if DESCRIPTION not in names and any(_OWN_FILES.fullmatch(name) is None for name in names):
        raise ConfigError(f"latents={str(folder)!r} holds something else than cached latents; give a new folder.")


def read_description(folder: Path) -> dict | None:
    """What a complete cache says of itself; None where there is none. Raises ConfigError for another format."""
    file = folder / DESCRIPTION
    if not file.is_file():
        return None
    try:
        description = json.loads(file.read_text())
        ours = "fingerprint" in description
    except (ValueError, TypeError):
        ours = False
    if not ours:
        raise ConfigError(
            f"{str(file)!r} is not the description of cached latents; delete the file, or give a new folder."
        )
    if description.get("format") != FORMAT:
        raise ConfigError(
            f"latents={str(folder)!r} holds latents in the format of another version of looc-ldm; delete it, and they "
            "are encoded anew."
        )
    return description


def write_shard(file: Path, tensors: dict[str, np.ndarray], about: dict) -> None:
    """Write a shard and what it was made from beside its place, and rename it.

    Raises:
        UserError: The system refused something, for instance because the disk is full.
    """
    content = save(tensors, {METADATA: json.dumps(about, sort_keys=True)})
    # Not even a process that was left over from an interrupted encoding may write to the same file.
    own = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
    with renamed_when_complete(file, own) as partial, partial.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())  # else a power cut can leave the name without all of the content


def read_about(file: Path) -> dict | None:
    """What a shard was made from; None for a file that is cut off, or no shard."""
    try:
        with safe_open(file, framework="pt") as opened:
            return json.loads((opened.metadata() or {})[METADATA])
    except (SafetensorError, KeyError, ValueError):
        return None
