"""`looc-ldm evaluate generation`: samples, from wherever they come, against real images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from looc_ldm.commands.class_labels import compared_labels, labels_to_draw
from looc_ldm.commands.generation_features import (
    STATISTICS_LAYER,
    Reference,
    has_usable_statistics,
    open_cache,
    reference_features,
    sample_features,
)
from looc_ldm.commands.generation_metrics import GenerationMeasures, generation_measures
from looc_ldm.commands.image_sets import DrawnImages, NpzImages, StoredImages, is_npz
from looc_ldm.commands.record import bias_note, machine, make_record, print_record, write_record
from looc_ldm.commands.shared import (
    as_user_errors,
    check_file,
    data_of,
    fingerprints_for,
    load_images,
    rate_of,
    square_images,
)
from looc_ldm.distributed import start_processes
from looc_ldm.errors import ModelError, UserError
from looc_ldm.metrics.collect import Features
from looc_ldm.metrics.fidelity import SEED
from looc_ldm.metrics.generation import METRICS, generation_figures
from looc_ldm.metrics.weights import weights_identity

DEFAULT_SAMPLES = 10_000
SHOWN_CLASSES = 10  # in one line; the record names all


def evaluate_samples(options: argparse.Namespace) -> None:
    """What `looc-ldm evaluate generation` does with its options, by one process or several. Collective."""
    check_file(options.output)
    check_file(options.export_npz)
    cache = open_cache(options)
    draws = _draws(options)
    measures = generation_measures(options)
    device, accelerator = start_processes(options.device)
    is_main = accelerator is None or accelerator.is_main_process

    pipe = _load_pipeline(options, device) if draws else None
    samples = None if draws else _read_samples(options.model)
    reference = _open_reference(options, pipe, samples)
    rate = _rate(pipe, reference)
    notes = [_size_note(samples, pipe, reference), _fit_note(options, reference)]
    drawn_from = None
    if draws:
        labels, drawn_from = labels_to_draw(pipe, reference.images, options.images)
        samples = DrawnImages(pipe, labels, options, progress=is_main)
        if samples.labels is not None and drawn_from is None:
            notes.append("note: the reference has not the model's classes: all of these are drawn, in equal shares")
    classes = None
    if "class_fid" in measures.metrics:
        classes = compared_labels(samples, reference.images, drawn_from, draws)
    _check_counts(measures, samples, reference)
    fingerprints = fingerprints_for(options, generation=True) if draws and is_main else {}

    samples_key = _samples_key(samples) if is_main else None
    with as_user_errors(ValueError):
        networks = {name: extractor.load(device) for name, extractor in measures.extractors.items()}
        if is_main:
            for note in filter(None, notes):  # before hours of work, and again at the end
                print(note, file=sys.stderr, flush=True)
        if not draws:  # what may be wrong with them is found first
            generated = sample_features(samples, measures, networks, options, accelerator, device)
        real = reference_features(reference, measures, networks, cache, accelerator, device)
        if draws:
            generated = sample_features(samples, measures, networks, options, accelerator, device)
        if accelerator is not None:
            accelerator.end_training()
        if not is_main:
            return
        if classes is not None:
            generated["inception"].labels, real["inception"].labels = classes.generated, classes.reference
        suffixes = {name: extractor.name for name, extractor in measures.extractors.items()}
        names = None if classes is None else classes.names
        figures = generation_figures(measures.metrics, generated, real, suffixes, names)

    about = _circumstances(options, samples, pipe, reference, real)
    record = make_record(
        {"protocol": measures.protocol.name, **about, **figures, **rate, **reference.about},
        options,
        weights=measures.weights,
        fingerprints=fingerprints,
        reference=reference.key,
        samples=samples_key,
        seeds=_seeds(options if draws else None, measures.metrics),
        machine=machine(device, accelerator),
    )
    record["notes"] = [*filter(None, [*notes, *_notes(measures, generated, real, figures)])]
    write_record(record, options.output)
    print_record(record, record["notes"])


# Where images come from -----------------------------------------------------------------------------------------------


def _draws(options: argparse.Namespace) -> bool:
    """Whether samples are drawn by a model; fills in, or refuses, the options that go with one."""
    folder = Path(options.model)
    named = ("model_index.json", "config.json", "pipeline", "vqvae")
    draws = not is_npz(options.model) and not (folder.is_dir() and not any((folder / name).exists() for name in named))
    defaults = {"images": DEFAULT_SAMPLES, **options.sampling_defaults}
    given = [name for name in defaults if getattr(options, name) is not None]
    if not draws and given:
        option = f"--{given[0].replace('_', '-')}"
        raise UserError(f"{option} goes with a model that draws; {options.model!r} is not one, and is read whole.")
    for name, default in defaults.items():
        if draws and getattr(options, name) is None:
            setattr(options, name, default)
    return draws


def _load_pipeline(options: argparse.Namespace, device: torch.device):
    from looc_ldm.pipelines.loading import load_pipeline

    return load_pipeline(options.model, getattr(torch, options.dtype)).to(device)


def _read_samples(name: str) -> StoredImages | NpzImages:
    if is_npz(name):
        return _open_npz(name, "SAMPLES")
    from looc_ldm.training.config import DataConfig
    from looc_ldm.training.data import load_image_set
    from looc_ldm.training.sources import split_folders_of

    splits = [place.name for place, _ in split_folders_of(Path(name))]
    if len(splits) > 1:
        raise UserError(f"{name!r} holds the splits {', '.join(splits)}: give the folder of one of them as samples.")
    images = StoredImages(load_image_set(DataConfig(path=name, split="", fit="crop"), 3), at_own_size=True)
    images.check_sizes()
    return images


def _samples_key(samples) -> dict:
    """What tells stored samples from others, for the record; nothing of samples that a model draws."""
    if isinstance(samples, NpzImages):
        return {"sha256": weights_identity([samples.file])}
    if not isinstance(samples, StoredImages):
        return {}
    from looc_ldm.training.latent_fingerprint import reference_fingerprint

    return reference_fingerprint(samples.images)["data"]


def _open_npz(name: str, what: str) -> NpzImages:
    with as_user_errors(ValueError, FileNotFoundError):
        images = NpzImages(Path(name))
    if what == "SAMPLES" and not len(images):
        raise UserError(f"{name!r} holds only statistics, no samples (arr_0).")
    return images


def _open_reference(options: argparse.Namespace, pipe, samples) -> Reference:
    if is_npz(options.data):
        for option in ("split", "resolution", "fit"):
            if getattr(options, option) is not None:
                raise UserError(f"--{option} goes with a data set; the images of {options.data!r} are as they are.")
        images = _open_npz(options.data, "--reference")
        key = {"data": {"sha256": weights_identity([images.file])}}
        return Reference(images, key, {"data": options.data, "split": None, "fit": None})
    from looc_ldm.training.latent_fingerprint import reference_fingerprint

    guessed = False
    if pipe is not None:
        images = load_images(options, pipe.vqvae)
    else:
        _, height, width = samples.shape
        if options.resolution is None and height != width:
            raise UserError(
                f"the samples are {width}x{height} and real images are brought to squares: give --resolution, the side "
                "of these, or a reference npz."
            )
        guessed = options.fit is None
        options.fit = options.fit or "crop"
        images = square_images(options, options.model, options.resolution or height, 3)
        if guessed and len(images):
            guessed = images.open(0)[0].size != (images.config.resolution,) * 2
    stored = StoredImages(images)
    return Reference(stored, reference_fingerprint(images), data_of(images), fit_is_guess=guessed)


def _check_counts(measures: GenerationMeasures, samples, reference: Reference) -> None:
    """Refuse, before anything is drawn, figures that there are too few images for, or only statistics."""
    for name in measures.metrics:
        least = METRICS[name].least
        for what, images in (("samples", samples), ("real images", reference.images)):
            needed = what == "samples" or (len(images) and not METRICS[name].logits)
            if needed and len(images) < least:
                raise UserError(f"{name} needs at least {least} {what}, got {len(images)}.")
    if "fid" in measures.metrics and has_usable_statistics(measures, reference):
        with as_user_errors(ValueError):
            stored, needed = reference.images.statistics.dim, measures.extractors["inception"].dim
        if stored != needed:
            raise UserError(
                f"the statistics in {reference.about['data']!r} are of {stored} features, and those of the samples "
                f"are {needed}."
            )
    if len(reference.images):
        return
    for name in measures.metrics:
        if METRICS[name].logits:
            continue
        if name != "fid" or not has_usable_statistics(measures, reference):
            raise UserError(
                f"{name} needs the images of the reference: {reference.about['data']!r} holds only statistics, for fid "
                f"with --feature-layer {STATISTICS_LAYER} and --protocol clean."
            )


def _size_note(samples, pipe, reference: Reference) -> str | None:
    if not len(reference.images):
        return None
    side = None if pipe is None else pipe.vqvae.config.sample_size
    drawn = (side, side) if pipe is not None else samples.shape[1:]
    real = reference.images.shape[1:]
    if tuple(drawn) == tuple(real):
        return None
    return (
        f"warning: samples of {drawn[1]}x{drawn[0]} are compared with images of {real[1]}x{real[0]}: networks bring "
        "both to one size, where the blur of the smaller ones counts"
    )


def _fit_note(options: argparse.Namespace, reference: Reference) -> str | None:
    """Where nobody has said how real images become square, and a model that could is not there."""
    if not reference.fit_is_guess:
        return None
    return (
        f"warning: real images of other sizes than the samples are brought to theirs by --fit {options.fit}; give "
        "the fit that the model of the samples was trained with, if it is another"
    )


# The record -----------------------------------------------------------------------------------------------------------


def _circumstances(options, samples, pipe, reference: Reference, real: Mapping[str, Features]) -> dict:
    about: dict = {"images_first": len(samples)}
    if len(reference.images) and real:
        about["images_second"] = len(reference.images)
    if pipe is not None:
        about |= {
            "num_inference_steps": options.steps,
            "guidance_scale": options.guidance_scale,
            "batch_size": options.batch_size,
            "seed": options.seed,
        }
    if any(features.moments.count is None for features in real.values()):
        about["fid_reference"] = "mean and covariance stored in the reference file"
    return about


def _rate(pipe, reference: Reference) -> dict[str, float]:
    """Bits per pixel of the first stage, which limits what the samples can be. Unknown where no model is there."""
    if pipe is None:
        return {}
    if isinstance(reference.images, StoredImages):
        bits, pixels = rate_of(pipe.vqvae, reference.images.images)
        return {"bits_per_pixel": bits / pixels}
    side = pipe.vqvae.config.sample_size
    if side is None:
        raise ModelError("the first stage does not say its sample_size: give a data set as reference.")
    return {"bits_per_pixel": pipe.vqvae.bits_per_image(side, side) / side**2}


def _seeds(options: argparse.Namespace | None, metrics: list[str]) -> dict[str, int]:
    seeds = {} if options is None else {"samples": options.seed}
    if {"kid", "kd@dinov2"} & set(metrics):
        seeds["kid"] = SEED
    if "is" in metrics:
        seeds["is"] = SEED
    return seeds


def _notes(
    measures: GenerationMeasures, generated: Mapping[str, Features], real: Mapping[str, Features], figures: dict
) -> list[str | None]:
    """What a careful reader of the figures should know, a line each."""
    notes = []
    for metric in ("fid", "fd@dinov2"):
        if metric in measures.metrics:
            network = METRICS[metric].network
            extractor = measures.extractors[network]
            counts = [side[network].moments.count for side in (generated, real)]
            fewest = min(count for count in counts if count is not None)
            notes.append(bias_note(fewest, extractor.dim, f"{metric.partition('@')[0]}@{extractor.name}"))
    if "class_fid" in figures:
        detail = figures["class_fid"]
        if detail["skipped"]:
            reasons = [f"{name} ({reason})" for name, reason in detail["skipped"].items()]
            notes.append(f"warning: class_fid leaves out {_first_of(reasons, '; ')}")
        if detail["biased"]:
            dim = measures.extractors["inception"].dim
            counts = sorted(detail["biased"].items(), key=lambda pair: pair[1])
            few = _first_of([f"{name} ({count:,})" for name, count in counts], ", ")
            notes.append(f"warning: class_fid is of classes with fewer images than the {dim:,} features: {few}")
    return notes


def _first_of(names: list[str], separator: str) -> str:
    shown = separator.join(names[:SHOWN_CLASSES])
    return shown + (f" and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else "")
