"""`looc-ldm evaluate generation`: samples, from wherever they come, against real images."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from looc_ldm.commands.class_labels import compared_labels, labels_to_draw
from looc_ldm.commands.generation_features import (
    Reference,
    Samples,
    open_cache,
    reference_features,
    sample_features,
    stored_statistics,
)
from looc_ldm.commands.image_sets import DrawnImages, NpzImages, StoredImages, is_npz
from looc_ldm.commands.measures import GenerationMeasures, generation_measures
from looc_ldm.commands.options import EvaluateGeneration
from looc_ldm.commands.record import bias_note, machine, make_record, print_record, write_record
from looc_ldm.commands.shared import cast, check_file, load_images, rate_of, square_images
from looc_ldm.images.folders import ALL
from looc_ldm.metrics.collect import Features
from looc_ldm.metrics.fidelity import SEED
from looc_ldm.metrics.generation import METRICS, generation_figures
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.fingerprint import model_fingerprint
from looc_ldm.pipelines.loading import load_pipeline
from looc_ldm.utils.distributed import start_processes
from looc_ldm.utils.errors import UserError

DEFAULT_SAMPLES = 10_000
SHOWN_CLASSES = 10  # in one line; the record names all


def evaluate_generation(options: EvaluateGeneration) -> None:
    """Measure, print and write figures of samples against real images. Collective."""
    check_file(options.output)
    check_file(options.export_npz)
    cache = open_cache(options)
    measures = generation_measures(options)
    device, accelerator = start_processes(options.device)
    is_main = accelerator is None or accelerator.is_main_process

    # 1. Images
    pipe, drawn_from, fingerprints, about, rate, seeds, notes = None, None, {}, {}, {}, {}, []
    if _are_files(options.samples):
        samples = _read_samples(options)
        reference = _open_reference(options, samples)
        drawn_size = samples.shape[1:]
        if options.fit is None and not is_npz(options.data):
            notes.append("note: real images are cropped; give --fit if the samples' model was trained otherwise")
    else:
        pipe = load_pipeline(options.samples)
        networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        if is_main and options.output is not None:
            fingerprints = {name: model_fingerprint(network) for name, network in networks.items()}
        for network in networks.values():
            cast(network, device, options.dtype)
        reference = _open_reference(options, pipe.vqvae)
        labels, drawn_from = labels_to_draw(pipe, reference, options.images or DEFAULT_SAMPLES)
        samples = DrawnImages(pipe, labels, options, progress=is_main)
        if samples.labels is not None and drawn_from is None:
            notes.append("note: the reference does not have the model's classes: all of them are drawn equally often")
        drawn_size = (pipe.vqvae.config.sample_size,) * 2
        about = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
        about |= {"batch_size": options.batch_size, "seed": options.seed}
        rate = {"bits_per_pixel": _bits_per_pixel(pipe.vqvae, reference)}
        seeds["samples"] = options.seed
    if len(reference) and tuple(drawn_size) != tuple(reference.shape[1:]):
        (height, width), (real_height, real_width) = drawn_size, reference.shape[1:]
        notes.append(
            f"warning: samples of {width}x{height} are compared with images of {real_width}x{real_height}: networks "
            "bring both to one size, and the smaller ones are blurred"
        )
    classes = compared_labels(samples, reference, drawn_from) if "class_fid" in measures.metrics else None
    _check_counts(measures, samples, reference)

    # 2. Features
    extractors = {name: extractor.load(device) for name, extractor in measures.extractors.items()}
    if is_main:
        for note in notes:  # before hours of work, and again at the end
            print(note, file=sys.stderr, flush=True)
    if pipe is None:  # damaged files are found first
        generated = sample_features(samples, measures, extractors, options.export_npz, device, accelerator)
    real = reference_features(reference, measures, extractors, cache, device, accelerator)
    if pipe is not None:
        generated = sample_features(samples, measures, extractors, options.export_npz, device, accelerator)
    if accelerator is not None:
        accelerator.end_training()
    if not is_main:
        return

    # 3. Figures
    if classes is not None:
        generated["inception"].labels, real["inception"].labels = classes
    suffixes = {name: extractor.name for name, extractor in measures.extractors.items()}
    figures = generation_figures(measures.metrics, generated, real, suffixes, reference.classes or None)
    counts = {"images_first": len(samples)}
    if len(reference) and real:
        counts["images_second"] = len(reference)
    seeds |= {name: SEED for name in ("kid", "is") if name in measures.metrics}
    if "kd@dinov2" in measures.metrics:
        seeds["kid"] = SEED
    if any(features.moments.count is None for features in real.values()):
        about["fid_reference"] = "mean and covariance stored in the reference file"
    record = make_record(
        {"protocol": measures.protocol.name, **counts, **about, **figures, **rate, **reference.about},
        options,
        options.samples,
        weights=measures.weights,
        fingerprints=fingerprints,
        reference=reference.key,
        samples={} if pipe is not None else samples.key["data"],
        seeds=seeds,
        machine=machine(device, accelerator),
    )
    record["notes"] = [*notes, *_notes_on_figures(measures, generated, real, figures)]
    write_record(record, options.output)
    print_record(record, record["notes"])


def _are_files(name: str) -> bool:
    """Whether samples are an .npz or a folder without a model."""
    marks = ("model_index.json", "config.json", "pipeline", "vqvae")
    return is_npz(name) or (Path(name).is_dir() and not any(Path(name, mark).exists() for mark in marks))


def _read_samples(options: EvaluateGeneration) -> StoredImages | NpzImages:
    name = options.samples
    if options.images is not None:
        raise UserError(f"--images goes with a model that draws; {name!r} is not one, and is read whole.")
    if is_npz(name):
        npz = NpzImages(Path(name))
        if not len(npz):
            raise UserError(f"{name!r} holds only statistics, no samples (arr_0).")
        return npz
    # Never by splits: a model may have a class called train or test.
    images = square_images(name, ALL, 1, "crop", 3)
    return StoredImages(images, at_own_size=True)


def _open_reference(options: EvaluateGeneration, samples: LooCVQModel | Reference) -> Reference:
    """Return the real images, of the size in the training of the model that draws, or of the samples."""
    if is_npz(options.data):
        for option in ("split", "resolution", "fit", "reference_images"):
            if getattr(options, option) is not None:
                raise UserError(f"--{option.replace('_', '-')} goes with a data set; {options.data!r} is read whole.")
        return NpzImages(Path(options.data))
    if isinstance(samples, LooCVQModel):
        images = load_images(options.data, options, options.samples, samples)
    else:
        resolution, fit = options.resolution or samples.shape[1], options.fit or "crop"
        images = square_images(options.data, options.split, resolution, fit, 3)
    return StoredImages(images, options.reference_images)


def _check_counts(measures: GenerationMeasures, samples: Samples, reference: Reference) -> None:
    """Refuse, before anything is drawn, figures for which there are too few images, or only statistics."""
    for name in measures.metrics:
        least = METRICS[name].least
        if len(samples) < least:
            raise UserError(f"{name} needs at least {least} samples, got {len(samples)}.")
        if METRICS[name].logits or (name == "fid" and stored_statistics(measures, reference) is not None):
            continue
        if not len(reference):
            raise UserError(
                f"{name} needs the images of the reference: {reference.about['data']!r} holds only statistics, for fid "
                "of as many features, with --protocol clean."
            )
        if len(reference) < least:
            raise UserError(f"{name} needs at least {least} real images, got {len(reference)}.")


def _bits_per_pixel(vqvae: LooCVQModel, reference: Reference) -> float:
    """Return the rate of the first stage, which limits the quality of samples."""
    if isinstance(reference, StoredImages):
        bits, pixels = rate_of(vqvae, reference.images)
        return bits / pixels
    side = vqvae.config.sample_size
    return vqvae.bits_per_image(side, side) / side**2


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
    detail = figures.get("class_fid", {"skipped": {}, "biased": {}})
    if detail["skipped"]:
        reasons = [f"{name} ({reason})" for name, reason in detail["skipped"].items()]
        notes.append(f"warning: class_fid leaves out {_first_of(reasons)}")
    if detail["biased"]:
        dim = measures.extractors["inception"].dim
        few = [f"{name} ({count:,})" for name, count in sorted(detail["biased"].items(), key=lambda pair: pair[1])]
        notes.append(f"warning: class_fid is of classes with fewer images than the {dim:,} features: {_first_of(few)}")
    return [note for note in notes if note]


def _first_of(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN_CLASSES])
    return shown + (f" and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else "")
