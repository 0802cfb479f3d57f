"""Encoding a data set into a cache of latents: by all processes, a shard at a time, going on where it stopped.

The content of a shard depends on the images and the batch size alone: any number of processes writes the same bytes
(of networks whose arithmetic does not change: on CPUs, with one number of threads per process). Only one run at a time
may write into a folder.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import uuid
from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from looc_ldm.images.config import DataConfig
from looc_ldm.images.image_set import ImageSet
from looc_ldm.images.pixels import to_float
from looc_ldm.images.unreadable import too_many
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.scaling import encode_latents
from looc_ldm.training import latent_cache as stored
from looc_ldm.training.latent_cache import LatentCache, Shards
from looc_ldm.training.latent_fingerprint import cache_fingerprint, differences
from looc_ldm.training.moments import Moments
from looc_ldm.training.stopping import SteadyLoader
from looc_ldm.utils.distributed import on_main
from looc_ldm.utils.errors import ConfigError, DataError, ModelError, UnreadableImage, UserError
from looc_ldm.utils.files import make_folder, replace_text

# Pixels of a batch. A CPU is fastest while activations stay in its caches, a GPU once they fill it.
CPU_PIXELS, GPU_PIXELS = 2**16, 2**20
MOMENTS_AT_ONCE = 256  # latents as float64

logger = logging.getLogger(__name__)


def cache_latents(
    model: LooCVQModel,
    images: ImageSet,
    folder: Path,
    accelerator: Accelerator,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = stored.SHARD_BYTES,
) -> LatentCache:
    """Encode a data set, or read the cache that an earlier call with the same model and data has left. Collective.

    An encoding that was interrupted goes on: complete shards are kept, also with a different number of processes.
    Unreadable images are left out, with a warning that names them. Only the model's encoder runs, where the model is.

    Args:
        model: Its encoder's weights and settings are part of the cache's fingerprint.
        images: The images.
        folder: A folder that all processes see.
        accelerator: The processes.
        batch_size: Images that a process encodes at a time; by device and resolution if not given.
        dtype: What the encoder computes in, by autocast. If not given, the model's own, and a cache that is complete is
            taken whatever it was encoded in.
        shard_bytes: Largest size of a file; small data sets have smaller ones.

    Raises UserError if the folder holds something else, latents of another model, data set or transform, or is not the
    same for all processes; if too many images are unreadable; if latents do not fit into half precision.
    """
    check_cacheable(images.config)
    side = latent_side(model, images.config)
    shape = (model.quantize.vq_embed_dim, side, side)
    image_bytes = 2 * math.prod(shape) * (2 if images.config.flip else 1)
    shards = Shards.fitting(Path(folder), len(images), image_bytes, shard_bytes)
    batch_size = batch_size or (CPU_PIXELS if model.device.type == "cpu" else GPU_PIXELS) // images.config.resolution**2
    precision = str(dtype if dtype and model.dtype == torch.float32 else model.dtype).removeprefix("torch.")
    begun = on_main(accelerator, lambda: _begin(model, images, shards, precision, dtype is not None))
    if begun is not None:
        about, missing, sign = begun
        seen = gather_object([(shards.folder / sign).is_file()])
        if accelerator.is_main_process:
            (shards.folder / sign).unlink()
        if not all(seen):
            raise ConfigError(
                f"latents={str(folder)!r} is not the same folder for all processes (process {seen.index(False)} sees "
                "another one): give a folder that they share."
            )
        # A process that fails does not wait for the others: its launcher ends them.
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        _encode_shards(model, images, shards, mine, about, max(1, batch_size), accelerator.is_main_process)
        accelerator.wait_for_everyone()
        on_main(accelerator, lambda: _complete(images, shards, shape, about))
    return LatentCache(folder)


def latent_side(model: LooCVQModel, data: DataConfig) -> int:
    """Return height and width of the latents. Raises ConfigError for a resolution that f does not divide."""
    f = model.downsampling_factor
    if data.resolution % f:
        raise ConfigError(
            f"data.resolution must be a multiple of {f}, as the autoencoder needs, got {data.resolution}."
        )
    return data.resolution // f


def check_cacheable(data: DataConfig) -> None:
    """Raise ConfigError for data that cannot be encoded once and for all."""
    if data.streaming or data.fit == "random_crop":
        setting = "data.streaming=true" if data.streaming else "data.fit=random_crop"
        raise ConfigError(f"latents cannot be cached with {setting}; set cache_latents=false to encode in the loop.")


# Before and after: on the main process --------------------------------------------------------------------------------


def _begin(
    model: LooCVQModel, images: ImageSet, shards: Shards, precision: str, precision_matters: bool
) -> tuple[dict, list[int], str] | None:
    """Return what each shard says of itself, the missing ones, and the name of a file that all processes must see.

    None if the cache is complete.
    """
    folder = shards.folder
    stored.check_cache_folder(folder)
    if not len(images):
        raise DataError(f"{images.config.path} has no images to encode.")
    about = {"format": stored.FORMAT, "fingerprint": cache_fingerprint(model, images)}
    description = stored.read_description(folder)
    if description is not None:
        _check_current(folder, description, about | ({"precision": precision} if precision_matters else {}))
        lost = [shard["file"] for shard in description["shards"] if _size(folder / shard["file"]) != shard["bytes"]]
        if not lost:
            return None
        logger.warning("%s is missing or cut off in %s, which is encoded anew where needed", lost[0], folder)
        (folder / stored.DESCRIPTION).unlink()
    about |= {"precision": precision, "images_per_shard": shards.images_per_shard}
    make_folder(folder)
    for left in folder.glob(".*.partial"):
        left.unlink()
    found = {file: stored.read_about(file) for file in sorted(folder.glob("latents-*.safetensors"))}
    found = {file: made_from for file, made_from in found.items() if made_from}
    for made_from in found.values():
        _check_current(folder, made_from, about)
    if _too_many(images, sum(len(made_from["unreadable"]) for made_from in found.values())):
        found = {file: made_from for file, made_from in found.items() if not made_from["unreadable"]}  # repaired?
    sign = f".seen-by-all-{uuid.uuid4().hex}.partial"  # a new name: file systems remember what was not there
    (folder / sign).touch()
    return about, [number for number in range(len(shards)) if shards.file(number) not in found], sign


def _check_current(folder: Path, found: dict, wanted: dict) -> None:
    """Refuse latents that were made from something else; the message names what differs."""
    changed = differences(found["fingerprint"], wanted["fingerprint"])
    for name, what in (("format", "version"), ("precision", "precision"), ("images_per_shard", "size of shards")):
        if name in wanted and found[name] != wanted[name]:
            changed.append(f"another {what} ({found[name]} -> {wanted[name]})")
    if changed:
        raise ConfigError(
            f"latents={str(folder)!r} holds latents of {' and '.join(changed)}; delete it, and the checkpoints trained "
            "on it, or give a new folder."
        )


def _too_many(images: ImageSet, unreadable: int) -> str | None:
    return too_many(unreadable, len(images), images.config.max_unreadable_share)


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


def _complete(images: ImageSet, shards: Shards, shape: tuple[int, ...], about: dict) -> None:
    """Merge what the shards say, and describe the cache, which completes it."""
    moments, unreadable, files = Moments(), 0, []
    for number in range(len(shards)):
        file = shards.file(number)
        found = stored.read_about(file)
        if found is None:
            raise ConfigError(f"{str(file)!r} is missing: latents must be a folder that all processes see.")
        moments += Moments(**found["moments"])
        unreadable += len(found["unreadable"])
        images_in_it = len(shards.span(number)) - len(found["unreadable"])
        files.append({"file": file.name, "images": images_in_it, "bytes": _size(file)})
    if problem := _too_many(images, unreadable):
        raise DataError(problem)
    if unreadable == len(images):
        raise DataError(f"none of the {len(images)} images of {images.config.path} can be read.")
    description = {
        **{name: about[name] for name in ("format", "fingerprint", "precision")},
        "classes": images.classes,
        "latent_shape": list(shape),
        "flipped": images.config.flip,
        "unreadable": unreadable,
        **{name: getattr(moments, name) for name in ("standard_deviation", "channel_mean", "channel_std")},
        "moments": vars(moments),
        "shards": files,
    }
    replace_text(shards.folder / stored.DESCRIPTION, json.dumps(description, indent=1, sort_keys=True) + "\n")


# Shards: on every process ---------------------------------------------------------------------------------------------


def _encode_shards(
    model: LooCVQModel, images: ImageSet, shards: Shards, mine: list[int], about: dict, batch_size: int, progress: bool
) -> None:
    # Batches end with their shard, so that they do not depend on which others are encoded.
    spans = [(number, shards.span(number)) for number in mine]
    batches = [(number, span[i : i + batch_size]) for number, span in spans for i in range(0, len(span), batch_size)]
    workers = min(images.config.num_workers, len(batches))
    pin_memory = model.device.type == "cuda"
    # Its own generator: a loader draws a number when it is made, which would change the training that follows.
    generator = torch.Generator()
    loader = SteadyLoader(
        _Batches(images, batches), None, num_workers=workers, pin_memory=pin_memory, generator=generator
    )
    seconds = 1 if sys.stderr.isatty() else 60  # then it is a line in a file
    bar = tqdm(loader, "encoding latents", unit="batch", mininterval=seconds, disable=not progress)
    unreadable = 0
    for number, of_shard in groupby(bar, key=itemgetter(0)):
        try:
            tensors, problems = _encode(model, of_shard, about["precision"], images.config.flip)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the device's memory does not suffice to encode {batch_size} images at a time: give "
                "`looc-ldm cache-latents` a smaller --batch-size."
            ) from error
        latents = [tensors[name] for name in ("latents", "flipped") if name in tensors]
        moments = sum((Moments.of(some) for each in latents for some in each.split(MOMENTS_AT_ONCE)), start=Moments())
        stored.write_shard(shards.file(number), tensors, about | {"unreadable": problems, "moments": vars(moments)})
        unreadable += len(problems)
        if problem := _too_many(images, unreadable):  # of this process alone, but early
            raise DataError(problem)


class _Batches(Dataset):
    """Shard, pixels, and (index, label) of the readable images of each batch, and (index, problem) of the others."""

    def __init__(self, images: ImageSet, batches: list[tuple[int, range]]):
        self.images, self.batches = images, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: int) -> tuple[int, torch.Tensor, torch.Tensor, list[tuple[int, str]]]:
        number, indices = self.batches[place]
        pixels, rows, problems = [], [], []
        for index in indices:
            try:
                image, label = self.images.read(index)
            except UnreadableImage as error:
                problems.append((index, str(error)))
                continue
            pixels.append(image)
            rows.append((index, label))
        stack = torch.stack(pixels) if pixels else torch.empty(0)
        return number, stack, torch.tensor(rows, dtype=torch.int64).view(-1, 2), problems


def _encode(
    model: LooCVQModel, batches: Iterable[tuple], precision: str, flip: bool
) -> tuple[dict[str, torch.Tensor], list[tuple[int, str]]]:
    """Return the tensors of a shard, and (index, problem) of each unreadable image."""
    dtype = getattr(torch, precision)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in ("rows", "latents", "flipped")[: 2 + flip]}
    problems: list[tuple[int, str]] = []
    for _, pixels, rows, problems_here in batches:
        problems += problems_here
        parts["rows"].append(rows)
        straight = to_float(pixels).to(model.device)
        with torch.autocast(model.device.type, dtype, enabled=dtype != model.dtype):
            for name, batch in (("latents", straight), ("flipped", straight.flip(-1)))[: (1 + flip) * bool(len(rows))]:
                parts[name].append(encode_latents(model, batch, scaled=False).half().cpu())
    for _, problem in problems:
        logger.warning("%s; it has no latents", problem)
    # An encoder may return channels_last, which safetensors refuses.
    tensors = {name: torch.cat(part).contiguous() for name, part in parts.items() if part}
    indices, labels = tensors.pop("rows").T.contiguous()
    for latents in tensors.values():
        finite = latents.isfinite().flatten(1).all(1)
        if not finite.all():
            raise ModelError(
                f"the latents of image {indices[~finite][0]} are not finite, or larger than half precision holds "
                "(65504); the autoencoder cannot be one whose training went well."
            )
    return {"indices": indices, "labels": labels, **tensors}, problems
