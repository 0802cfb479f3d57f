"""Cached latents on the disk: a folder of shards, and a description that is written when all of them are there.

    latents-00000-of-00157.safetensors   `latents` and, if the data is flipped, `flipped` (n, c, h, w), float16;
                                         `labels` and `indices`, the image's place in the data set, (n,), int64
    description.json                     format, fingerprint, shards, moments

`latent_encoding.py` writes them.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from looc_ldm.training.moments import Moments
from looc_ldm.utils.errors import ConfigError
from looc_ldm.utils.files import read_json

FORMAT = 3  # raised when the files change, or when the same images would give different latents
DESCRIPTION = "description.json"


def open_shard(file: Path) -> safe_open:
    """Open a shard for reading. Raises ConfigError if it is damaged."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ConfigError(f"{str(file)!r} is damaged ({error}): delete it, and its images are encoded again.") from None


class LatentCache:
    """Cached latents, memory-mapped. Each process opens a shard when it first reads from it.

    Raises ConfigError if the folder holds no complete cache, or one of a different format.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        file = self.folder / DESCRIPTION
        if not file.is_file():
            raise ConfigError(f"no cached latents in {str(self.folder)!r}, or not all of them yet.")
        description = read_json(file)
        if description.get("format") != FORMAT:
            raise ConfigError(
                f"{str(file)!r} does not describe cached latents, or is from another version of looc-ldm: give a new "
                "folder, or delete this one, and the latents are encoded again."
            )
        self.fingerprint: dict[str, dict] = description["fingerprint"]  # see `latent_fingerprint.cache_fingerprint`
        self.shape: tuple[int, int, int] = tuple(description["latent_shape"])  # c, h, w
        self.flipped: bool = description["flipped"]  # whether there are latents of the mirrored images, too
        self.unreadable: int = description["unreadable"]  # images that could not be read and have no latents
        self.moments = Moments(**description["moments"])  # over all latents, also of mirrored images
        self.size = sum(shard["bytes"] for shard in description["shards"])
        self._files = [self.folder / shard["file"] for shard in description["shards"]]
        self._ends = list(accumulate(shard["images"] for shard in description["shards"]))
        self._opened: dict[int, dict[str, torch.Tensor | np.ndarray]] = {}
        for file, shard in zip(self._files, description["shards"], strict=True):
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise ConfigError(f"{str(file)!r} is missing or cut off: delete its folder to encode all images again.")

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int, flipped: bool = False) -> tuple[torch.Tensor, int]:
        """Return latents `(c, h, w)` before quantization, not scaled, and the label (-1 without classes).

        They are float16: rounding moves them by at most 0.05 %, far less than the noise that they are trained with.

        Args:
            index: In [0, len).
            flipped: Return the latents of the mirrored image. Only if the cache has them.
        """
        number = bisect_right(self._ends, index)
        shard = self._shard(number)
        place = index - (self._ends[number - 1] if number else 0)
        return shard["flipped" if flipped else "latents"][place], int(shard["labels"][place])

    def __reduce__(self):
        # A loader's worker that is not forked opens the files itself, instead of getting a copy of all latents.
        return LatentCache, (self.folder,)

    def _shard(self, number: int) -> dict[str, torch.Tensor | np.ndarray]:
        if number not in self._opened:
            # Mapped, not read; no file stays open, however many shards there are.
            with open_shard(self._files[number]) as file:
                shard = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self._opened[number] = shard | {"labels": shard["labels"].numpy()}  # NumPy reads one number faster
        return self._opened[number]
