"""Features of samples and of real images for `looc-ldm evaluate generation`: one pass over each, real ones cached."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from looc_ldm.commands.image_sets import DrawnImages, NpzImages, StoredImages
from looc_ldm.commands.measures import GenerationMeasures
from looc_ldm.metrics.collect import Features
from looc_ldm.metrics.frechet import FeatureMoments
from looc_ldm.metrics.generation import METRICS, collect_features, vectors_needed
from looc_ldm.metrics.reference import ReferenceCache
from looc_ldm.metrics.samples import NpzWriter, npz_writer
from looc_ldm.metrics.shares import share_of_batches
from looc_ldm.utils.files import make_folder

READ_BATCH = 50  # images that are read at a time

Reference = NpzImages | StoredImages
Samples = DrawnImages | Reference


def reference_features(
    reference: Reference,
    measures: GenerationMeasures,
    networks: Mapping,
    cache: ReferenceCache,
    accelerator: Accelerator,
    what: str = "real images to compare the samples with (--reference-images N reads fewer)",
) -> dict[str, Features]:
    """Return features of real images by network, complete on the main process. Collective. `what` tells the user."""
    is_main = accelerator.is_main_process
    compared = [name for name in measures.metrics if not METRICS[name].logits]
    rows = {METRICS[name].network: vectors_needed(compared, METRICS[name].network) for name in compared}
    found: dict[str, Features] = {}
    statistics = stored_statistics(measures, reference)
    if statistics is not None and not rows["inception"]:
        found["inception"] = Features(statistics, vectors=None, logits=None)
    keys = {name: _cache_key(reference, measures, name) for name in rows}
    if is_main:
        for name in rows.keys() - found.keys():
            stored = cache.load(keys[name] | {"rows": True})
            if stored is None and not rows[name]:
                stored = cache.load(keys[name] | {"rows": False})
            if stored is not None:
                found[name] = stored
    (missing,) = broadcast_object_list([[name for name in rows if name not in found]])  # as the main process sees it
    if missing:
        if is_main:
            kept = "" if cache.folder is None else "; their features are kept for further runs"
            print(f"reading {len(reference):,} {what}{kept}", file=sys.stderr)
        shares = share_of_batches(len(reference), READ_BATCH, accelerator)
        batches = reference.batches(shares)
        with tqdm(batches, "real images", len(shares), unit="batch", delay=1, disable=not is_main) as bar:
            needed = {name: networks[name] for name in missing}
            keep = [name for name in missing if rows[name]]
            collected = collect_features(bar, needed, keep, accelerator, logits=False, device=accelerator.device)
        if is_main:
            for name, features in collected.items():
                cache.save(keys[name] | {"rows": rows[name]}, features)
        found |= collected
    if statistics is not None and "inception" in found:  # only the main process has what the cache held
        found["inception"].moments = statistics
    return found


def stored_statistics(measures: GenerationMeasures, reference: Reference) -> FeatureMoments | None:
    """Return the statistics in the reference if FID can be measured against them: they are of the usual features."""
    usual = "fid" in measures.metrics and measures.protocol.name == "clean"
    if not usual or not isinstance(reference, NpzImages) or not reference.has_statistics:
        return None
    fits = reference.statistics.dim == measures.extractors["inception"].dim
    return reference.statistics if fits else None


def _cache_key(reference: Reference, measures: GenerationMeasures, network: str) -> dict:
    """Return everything that the features depend on."""
    # The place of the weights is not part of it, nor that logits were computed beside the features.
    identity = {k: v for k, v in measures.extractors[network].identity().items() if k not in ("weights", "logits")}
    return {**reference.key, "features": identity}


def sample_features(
    samples: Samples, measures: GenerationMeasures, networks: Mapping, export_npz: Path | None, accelerator: Accelerator
) -> dict[str, Features]:
    """Return features of samples by network, complete on the main process, and write the npz. Collective."""
    is_main, drawn = accelerator.is_main_process, isinstance(samples, DrawnImages)
    batch_size = samples.sampling.batch_size if drawn else READ_BATCH
    shares = share_of_batches(len(samples), batch_size, accelerator)
    writing = nullcontext()
    if export_npz is not None and is_main:
        make_folder(export_npz.parent)
        writing = npz_writer(export_npz, len(samples), samples.labels)
    hidden = drawn or not is_main  # samples that are drawn have a bar of their own
    with (
        tqdm(samples.batches(shares), "samples", len(shares), unit="batch", delay=1, disable=hidden) as bar,
        writing as writer,
    ):
        images: Iterable[torch.Tensor] = bar
        if export_npz is not None:
            images = _exported(bar, -(-len(samples) // (batch_size * accelerator.num_processes)), writer)
        keep = [name for name in networks if vectors_needed(measures.metrics, name)]
        return collect_features(images, networks, keep, accelerator, device=accelerator.device)


def _exported(batches: Iterable[torch.Tensor], rounds: int, writer: NpzWriter | None) -> Iterator[torch.Tensor]:
    """Yield the batches of this process; the main process writes the batches of all. Collective, `rounds` times."""
    iterator = iter(batches)
    for _ in range(rounds):
        batch = next(iterator, None)
        for each in gather_object([batch]):
            if writer is not None and each is not None:
                writer.add(each)
        if batch is not None:
            yield batch
    next(iterator, None)  # finds nothing, and completes the bar
