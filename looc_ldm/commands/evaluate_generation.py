"""`looc-ldm evaluate generation`: samples, from wherever they come, against real images."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from looc_ldm.commands.class_labels import compared_labels, labels_to_draw
from looc_ldm.commands.generation_features import (
    STATISTICS_LAYER,
    Reference,
    Samples,
    has_usable_statistics,
    open_cache,
    reference_features,
    sample_features,
)
from looc_ldm.commands.image_sets import DrawnImages, NpzImages, StoredImages, is_npz
from looc_ldm.commands.measures import GenerationMeasures, generation_measures
from looc_ldm.commands.options import EvaluateGeneration, SamplingOptions
from looc_ldm.commands.record import bias_note, machine, make_record, print_record, write_record
from looc_ldm.commands.shared import cast, check_file, data_of, load_images, rate_of, square_images
from looc_ldm.images.config import DataConfig
from looc_ldm.images.folders import ALL
from looc_ldm.images.image_set import load_image_set
from looc_ldm.metrics.collect import Features
from looc_ldm.metrics.fidelity import SEED
from looc_ldm.metrics.generation import METRICS, generation_figures
from looc_ldm.metrics.weights import file_sha256
from looc_ldm.models.fingerprint import model_fingerprint
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.pipelines.loading import load_pipeline
from looc_ldm.training.latent_fingerprint import reference_fingerprint
from looc_ldm.utils.distributed import start_processes
from looc_ldm.utils.errors import ModelError, UserError

DEFAULT_SAMPLES = 10_000
DEFAULT_SAMPLING = SamplingOptions(batch_size=100)
SHOWN_CLASSES = 10  # in one line; the record names all


def evaluate_generation(options: EvaluateGeneration) -> None:
    """Measure, print and write figures of samples against real images. Collective."""
    check_file(options.output)
    check_file(options.export_npz)
    cache = open_cache(options)
    sampling = _sampling(options)
    measures = generation_measures(options)
    device, accelerator = start_processes(options.device)
    is_main = accelerator is None or accelerator.is_main_process

    # 1. Where images come from
    pipe, samples, drawn_from, fingerprints, notes = None, None, None, {}, []
    if sampling is None:
        samples = _read_samples(options.model)
        reference, notes = _reference_of_samples(options, samples)
    else:
        pipe = load_pipeline(options.model)
        if is_main and options.output is not None:
            fingerprints = {name: model_fingerprint(network) for name, network in _networks(pipe).items()}
        for network in _networks(pipe).values():
            cast(network, device, options.dtype)
        reference = _open_npz_reference(options) if is_npz(options.reference) else _reference_of_model(options, pipe)
        labels, drawn_from = labels_to_draw(pipe, reference.images, options.images or DEFAULT_SAMPLES)
        samples = DrawnImages(pipe, labels, sampling, progress=is_main)
        if samples.labels is not None and drawn_from is None:
            notes.append("note: the reference has not the model's classes: all of these are drawn, in equal shares")
    notes += _size_notes(samples, pipe, reference)
    classes = None
    if "class_fid" in measures.metrics:
        classes = compared_labels(samples, reference.images, drawn_from, draws=pipe is not None)
    _check_counts(measures, samples, reference)
    rate = {} if pipe is None else {"bits_per_pixel": _bits_per_pixel(pipe, reference)}

    # 2. Features
    networks = {name: extractor.load(device) for name, extractor in measures.extractors.items()}
    if is_main:
        for note in notes:  # before hours of work, and again at the end
            print(note, file=sys.stderr, flush=True)
    if pipe is None:  # what may be wrong with files is found first
        generated = sample_features(samples, measures, networks, options.export_npz, device, accelerator)
    real = reference_features(reference, measures, networks, cache, device, accelerator)
    if pipe is not None:
        generated = sample_features(samples, measures, networks, options.export_npz, device, accelerator)
    if accelerator is not None:
        accelerator.end_training()
    if not is_main:
        return

    # 3. Figures
    if classes is not None:
        generated["inception"].labels, real["inception"].labels = classes.generated, classes.reference
    suffixes = {name: extractor.name for name, extractor in measures.extractors.items()}
    figures = generation_figures(measures.metrics, generated, real, suffixes, classes and classes.names)
    about: dict = {"protocol": measures.protocol.name, "images_first": len(samples)}
    if len(reference.images) and real:
        about["images_second"] = len(reference.images)
    seeds = {}
    if sampling is not None:
        about |= {"num_inference_steps": sampling.steps, "guidance_scale": sampling.guidance_scale}
        about |= {"batch_size": sampling.batch_size, "seed": sampling.seed}
        seeds["samples"] = sampling.seed
    if {"kid", "kd@dinov2"} & set(measures.metrics):
        seeds["kid"] = SEED
    if "is" in measures.metrics:
        seeds["is"] = SEED
    if any(features.moments.count is None for features in real.values()):
        about["fid_reference"] = "mean and covariance stored in the reference file"
    record = make_record(
        {**about, **figures, **rate, **reference.about},
        options,
        options.model,
        weights=measures.weights,
        fingerprints=fingerprints,
        reference=reference.key,
        samples=_samples_key(samples),
        seeds=seeds,
        machine=machine(device, accelerator),
    )
    record["notes"] = [*notes, *_notes_on_figures(measures, generated, real, figures)]
    write_record(record, options.output)
    print_record(record, record["notes"])


# Where images come from -----------------------------------------------------------------------------------------------


def _sampling(options: EvaluateGeneration) -> SamplingOptions | None:
    """Return how a model draws the samples; None if they are files, for which no such option may be given."""
    folder = Path(options.model)
    named = ("model_index.json", "config.json", "pipeline", "vqvae")
    are_files = is_npz(options.model) or (folder.is_dir() and not any((folder / name).exists() for name in named))
    names = ("steps", "guidance_scale", "batch_size", "seed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if not are_files:
        return replace(DEFAULT_SAMPLING, **given)
    if options.images is not None:
        given = {"images": options.images}
    for name in given:
        option = f"--{name.replace('_', '-')}"
        raise UserError(f"{option} goes with a model that draws; {options.model!r} is not one, and is read whole.")
    return None


def _networks(pipe: LooCLDMPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def _read_samples(name: str) -> StoredImages | NpzImages:
    if is_npz(name):
        npz = NpzImages(Path(name))
        if not len(npz):
            raise UserError(f"{name!r} holds only statistics, no samples (arr_0).")
        return npz
    # Never by splits: a model may have a class called train or test.
    images = StoredImages(load_image_set(DataConfig(path=name, split=ALL, fit="crop"), 3), at_own_size=True)
    images.check_sizes()
    return images


def _samples_key(samples: Samples) -> dict:
    """Return what tells stored samples from others, for the record; nothing of samples that a model draws."""
    if isinstance(samples, NpzImages):
        return {"sha256": file_sha256(samples.file)}
    return reference_fingerprint(samples.images)["data"] if isinstance(samples, StoredImages) else {}


def _open_npz_reference(options: EvaluateGeneration) -> Reference:
    for option in ("split", "resolution", "fit"):
        if getattr(options, option) is not None:
            raise UserError(f"--{option} goes with a data set; the images of {options.reference!r} are as they are.")
    images = NpzImages(Path(options.reference))
    key = {"data": {"sha256": file_sha256(images.file)}}
    return Reference(images, key, {"data": options.reference, "split": None, "fit": None})


def _reference_of_model(options: EvaluateGeneration, pipe: LooCLDMPipeline) -> Reference:
    images = load_images(options.reference, options, options.model, pipe.vqvae)
    return Reference(StoredImages(images), reference_fingerprint(images), data_of(images))


def _reference_of_samples(options: EvaluateGeneration, samples: Samples) -> tuple[Reference, list[str]]:
    """Return the real images, brought to the size of samples that are files, and notes on how that was done."""
    if is_npz(options.reference):
        return _open_npz_reference(options), []
    _, height, width = samples.shape
    if options.resolution is None and height != width:
        raise UserError(
            f"the samples are {width}x{height} and real images are brought to squares: give --resolution, the side "
            "of these, or a reference npz."
        )
    fit = options.fit or "crop"
    images = square_images(options.reference, options.split, options.resolution or height, fit, 3)
    notes = []
    if options.fit is None and len(images) and images.open(0)[0].size != (images.config.resolution,) * 2:
        notes.append(
            f"warning: real images of other sizes than the samples are brought to theirs by --fit {fit}; give the fit "
            "that the model of the samples was trained with, if that is a different one"
        )
    return Reference(StoredImages(images), reference_fingerprint(images), data_of(images)), notes


def _check_counts(measures: GenerationMeasures, samples: Samples, reference: Reference) -> None:
    """Refuse, before anything is drawn, figures that there are too few images for, or only statistics."""
    name_of_data = repr(reference.about["data"])
    usable = has_usable_statistics(measures, reference)
    for name in measures.metrics:
        least = METRICS[name].least
        if len(samples) < least:
            raise UserError(f"{name} needs at least {least} samples, got {len(samples)}.")
        if METRICS[name].logits:
            continue
        if not len(reference.images) and not (name == "fid" and usable):
            raise UserError(
                f"{name} needs the images of the reference: {name_of_data} holds only statistics, for fid with "
                f"--feature-layer {STATISTICS_LAYER} and --protocol clean."
            )
        if 0 < len(reference.images) < least:
            raise UserError(f"{name} needs at least {least} real images, got {len(reference.images)}.")
    if "fid" in measures.metrics and usable:
        stored, needed = reference.images.statistics.dim, measures.extractors["inception"].dim
        if stored != needed:
            raise UserError(
                f"the statistics in {name_of_data} are of {stored} features, and those of the samples are {needed}."
            )


def _size_notes(samples: Samples, pipe: LooCLDMPipeline | None, reference: Reference) -> list[str]:
    if not len(reference.images):
        return []
    drawn = tuple(samples.shape[1:]) if pipe is None else (pipe.vqvae.config.sample_size,) * 2
    real = tuple(reference.images.shape[1:])
    if drawn == real:
        return []
    return [
        f"warning: samples of {drawn[1]}x{drawn[0]} are compared with images of {real[1]}x{real[0]}: networks bring "
        "both to one size, where the blur of the smaller ones counts"
    ]


def _bits_per_pixel(pipe: LooCLDMPipeline, reference: Reference) -> float:
    """Return the rate of the first stage, which limits what the samples can be."""
    if isinstance(reference.images, StoredImages):
        bits, pixels = rate_of(pipe.vqvae, reference.images.images)
        return bits / pixels
    side = pipe.vqvae.config.sample_size
    if side is None:
        raise ModelError("the first stage does not say its sample_size: give a data set as reference.")
    return pipe.vqvae.bits_per_image(side, side) / side**2


# What a careful reader of the figures should know --------------------------------------------------------------------


def _notes_on_figures(
    measures: GenerationMeasures, generated: Mapping[str, Features], real: Mapping[str, Features], figures: dict
) -> list[str]:
    notes = []
    for metric in [name for name in measures.metrics if name in ("fid", "fd@dinov2")]:
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
    return [note for note in notes if note]


def _first_of(names: list[str], separator: str) -> str:
    shown = separator.join(names[:SHOWN_CLASSES])
    return shown + (f" and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else "")
