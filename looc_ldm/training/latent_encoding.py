"""Encode a data set into a cache of latents, one shard at a time, on all processes.

Each shard is written atomically, so that an interrupted encoding keeps its complete shards. The content of a shard
depends only on the images and the batch size: any number of processes writes the same bytes (on CPUs, with the same
number of threads per process). Only one run at a time may write to a folder.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset

from looc_ldm.images.image_set import ImageSet
from looc_ldm.images.pixels import to_float
from looc_ldm.images.unreadable import too_many
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.scaling import encode_latents
from looc_ldm.training.checks import check_cacheable, latent_side
from looc_ldm.training.latent_cache import DESCRIPTION, FORMAT, LatentCache, open_shard
from looc_ldm.training.latent_fingerprint import cache_fingerprint, differences
from looc_ldm.training.log import progress
from looc_ldm.training.moments import Moments
from looc_ldm.training.stopping import start_worker
from looc_ldm.utils.distributed import on_main
from looc_ldm.utils.errors import ConfigError, DataError, UnreadableImage
from looc_ldm.utils.files import make_folder, replace_bytes, replace_text

SHARD_BYTES = 64 * 2**20
# Small data sets get smaller shards, so that each process has some and an interruption loses little work.
SHARDS, LEAST_IMAGES = 64, 64
# Pixels per batch. A CPU is fastest while activations stay in its caches, a GPU once they fill it.
CPU_PIXELS, GPU_PIXELS = 2**16, 2**20
METADATA = "looc_ldm"  # one entry: safetensors writes several in any order, but equal shards must be equal files

logger = logging.getLogger(__name__)


def cache_latents(
    model: LooCVQModel,
    images: ImageSet,
    folder: Path,
    accelerator: Accelerator,
    batch_size: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> LatentCache:
    """Encode a data set, or return the cache of an earlier call with the same model and data. Collective.

    An interrupted encoding is resumed: complete shards are kept, also with a different number of processes. Unreadable
    images are left out, with a warning that names them. Only the model's encoder runs, in the model's data type.

    Args:
        folder: A folder that all processes see.
        batch_size: Images that a process encodes at a time; by device and resolution if not given.
        shard_bytes: Largest size of a file; small data sets have smaller ones.

    Raises UserError if the folder holds latents of a different model, data set or transform, or if too many images are
    unreadable.
    """
    check_cacheable(images.config)
    side = latent_side(model, images.config)
    shape = (model.quantize.vq_embed_dim, side, side)
    shards = divide(Path(folder), len(images), 2 * math.prod(shape) * (2 if images.config.flip else 1), shard_bytes)
    batch_size = batch_size or (CPU_PIXELS if model.device.type == "cpu" else GPU_PIXELS) // images.config.resolution**2
    begun = on_main(accelerator, lambda: _begin(model, images, Path(folder), shards))
    if begun is not None:
        about, missing = begun
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        _encode_shards(model, images, [shards[i] for i in mine], about, max(1, batch_size), accelerator.is_main_process)
        accelerator.wait_for_everyone()
        on_main(accelerator, lambda: _complete(images, Path(folder), shards, shape, about))
    return LatentCache(folder)


def divide(folder: Path, images: int, image_bytes: int, shard_bytes: int = SHARD_BYTES) -> list[tuple[Path, range]]:
    """Return the file of each shard and the indices of its images. Independent of the number of processes."""
    size = max(1, min(shard_bytes // image_bytes, max(LEAST_IMAGES, images // SHARDS)))
    spans = [range(images)[start : start + size] for start in range(0, images, size)]
    names = (f"latents-{number:05d}-of-{len(spans):05d}.safetensors" for number in range(len(spans)))
    return [(folder / name, span) for name, span in zip(names, spans, strict=True)]


# Before and after: on the main process --------------------------------------------------------------------------------


def _begin(
    model: LooCVQModel, images: ImageSet, folder: Path, shards: list[tuple[Path, range]]
) -> tuple[dict, list[int]] | None:
    """Return the metadata of new shards and the numbers of the missing ones; None if the cache is complete."""
    if not len(images):
        raise DataError(f"{images.config.path} has no images to encode.")
    about = {"format": FORMAT, "fingerprint": cache_fingerprint(model, images)}
    if (folder / DESCRIPTION).is_file():
        _refuse_other_latents(folder, LatentCache(folder).fingerprint, about["fingerprint"])
        return None
    make_folder(folder)
    for file in folder.glob("latents-*.safetensors"):
        _refuse_other_latents(folder, _metadata(file)["fingerprint"], about["fingerprint"])
    return about, [number for number, (file, _) in enumerate(shards) if not file.is_file()]


def _refuse_other_latents(folder: Path, found: dict, wanted: dict) -> None:
    changed = differences(found, wanted)
    if changed:
        raise ConfigError(
            f"latents={str(folder)!r} holds latents of {' and '.join(changed)}; delete it, and the checkpoints trained "
            "on it, or give a new folder."
        )


def _metadata(file: Path) -> dict:
    with open_shard(file) as shard:
        metadata = json.loads(shard.metadata()[METADATA])
    if metadata["format"] != FORMAT:
        raise ConfigError(f"{str(file)!r} is from another version of looc-ldm: give a new folder, or delete this one.")
    return metadata


def _complete(
    images: ImageSet, folder: Path, shards: list[tuple[Path, range]], shape: tuple[int, ...], about: dict
) -> None:
    """Write the description, which completes the cache, from the metadata of all shards."""
    if not all(file.is_file() for file, _ in shards):
        raise ConfigError(f"latents={str(folder)!r} is not a folder that all processes see: some shards are missing.")
    found = [_metadata(file) for file, _ in shards]
    unreadable = sum(len(metadata["unreadable"]) for metadata in found)
    if problem := too_many(unreadable, len(images), images.config.max_unreadable_share):
        for (file, _), metadata in zip(shards, found, strict=True):
            if metadata["unreadable"]:
                file.unlink()  # the same command encodes them again once the images are repaired
        raise DataError(problem)
    if unreadable == len(images):
        raise DataError(f"none of the {len(images)} images of {images.config.path} can be read.")
    moments = sum((Moments(**metadata["moments"]) for metadata in found), start=Moments())
    description = {
        **about,
        "classes": images.classes,
        "latent_shape": list(shape),
        "flipped": images.config.flip,
        "unreadable": unreadable,
        "moments": vars(moments),
        "shards": [
            {"file": file.name, "images": len(span) - len(metadata["unreadable"]), "bytes": file.stat().st_size}
            for (file, span), metadata in zip(shards, found, strict=True)
        ],
    }
    replace_text(folder / DESCRIPTION, json.dumps(description, indent=1, sort_keys=True) + "\n")


# Shards: on every process ---------------------------------------------------------------------------------------------


def _encode_shards(
    model: LooCVQModel,
    images: ImageSet,
    shards: list[tuple[Path, range]],
    about: dict,
    batch_size: int,
    shown: bool,
) -> None:
    # No batch spans two shards, so that batches do not depend on which other shards are encoded.
    batches = [(file, span[i : i + batch_size]) for file, span in shards for i in range(0, len(span), batch_size)]
    loader = DataLoader(
        _Batches(images, batches),
        batch_size=None,
        num_workers=min(images.config.num_workers, len(batches)),
        pin_memory=model.device.type == "cuda",
        worker_init_fn=start_worker,
        # A separate generator: a loader draws a number when it is made, which would change the training that follows.
        generator=torch.Generator(),
    )
    bar = progress(loader, "encoding latents", shown=shown)
    for file, of_shard in groupby(bar, key=itemgetter(0)):
        tensors, problems = _encode(model, of_shard, images.config.flip)
        latents = [tensors[name] for name in ("latents", "flipped") if name in tensors]
        moments = sum(map(Moments.of, latents), start=Moments())
        metadata = about | {"unreadable": problems, "moments": vars(moments)}
        replace_bytes(file, save(tensors, {METADATA: json.dumps(metadata, sort_keys=True)}))


class _Batches(Dataset):
    """Batches of images. Item: shard file, pixels, (index, label) of readable images, (index, problem) of others."""

    def __init__(self, images: ImageSet, batches: list[tuple[Path, range]]):
        self.images, self.batches = images, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: int) -> tuple[Path, torch.Tensor, torch.Tensor, list[tuple[int, str]]]:
        file, indices = self.batches[place]
        pixels, labelled, problems = [], [], []
        for index in indices:
            try:
                image, label = self.images.read(index)
            except UnreadableImage as error:
                problems.append((index, str(error)))
                continue
            pixels.append(image)
            labelled.append((index, label))
        stack = torch.stack(pixels) if pixels else torch.empty(0)
        return file, stack, torch.tensor(labelled, dtype=torch.int64).view(-1, 2), problems


def _encode(
    model: LooCVQModel, batches: Iterable[tuple], flip: bool
) -> tuple[dict[str, torch.Tensor], list[tuple[int, str]]]:
    """Return the tensors of a shard, and (index, problem) of each unreadable image."""
    parts: dict[str, list[torch.Tensor]] = {"labelled": [], "latents": [], **({"flipped": []} if flip else {})}
    problems: list[tuple[int, str]] = []
    for _, pixels, labelled, problems_here in batches:
        problems += problems_here
        parts["labelled"].append(labelled)
        if len(labelled):
            batch = to_float(pixels).to(model.device)
            parts["latents"].append(encode_latents(model, batch, scaled=False).half().cpu())
            if flip:
                parts["flipped"].append(encode_latents(model, batch.flip(-1), scaled=False).half().cpu())
    for _, problem in problems:
        logger.warning("%s; it has no latents", problem)
    # An encoder may return channels_last, which safetensors refuses.
    tensors = {name: torch.cat(part).contiguous() for name, part in parts.items() if part}
    indices, labels = tensors.pop("labelled").T.contiguous()
    return {"indices": indices, "labels": labels, **tensors}, problems
