"""Latents of a data set, encoded once for stage 2, and their statistics."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from operator import add
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from looc_ldm.autoencoder import LooCVQModel
from looc_ldm.errors import ConfigError
from looc_ldm.images import to_float
from looc_ldm.scaling import scale_latents
from looc_ldm.training.config import DataConfig
from looc_ldm.training.data import FLIP, NOISE, ImageSet, Stream, random_at

FORMAT = 2  # of a cache's files; an older one is made anew


@dataclass(frozen=True)
class Moments:
    """Sums over latents, from which means and deviations follow; sums of parts add up.

    Attributes:
        count (`int`): Values of a channel.
        total, squares (`tuple[float, ...]`): Sum and sum of squares of each channel; empty before the first latents.
    """

    count: int = 0
    total: tuple[float, ...] = ()
    squares: tuple[float, ...] = ()

    @classmethod
    def of(cls, latents: torch.Tensor) -> Moments:
        """Of latents `(B, c, h, w)`."""
        wide = latents.cpu().double().transpose(0, 1).flatten(1)  # (c, B * h * w)
        return cls(wide.shape[1], tuple(wide.sum(1).tolist()), tuple(wide.square().sum(1).tolist()))

    def __add__(self, other: Moments) -> Moments:
        if not self.count or not other.count:
            return self if self.count else other
        total = tuple(map(add, self.total, other.total))
        return Moments(self.count + other.count, total, tuple(map(add, self.squares, other.squares)))

    @property
    def channel_mean(self) -> list[float]:
        """The mean of each channel."""
        return [total / self.count for total in self.total]

    @property
    def channel_std(self) -> list[float]:
        """The standard deviation of each channel about its mean."""
        pairs = zip(self.channel_mean, self.squares, strict=True)
        return [math.sqrt(max(squares / self.count - mean**2, 0.0)) for mean, squares in pairs]

    @property
    def standard_deviation(self) -> float:
        """Of all values about their common mean."""
        count = self.count * len(self.total)
        return math.sqrt(max(sum(self.squares) / count - (sum(self.total) / count) ** 2, 0.0))


class LatentCache:
    """Cached latents, memory-mapped.

    Attributes:
        latents (`np.ndarray` of shape `(n, c, h, w)`, float16): Latents before quantization, not scaled. Rounding to
            half precision moves them by at most 0.05 %, far less than the noise that they are trained with.
        flipped (`np.ndarray`, *optional*): Those of the mirrored images, where the data is flipped.
        labels (`np.ndarray` of shape `(n,)`, int64): -1 without classes.
        classes (`list[str]`): Names of the classes.
        standard_deviation (`float`): Of all latents about their mean.
        channel_mean, channel_std (`list[float]`): Of each channel.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        description = json.loads((folder / "description.json").read_text())
        self.latents = np.load(folder / "latents.npy", mmap_mode="r")
        flipped = folder / "flipped.npy"
        self.flipped = np.load(flipped, mmap_mode="r") if flipped.is_file() else None
        self.labels = np.load(folder / "labels.npy")
        self.classes = description["classes"]
        self.standard_deviation = description["standard_deviation"]
        self.channel_mean, self.channel_std = description["channel_mean"], description["channel_std"]

    def __len__(self) -> int:
        return len(self.latents)

    def __reduce__(self):
        # A loader's worker that is not forked opens the files itself, instead of getting a copy of all latents.
        return LatentCache, (self.folder,)


class LatentStream(Stream):
    """Training examples of stage 2.

    Item p is `(latents, label, noise, time, dropout)`: the scaled latents `(c, h, w)`, their class, noise of the same
    shape, and two uniform numbers in [0, 1) that decide the timestep and whether the label is dropped. All that is
    random belongs to the position p, so that no loop or process has randomness of its own.
    """

    def __init__(self, cache: LatentCache, model: LooCVQModel, seed: int):
        super().__init__(len(cache), seed)
        self.cache = cache
        # Scaling is affine: its values at 0 and 1 say all, and a loader's workers need not hold the model.
        ends = torch.arange(2.0).view(2, 1, 1, 1).expand(2, cache.latents.shape[1], 1, 1)
        self.shift, one = scale_latents(model, ends).unbind()
        self.scale = one - self.shift  # (c, 1, 1)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int, torch.Tensor, np.float32, np.float32]:
        index = self.index_at(position)
        source = self.cache.latents
        if self.cache.flipped is not None and random_at(self.seed, FLIP, position).random() < 0.5:
            source = self.cache.flipped
        latents = torch.from_numpy(source[index].astype(np.float32)) * self.scale + self.shift
        random = random_at(self.seed, NOISE, position)
        time, dropout = random.random(2, dtype=np.float32)
        noise = torch.from_numpy(random.standard_normal(latents.shape, dtype=np.float32))
        return latents, int(self.cache.labels[index]), noise, time, dropout


def cache_latents(model: LooCVQModel, images: ImageSet, folder: Path, accelerator: Accelerator) -> LatentCache:
    """Encode a data set, or read the cache that an earlier call with the same model and data has left.

    Every process encodes its share; the folder must be one that all of them see. Collective.

    Raises:
        ConfigError: The folder holds something else, or latents of another model, data set or transform.
    """
    check_cache_folder(folder)
    fingerprint = cache_fingerprint(model, images)
    if (folder / "description.json").is_file():
        _check_current(folder, fingerprint)
    else:
        partial = folder.with_name(folder.name + ".partial")
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            side = latent_side(model, images.config)
            shape = (len(images), model.quantize.vq_embed_dim, side, side)
            for name in ("latents", "flipped") if images.config.flip else ("latents",):
                np.lib.format.open_memmap(partial / f"{name}.npy", mode="w+", dtype=np.float16, shape=shape).flush()
        accelerator.wait_for_everyone()
        shares = gather_object([_encode_share(model, images, partial, accelerator)])
        moments = sum(shares, start=Moments())
        if accelerator.is_main_process:
            np.save(partial / "labels.npy", images.labels())
            description = {
                "fingerprint": fingerprint,
                "classes": images.classes,
                "standard_deviation": moments.standard_deviation,
                "channel_mean": moments.channel_mean,
                "channel_std": moments.channel_std,
            }
            (partial / "description.json").write_text(json.dumps(description))
            os.replace(partial, folder)
        accelerator.wait_for_everyone()
    return LatentCache(folder)


@torch.no_grad()
def measure_scaling_factor(model: LooCVQModel, batches: Iterable[torch.Tensor]) -> float:
    """1 / standard deviation of the latents of images `(B, C, H, W)` in [-1, 1].

    Raises:
        ValueError: There are no images, or all latents are equal.
    """
    moments = measure_latents(model, batches)
    if not moments.count or not moments.standard_deviation:
        raise ValueError(f"no scaling factor: {'all latents are equal' if moments.count else 'there are no images'}.")
    return 1 / moments.standard_deviation


@torch.no_grad()
def measure_latents(model: LooCVQModel, batches: Iterable[torch.Tensor]) -> Moments:
    """Mean and deviation of the latents of images `(B, C, H, W)` in [-1, 1].

    To whiten each channel: `model.register_to_config(scaling_factor=1.0, latents_mean=moments.channel_mean,
    latents_std=moments.channel_std)`.
    """
    moments = Moments()
    for batch in batches:
        moments += Moments.of(model.encode(batch.to(model.device, model.dtype)).latents)
    return moments


def latent_side(model: LooCVQModel, data: DataConfig) -> int:
    """Height and width of the latents of a data set. Raises ConfigError for a resolution that f does not divide."""
    f = model.downsampling_factor
    if data.resolution % f:
        raise ConfigError(
            f"data.resolution must be a multiple of {f}, as the autoencoder needs, got {data.resolution}."
        )
    return data.resolution // f


def cache_fingerprint(model: LooCVQModel, images: ImageSet) -> str:
    """Identifies latents by what made them: weights of the encoder, images and transform."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    data = asdict(images.config)
    del data["num_workers"]
    digest.update(json.dumps([FORMAT, data, len(images), images.classes], sort_keys=True).encode())
    return digest.hexdigest()


def check_cache_folder(folder: Path) -> None:
    """Raises ConfigError for a folder that holds something else than cached latents."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "description.json").is_file():
        raise ConfigError(f"latents={str(folder)!r} holds something else than cached latents; give a new folder.")


def _check_current(folder: Path, fingerprint: str) -> None:
    if json.loads((folder / "description.json").read_text())["fingerprint"] != fingerprint:
        raise ConfigError(
            f"latents={str(folder)!r} holds latents of another autoencoder, data set or transform; "
            "delete it, and the checkpoints trained on it, or give a new folder."
        )


@torch.no_grad()
def _encode_share(model: LooCVQModel, images: ImageSet, folder: Path, accelerator: Accelerator) -> Moments:
    """Encode this process's contiguous share into the files; returns the moments of its latents."""
    first = len(images) * accelerator.process_index // accelerator.num_processes
    last = len(images) * (accelerator.process_index + 1) // accelerator.num_processes
    files = {
        flip: np.lib.format.open_memmap(folder / f"{name}.npy", mode="r+")
        for flip, name in ((False, "latents"), (True, "flipped"))
        if images.config.flip or not flip
    }
    loader = DataLoader(Subset(images, range(first, last)), batch_size=64, num_workers=images.config.num_workers)
    moments = Moments()
    with tqdm(total=last - first, desc="encoding latents", unit="img", disable=not accelerator.is_main_process) as bar:
        for pixels, _ in loader:
            batch = to_float(pixels).to(accelerator.device)
            for flip, file in files.items():
                latents = model.encode(batch.flip(-1) if flip else batch).latents.float().cpu()
                file[first : first + len(batch)] = latents.numpy()
                moments += Moments.of(latents)
            first += len(batch)
            bar.update(len(batch))
    for file in files.values():
        file.flush()
    return moments
