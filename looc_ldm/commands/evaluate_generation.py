"""`looc-ldm evaluate generation`: measure samples, drawn from a model or stored, against real images."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from looc_ldm.commands.class_labels import compared_labels, labels_to_draw
from looc_ldm.commands.closest_pairs import draw_closest_pairs, write_page
from looc_ldm.commands.generation_features import (
    Reference,
    Samples,
    reference_features,
    sample_features,
    stored_statistics,
)
from looc_ldm.commands.image_sets import DrawnImages, NpzImages, StoredImages, is_npz
from looc_ldm.commands.measures import GenerationMeasures, generation_measures
from looc_ldm.commands.options import EvaluateGeneration
from looc_ldm.commands.record import bias_note, machine, make_record, write_and_print
from looc_ldm.commands.shared import (
    cast,
    check_file,
    load_images,
    load_training_images,
    rate_of,
    square_images,
    use_fastest_threads_to_sample,
)
from looc_ldm.images.folders import ALL
from looc_ldm.metrics.fidelity import SEED
from looc_ldm.metrics.generation import METRICS, generation_figures
from looc_ldm.metrics.reference import ReferenceCache, default_cache_folder
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.fingerprint import model_fingerprint
from looc_ldm.models.loading import holds_model, is_bundled
from looc_ldm.pipelines.loading import load_pipeline
from looc_ldm.utils.distributed import make_accelerator
from looc_ldm.utils.errors import UserError
from looc_ldm.utils.files import check_folder

DEFAULT_SAMPLES = 10_000
SHOWN_CLASSES = 10  # in one line; the record names all


def evaluate(options: EvaluateGeneration) -> None:
    """Measure, print and write figures of samples against real images. Collective."""
    check_file(options.output)
    check_file(options.export_npz)
    needs_training = "memorization" in (options.metrics or ())
    if options.training_data is not None and not needs_training:
        raise UserError("--training-data serves --metrics memorization only.")
    cache = ReferenceCache(None if options.no_cache else options.cache or default_cache_folder())
    if cache.folder is not None:
        check_folder(cache.folder)
    measures = generation_measures(options)
    accelerator = make_accelerator(options.device)
    is_main = accelerator.is_main_process

    # 1. Images
    drawn_from, fingerprints, about, seeds, notes = None, {}, {}, {}, []
    if _are_files(options.samples):
        samples = _read_samples(options)
        reference = _open_reference(options, samples)
        training = _open_training_images(options, samples) if needs_training else None
        drawn_size = samples.shape[1:]
        if options.fit is None and not is_npz(options.data):
            notes.append("note: real images are cropped; give --fit if the samples' model was trained otherwise")
    else:
        pipe = load_pipeline(options.samples)
        networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        if is_main and options.output is not None:
            fingerprints = {name: model_fingerprint(network) for name, network in networks.items()}
        for network in networks.values():
            cast(network, accelerator.device, options.dtype)
        reference = _open_reference(options, pipe.vqvae)
        training = _open_training_images(options, pipe.vqvae) if needs_training else None
        labels, drawn_from = labels_to_draw(pipe, reference, options.images or DEFAULT_SAMPLES)
        use_fastest_threads_to_sample(pipe, min(len(labels), options.batch_size))
        samples = DrawnImages(pipe, labels, options, progress=is_main)
        if samples.labels is not None and drawn_from is None:
            notes.append("note: the reference does not have the model's classes: all of them are drawn equally often")
        drawn_size = (pipe.vqvae.config.sample_size,) * 2
        # The rate of the first stage limits the quality of samples.
        bits, pixels = rate_of(pipe.vqvae, reference.images if isinstance(reference, StoredImages) else None)
        about = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
        about |= {"batch_size": options.batch_size, "seed": options.seed, "bits_per_pixel": bits / pixels}
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
    extractors = {name: extractor.load(accelerator.device) for name, extractor in measures.extractors.items()}
    if is_main:
        for note in notes:  # before hours of work, and again at the end
            print(note, file=sys.stderr, flush=True)
    stored = not isinstance(samples, DrawnImages)
    if stored:  # damaged files are found first
        generated = sample_features(samples, measures, extractors, options.export_npz, accelerator)
    real = reference_features(reference, measures, extractors, cache, accelerator)
    known = None
    if training is not None:
        only = replace(measures, metrics=["memorization"])
        known = reference_features(training, only, extractors, cache, accelerator, "training images")
    if not stored:
        generated = sample_features(samples, measures, extractors, options.export_npz, accelerator)
    accelerator.end_training()
    if not is_main:
        return

    # 3. Figures
    if classes is not None:
        generated["inception"].labels, real["inception"].labels = classes
    suffixes = {name: extractor.name for name, extractor in measures.extractors.items()}
    figures = generation_figures(measures.metrics, generated, real, suffixes, reference.classes or None, known)
    for metric in [name for name in measures.metrics if name in ("fid", "fd@dinov2")]:
        network, extractor = METRICS[metric].network, measures.extractors[METRICS[metric].network]
        fewest = min(filter(None, (side[network].moments.count for side in (generated, real))))
        notes += bias_note(fewest, extractor.dim, f"{metric.partition('@')[0]}@{extractor.name}")
    counts = {"images_first": len(samples)} | ({"images_second": len(reference)} if len(reference) and real else {})
    seeds |= {name.replace("kd@dinov2", "kid"): SEED for name in ("kid", "is", "kd@dinov2") if name in measures.metrics}
    if any(features.moments.count is None for features in real.values()):
        about["fid_reference"] = "mean and covariance stored in the reference file"
    if training is not None:
        found = figures["memorization"]
        notes += _notes_on_memorization(found, options)
        about |= {f"training_{name}": value for name, value in training.about.items()}
        for pair in found["closest"]:
            pair["name"] = training.images.source.read(pair["training_image"]).name
    record = make_record(
        {"protocol": measures.protocol.name, **counts, **about, **figures, **reference.about},
        options,
        options.samples,
        weights={name: extractor.identity() for name, extractor in measures.extractors.items()},
        fingerprints=fingerprints,
        reference=reference.key,
        samples=samples.key["data"] if stored else {},
        seeds=seeds,
        machine=machine(accelerator),
        notes=notes + _notes_on_classes(figures.get("class_fid"), measures),
    )
    write_and_print(record, options.output)
    if training is not None and options.output is not None:
        page = options.output.with_suffix(".html")
        write_page(page, record, draw_closest_pairs(samples, training, found))
        print(f"{page} and {page.with_suffix('.png')} show the samples closest to training images")


def _are_files(name: str) -> bool:
    """Whether samples are an .npz or a folder without a model."""
    return is_npz(name) or (Path(name).is_dir() and not is_bundled(name) and not holds_model(Path(name)))


def _read_samples(options: EvaluateGeneration) -> Reference:
    _refuse(options, options.samples, "images")
    if not is_npz(options.samples):
        # Never look for splits: a model may have a class called train or test.
        return StoredImages(square_images(options.samples, ALL, 1, "crop", 3), at_own_size=True)
    npz = NpzImages(Path(options.samples))
    if not len(npz):
        raise UserError(f"{options.samples!r} holds only statistics, no samples (arr_0).")
    return npz


def _open_reference(options: EvaluateGeneration, samples: LooCVQModel | Reference) -> Reference:
    """Return the real images, by default at the size that the sampled model was trained with, or of the samples."""
    if is_npz(options.data):
        _refuse(options, options.data, "split", "resolution", "fit", "reference_images")
        return NpzImages(Path(options.data))
    if isinstance(samples, LooCVQModel):
        images = load_images(options.data, options, samples)
    else:
        resolution, fit = options.resolution or samples.shape[1], options.fit or "crop"
        images = square_images(options.data, options.split, resolution, fit, 3)
    return StoredImages(images, options.reference_images)


def _open_training_images(options: EvaluateGeneration, samples: LooCVQModel | Reference) -> StoredImages:
    """Return the training images of the model, of the same size as its samples."""
    if isinstance(samples, LooCVQModel):
        return StoredImages(load_training_images(options.training_data, options, samples))
    if options.training_data is None:
        raise UserError("memorization needs --training-data: samples do not say what their model was trained on.")
    resolution, fit = options.resolution or samples.shape[1], options.fit or "crop"
    return StoredImages(square_images(options.training_data, "train", resolution, fit, 3))


def _refuse(options: EvaluateGeneration, name: str, *fields: str) -> None:
    """Raise UserError for options that would be ignored, because `name` is read unchanged."""
    for field in fields:
        if getattr(options, field) is not None:
            raise UserError(f"--{field.replace('_', '-')} does not go with {name!r}, which is read unchanged.")


def _check_counts(measures: GenerationMeasures, samples: Samples, reference: Reference) -> None:
    """Raise UserError before any image is drawn if a metric cannot be computed.

    A metric can have too few samples or real images, or need real images when the reference holds only statistics.
    """
    for name in measures.metrics:
        least, against = METRICS[name].least, len(reference)
        if METRICS[name].logits or (name == "fid" and stored_statistics(measures, reference) is not None):
            against = least  # needs no real images
        if not against:
            raise UserError(
                f"{name} needs the images of the reference: {reference.about['data']!r} holds only statistics. They "
                "serve for fid only, with --protocol clean and the same number of features."
            )
        if min(len(samples), against) < least:
            raise UserError(
                f"{name} needs at least {least} samples and real images, got {len(samples)} and {len(reference)}."
            )


def _notes_on_memorization(found: dict, options: EvaluateGeneration) -> list[str]:
    """Return notes on held-out images that are left out, on few of them, and on the picture."""
    notes, held_out = [], found["held_out_images"]
    if found["duplicates"]:
        notes.append(f"note: memorization leaves out {found['duplicates']:,} real images that are training images, too")
    if held_out < 100:
        notes.append(
            f"warning: memorization has {held_out:,} real images: with fewer than 100 the limit of copies is uncertain"
        )
    if options.output is None:
        notes.append("note: with --output FILE.json a page shows the samples closest to training images")
    return notes


def _notes_on_classes(detail: dict | None, measures: GenerationMeasures) -> list[str]:
    """Return warnings about classes that class_fid leaves out, and about classes with few images."""
    notes = []
    if detail and detail["skipped"]:
        reasons = [f"{name} ({reason})" for name, reason in detail["skipped"].items()]
        notes.append(f"warning: class_fid leaves out {_first_of(reasons)}")
    if detail and detail["biased"]:
        dim = measures.extractors["inception"].dim
        few = [f"{name} ({count:,})" for name, count in sorted(detail["biased"].items(), key=lambda pair: pair[1])]
        notes.append(f"warning: class_fid uses classes with fewer images than the {dim:,} features: {_first_of(few)}")
    return notes


def _first_of(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN_CLASSES])
    return shown + (f" and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else "")
