"""Features of samples and of real images for `looc-ldm evaluate generation`: one pass over each, real ones cached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from looc_ldm.commands.image_sets import DrawnImages, NpzImages, StoredImages
from looc_ldm.commands.measures import GenerationMeasures
from looc_ldm.commands.options import EvaluateGeneration
from looc_ldm.metrics.collect import Features
from looc_ldm.metrics.generation import METRICS, collect_features, rows_needed
from looc_ldm.metrics.reference import ReferenceCache, default_cache_folder
from looc_ldm.metrics.samples import NpzWriter, npz_writer
from looc_ldm.metrics.shares import share_of_batches
from looc_ldm.utils.files import check_folder, make_folder

READ_BATCH = 50  # images that are read at a time
# Of published statistics: torch-fidelity's network is theirs.
STATISTICS_LAYER = "2048"

Samples = DrawnImages | NpzImages | StoredImages


@dataclass
class Reference:
    """The real images, and what their features are kept under.

    Attributes:
        images: The set.
        key: Fingerprint of the data and of what is done to it, for the cache and the record.
        about: `data`, `split` and `fit`, for the record.
    """

    images: StoredImages | NpzImages
    key: dict
    about: dict


def open_cache(options: EvaluateGeneration) -> ReferenceCache:
    if options.no_cache:
        return ReferenceCache(None)
    folder = options.cache or default_cache_folder()
    check_folder(folder)
    return ReferenceCache(folder)


def reference_features(
    reference: Reference,
    measures: GenerationMeasures,
    networks: Mapping,
    cache: ReferenceCache,
    device: torch.device,
    accelerator: Accelerator | None,
) -> dict[str, Features]:
    """Return features of the real images by network, complete on the main process. Collective."""
    is_main = accelerator is None or accelerator.is_main_process
    compared = [name for name in measures.metrics if not METRICS[name].logits]
    rows = {METRICS[name].network: rows_needed(compared, METRICS[name].network) for name in compared}
    found: dict[str, Features] = {}
    statistics = None
    if "fid" in compared and has_usable_statistics(measures, reference):
        statistics = reference.images.statistics
        if not rows["inception"]:
            found["inception"] = Features(statistics, rows=None, logits=None)
    keys = {name: _cache_key(reference, measures, name) for name in rows}
    if is_main:
        for name in rows.keys() - found.keys():
            stored = cache.load(keys[name] | {"rows": True})
            if stored is None and not rows[name]:
                stored = cache.load(keys[name] | {"rows": False})
            if stored is not None:
                found[name] = stored
    missing = [name for name in rows if name not in found]
    if accelerator is not None:
        (missing,) = broadcast_object_list([missing])  # as the main process sees it
    if missing:
        shares = share_of_batches(len(reference.images), READ_BATCH, accelerator)
        batches = reference.images.batches(shares)
        with tqdm(batches, "real images", len(shares), unit="batch", delay=1, disable=not is_main) as bar:
            needed = {name: networks[name] for name in missing}
            keep = [name for name in missing if rows[name]]
            collected = collect_features(bar, needed, keep, accelerator, logits=False, device=device)
        if is_main:
            for name, features in collected.items():
                cache.save(keys[name] | {"rows": rows[name]}, features)
        found |= collected
    if statistics is not None and "inception" in found:  # from the cache only the main process has them
        found["inception"].moments = statistics
    return found


def _cache_key(reference: Reference, measures: GenerationMeasures, network: str) -> dict:
    """Return all that the features depend on.

    Not where weights lie, nor whether logits were computed beside the features.
    """
    identity = {k: v for k, v in measures.extractors[network].identity().items() if k not in ("weights", "logits")}
    return {**reference.key, "features": identity}


def sample_features(
    samples: Samples,
    measures: GenerationMeasures,
    networks: Mapping,
    export_npz: Path | None,
    device: torch.device,
    accelerator: Accelerator | None,
) -> dict[str, Features]:
    """Return features of samples by network, complete on the main process, and write the npz. Collective."""
    is_main = accelerator is None or accelerator.is_main_process
    drawn = isinstance(samples, DrawnImages)
    batch_size = samples.sampling.batch_size if drawn else READ_BATCH
    shares = share_of_batches(len(samples), batch_size, accelerator)
    hidden = drawn or not is_main  # samples that are drawn have a bar of their own
    writing = nullcontext()
    if export_npz is not None and is_main:
        make_folder(export_npz.parent)
        writing = npz_writer(export_npz, len(samples), samples.labels)
    with (
        tqdm(samples.batches(shares), "samples", len(shares), unit="batch", delay=1, disable=hidden) as bar,
        writing as writer,
    ):
        images: Iterable[torch.Tensor] = bar
        if export_npz is not None:
            processes = 1 if accelerator is None else accelerator.num_processes
            images = _exported(bar, -(-len(samples) // (batch_size * processes)), writer, accelerator)
        keep = [name for name in networks if rows_needed(measures.metrics, name)]
        return collect_features(images, networks, keep, accelerator, device=device)


def _exported(
    batches: Iterable[torch.Tensor], rounds: int, writer: NpzWriter | None, accelerator: Accelerator | None
) -> Iterator[torch.Tensor]:
    """Yield the batches of this process, while the main one writes those of all. Collective, `rounds` times."""
    iterator = iter(batches)
    for _ in range(rounds):
        batch = next(iterator, None)
        of_all = [batch] if accelerator is None else gather_object([batch])
        if writer is not None:
            for each in of_all:
                if each is not None:
                    writer.add(each)
        if batch is not None:
            yield batch
    next(iterator, None)  # there is none; it completes the bar


def has_usable_statistics(measures: GenerationMeasures, reference: Reference) -> bool:
    return (
        isinstance(reference.images, NpzImages)
        and reference.images.has_statistics
        and measures.protocol.name == "clean"
        and "inception" in measures.extractors
        and measures.extractors["inception"].name == STATISTICS_LAYER
    )
