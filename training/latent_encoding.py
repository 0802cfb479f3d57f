"""Encoding a data set into a cache of latents: by all processes, a shard at a time, going on where it stopped.

Only one run at a time may write into a folder. Functions marked *collective* must be called by every process.
"""

from __future__ import annotations

import json
import logging
import math
import uuid
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from looc_ldm.autoencoder import LooCVQModel
from looc_ldm.distributed import on_main
from looc_ldm.errors import ConfigError, DataError, UnreadableImage
from looc_ldm.files import make_folder, replace_text
from looc_ldm.training.config import DataConfig
from looc_ldm.training.data import ImageSet
from looc_ldm.training.latent_cache import (
    DESCRIPTION,
    FORMAT,
    SHARD_BYTES,
    UNREADABLE,
    LatentCache,
    Shards,
    check_cache_folder,
    read_about,
    read_description,
)
from looc_ldm.training.latent_fingerprint import cache_fingerprint, differences
from looc_ldm.training.latent_shards import Progress, check_unreadable, encode_shards
from looc_ldm.training.moments import Moments
from looc_ldm.training.reports import write_unreadable

logger = logging.getLogger(__name__)

T = TypeVar("T")


def cache_latents(
    model: LooCVQModel,
    images: ImageSet,
    folder: Path,
    accelerator: Accelerator,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> LatentCache:
    """Encode a data set, or read the cache that an earlier call with the same model and data has left. Collective.

    An encoding that was interrupted goes on: shards that are complete are kept, also with another number of processes.
    The model's encoder alone runs, on the device it is on.

    Args:
        model (`LooCVQModel`): Its weights and settings are part of the cache's fingerprint.
        images (`ImageSet`): Those that cannot be read are left out, and named in `unreadable.txt`.
        folder (`Path`): A folder that all processes see.
        accelerator (`Accelerator`): Knows the processes.
        batch_size (`int`, *optional*): Images that a process encodes at a time; by device and resolution if not given.
        dtype (`torch.dtype`, *optional*): What the encoder computes in, by autocast. If not given, the model's own, and
            a cache that is complete is taken whatever it was encoded in.
        shard_bytes (`int`): Size of a file, at most; small data sets have smaller ones.

    Raises:
        ConfigError: The folder holds something else, latents of another model, data set or transform, or is not the
            same for all processes; or the data is streamed or cropped at random.
        DataError: More images than `data.max_unreadable_share` allows cannot be read.
        ModelError: Latents do not fit into half precision.
        UserError: A file cannot be written, or the device's memory does not suffice.
    """
    folder = Path(folder)
    check_cacheable(images.config)
    side = latent_side(model, images.config)
    shape = (model.quantize.vq_embed_dim, side, side)
    image_bytes = 2 * math.prod(shape) * (2 if images.config.flip else 1)
    shards = Shards.fitting(folder, len(images), image_bytes, shard_bytes)
    computed_in = dtype if dtype is not None and model.dtype == torch.float32 else model.dtype
    precision = str(computed_in).removeprefix("torch.")

    about, missing = on_main(accelerator, lambda: _begin(model, images, shards, precision, dtype is not None))
    if missing is not None:
        _check_all_see(folder, accelerator)
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        with Progress(shards, missing, mine, accelerator.is_main_process) as progress:
            # A process that fails does not wait for the others: its launcher ends them.
            encode_shards(model, images, shards, mine, shape, about, batch_size, progress)
            accelerator.wait_for_everyone()
        on_main(accelerator, lambda: _complete(images, shards, shape, about))
    return LatentCache(folder)


def latent_side(model: LooCVQModel, data: DataConfig) -> int:
    """Height and width of the latents of a data set. Raises ConfigError for a resolution that f does not divide."""
    f = model.downsampling_factor
    if data.resolution % f:
        raise ConfigError(
            f"data.resolution must be a multiple of {f}, as the autoencoder needs, got {data.resolution}."
        )
    return data.resolution // f


def check_cacheable(data: DataConfig) -> None:
    """Raises ConfigError for data that cannot be encoded once and for all."""
    if data.streaming or data.fit == "random_crop":
        setting = "data.streaming=true" if data.streaming else "data.fit=random_crop"
        raise ConfigError(f"latents cannot be cached with {setting}; set cache_latents=false to encode in the loop.")


def _check_all_see(folder: Path, accelerator: Accelerator) -> None:
    """Raises ConfigError where processes on other machines have a folder of their own by that name. Collective."""
    if accelerator.num_processes == 1:
        return
    # A new name each time: file systems remember for a while that a file was not there.
    sign = folder / on_main(accelerator, lambda: f".seen-by-all-{uuid.uuid4().hex}")
    on_main(accelerator, lambda: replace_text(sign, ""))
    seen = gather_object([sign.is_file()])
    if accelerator.is_main_process:
        sign.unlink()
    if not all(seen):
        raise ConfigError(
            f"latents={str(folder)!r} is not the same folder for all processes (process {seen.index(False)} sees "
            "another one): give a folder that they share."
        )


# Before and after: on the main process --------------------------------------------------------------------------------


def _begin(
    model: LooCVQModel, images: ImageSet, shards: Shards, precision: str, precision_matters: bool
) -> tuple[dict, list[int] | None]:
    """What every shard says of itself, and the numbers of those to be written; None where the cache is complete."""
    folder = shards.folder
    check_cache_folder(folder)
    if not len(images):
        raise DataError(f"{images.config.path} has no images to encode.")
    about = {"format": FORMAT, "fingerprint": cache_fingerprint(model, images)}
    description = read_description(folder)
    if description is not None:
        _check_current(folder, description, about | ({"precision": precision} if precision_matters else {}))
        lost = [shard["file"] for shard in description["shards"] if _size(folder / shard["file"]) != shard["bytes"]]
        if not lost:
            return about, None
        logger.warning("%s is missing or cut off in %s, which is encoded anew where needed", lost[0], folder)
        (folder / DESCRIPTION).unlink()
    about |= {"precision": precision, "images_per_shard": shards.images_per_shard}
    make_folder(folder)
    for left in (*folder.glob(".*.partial"), *folder.glob(".seen-by-all-*")):
        left.unlink()
    missing, unreadable = [], []
    found = {file: read_about(file) for file in sorted(folder.glob("latents-*.safetensors"))}
    for made_from in filter(None, found.values()):
        _check_current(folder, made_from, about)
    for number in range(len(shards)):
        made_from = found.get(shards.file(number))
        if made_from is None or any(_is_readable(images, index) for index, _ in made_from["unreadable"]):
            shards.file(number).unlink(missing_ok=True)
            missing.append(number)
        else:
            unreadable += [name for _, name in made_from["unreadable"]]
    check_unreadable(images, folder, unreadable)
    return about, missing


def _check_current(folder: Path, found: dict, wanted: dict) -> None:
    """Refuse latents that were made from something else; the message names what differs."""
    if found["format"] != wanted["format"]:
        raise ConfigError(f"latents={str(folder)!r} holds latents of another version of looc-ldm; delete it.")
    changed = differences(found["fingerprint"], wanted["fingerprint"])
    for name, what in (("precision", "another precision"), ("images_per_shard", "another size of shards")):
        if name in wanted and found[name] != wanted[name]:
            changed.append(f"{what} ({found[name]} -> {wanted[name]})")
    if changed:
        raise ConfigError(
            f"latents={str(folder)!r} holds latents of {' and '.join(changed)}; delete it, and the checkpoints trained "
            "on it, or give a new folder."
        )


def _is_readable(images: ImageSet, index: int) -> bool:
    """Whether an image that could not be read has been repaired."""
    try:
        images.read(index)
    except UnreadableImage:
        return False
    return True


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


def _complete(images: ImageSet, shards: Shards, shape: tuple[int, ...], about: dict) -> None:
    """Merge what the shards say, and describe the cache, which completes it."""
    moments, unreadable, files = Moments(), [], []
    for number in range(len(shards)):
        file = shards.file(number)
        found = read_about(file) if file.is_file() else None
        if found is None:
            raise ConfigError(f"{str(file)!r} is missing: latents must be a folder that all processes see.")
        moments += Moments(**found["moments"])
        unreadable += [name for _, name in found["unreadable"]]
        images_in_it = len(shards.span(number)) - len(found["unreadable"])
        files.append({"file": file.name, "images": images_in_it, "bytes": _size(file)})
    check_unreadable(images, shards.folder, unreadable)
    write_unreadable(shards.folder / UNREADABLE, unreadable)
    if len(unreadable) == len(images):
        raise DataError(f"none of the {len(images)} images of {images.config.path} can be read.")
    description = {
        "format": FORMAT,
        "fingerprint": about["fingerprint"],
        "precision": about["precision"],
        "classes": images.classes,
        "latent_shape": list(shape),
        "flipped": images.config.flip,
        "unreadable": len(unreadable),
        "standard_deviation": moments.standard_deviation,
        "channel_mean": moments.channel_mean,
        "channel_std": moments.channel_std,
        "moments": vars(moments),
        "shards": files,
    }
    replace_text(shards.folder / DESCRIPTION, json.dumps(description, indent=1, sort_keys=True) + "\n")
