"""`looc-ldm compare`: several autoencoders on the same images, sorted by bits per pixel, beside JPEG and WebP."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset
from tqdm.auto import tqdm

from looc_ldm import __version__
from looc_ldm.analysis.comparison import (
    Compared,
    comparison_picture,
    difference_factor,
    distinguishing_names,
    markdown_table,
    rate_distortion_figure,
)
from looc_ldm.analysis.rate_distortion import CODECS, codec_curve
from looc_ldm.codes.images import set_tiling
from looc_ldm.commands.many_files import batch_of_squares, pixel_budget
from looc_ldm.commands.measures import ReconstructionMeasures, reconstruction_measures
from looc_ldm.commands.options import Compare
from looc_ldm.commands.record import bias_note, versions
from looc_ldm.commands.shared import DTYPES, data_of, fit_in_training, square_images
from looc_ldm.images.image_set import ImageSet, spread
from looc_ldm.images.pixels import centre_crop, to_float, to_uint8
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.fingerprint import model_fingerprint
from looc_ldm.models.loading import load_autoencoder
from looc_ldm.training.data import float_batches
from looc_ldm.utils.devices import choose_device
from looc_ldm.utils.errors import ModelError, UserError
from looc_ldm.utils.files import check_folder, check_name, make_folder, replace_bytes


@dataclass
class _Survey:
    """Facts about a model that are needed before anything is computed."""

    source: str  # as typed
    name: str
    fingerprint: str
    channels: int
    sample_size: int
    downsampling_factor: int
    interpolation_factor: int


def compare(options: Compare) -> None:
    """Measure models and write a table, pictures and every figure."""
    check_folder(options.output)
    check_name(options.output / "rate_distortion.png")  # the longest of them
    choose_device(options.device)  # refuses one that is not there
    metrics = None if options.metrics is None else ["psnr", *options.metrics]
    measures = reconstruction_measures(replace(options, metrics=metrics))
    surveys = _surveys(options)
    images = _images(options, surveys[0])
    chosen = spread(len(images), options.images or len(images))
    compressed = chosen[spread(len(chosen), options.codec_images)]
    shown = torch.stack([images[index][0] for index in chosen[spread(len(chosen), options.show)]])

    codecs = _codec_curves(images, compressed, options)
    compared = [(survey, _measured(survey, measures, images, chosen, shown, options)) for survey in surveys]
    compared.sort(key=lambda pair: pair[1].figures["bits_per_pixel"])  # stable: equal rates stay in the order given

    models = [model for _, model in compared]
    originals = centre_crop(shown, images.content_size)
    factor = difference_factor(originals, models)
    drawings = [comparison_picture(originals, models, factor), rate_distortion_figure(codecs, models, len(compressed))]
    table, lines = markdown_table(models), _circumstances(surveys, measures, images, len(chosen), options)
    record = {
        "models": [
            {"name": survey.name, "model": survey.source, "fingerprint": survey.fingerprint, **model.figures}
            for survey, model in compared
        ],
        "codecs": {name: [asdict(point) for point in points] for name, points in codecs.items()},
        "codec_images": len(compressed),
        "difference_factor": factor,
        **data_of(images),
        "resolution": images.config.resolution,
        "dtype": options.dtype,
        "weights": measures.weights,
        "seeds": measures.seeds,
        "versions": versions(),
        "command": options.command_line,
        "version": __version__,
    }
    _write(options.output, _page(table, lines, drawings, options), record, drawings)
    print(table)
    print("\n".join(["", *lines, f"{options.output}: comparison.md, .json, .png, .svg, rate_distortion.png, .svg"]))


# Before anything is computed -----------------------------------------------------------------------------------------


def _surveys(options: Compare) -> list[_Survey]:
    """Load every model once and let it go: what cannot be loaded or compared is found before hours of work."""
    names = options.names or distinguishing_names(options.models)
    if len(names) != len(options.models):
        raise UserError(f"--names gives {len(names)} names to {len(options.models)} models.")
    surveys = [_survey(source, name) for source, name in zip(options.models, names, strict=True)]
    first = surveys[0]
    for other in surveys:
        if other.channels != first.channels:
            raise ModelError(
                f"{first.source!r} takes {_kind(first)} images and {other.source!r} {_kind(other)} ones: they cannot "
                "be compared on the same images."
            )
    side = options.resolution or first.sample_size
    multiple = math.lcm(*(survey.downsampling_factor for survey in surveys))
    for survey in surveys:
        if side % survey.downsampling_factor:
            whose = "" if options.resolution else f", at which {first.source!r} was trained"
            raise UserError(
                f"{survey.source!r} takes images whose side is a multiple of {survey.downsampling_factor}, not "
                f"{side}x{side}{whose}: give --resolution, a multiple of {multiple} for all these models."
            )
    return surveys


def _kind(survey: _Survey) -> str:
    return {1: "grey", 3: "RGB"}.get(survey.channels, f"{survey.channels}-channel")


def _survey(source: str, name: str) -> _Survey:
    model = load_autoencoder(source)
    return _Survey(
        source,
        name,
        model_fingerprint(model),
        model.config.in_channels,
        model.config.sample_size,
        model.downsampling_factor,
        model.quantize.interpolation_factor,
    )


def _images(options: Compare, first: _Survey) -> ImageSet:
    """Return the images that all models see; what options leave open is as in the first model's training."""
    fit = options.fit or fit_in_training(first.source)
    images = square_images(options.data, options.split, options.resolution or first.sample_size, fit, first.channels)
    if not len(images):
        raise UserError(f"{options.data!r} has no images in its split {images.config.split}.")
    return images


# The measuring --------------------------------------------------------------------------------------------------------


def _codec_curves(images: ImageSet, chosen: np.ndarray, options: Compare) -> dict[str, list]:
    """Measure JPEG and WebP on what is measured of these images."""
    curves = {}
    for codec in CODECS:
        pixels = (centre_crop(images[index][0], images.content_size) for index in chosen)
        with tqdm(pixels, total=len(chosen), desc=codec, unit="img", delay=1) as bar:
            curves[codec] = codec_curve(bar, codec, protocol=options.protocol)
    return curves


def _measured(
    survey: _Survey,
    measures: ReconstructionMeasures,
    images: ImageSet,
    chosen: np.ndarray,
    shown: torch.Tensor,
    options: Compare,
) -> Compared:
    """Load a model, measure it on the images `chosen`, and reconstruct those that are `shown`."""
    device = choose_device(options.device)
    model = load_autoencoder(survey.source, DTYPES[options.dtype]).to(device)
    side = images.config.resolution
    set_tiling(model, side**2, pixel_budget(device.type))
    batch_size = batch_of_squares(device.type, side, 64)
    batches = float_batches(Subset(images, chosen.tolist()), batch_size)
    with tqdm(batches, desc=survey.name, unit="batch", delay=1) as bar:
        figures = measures.evaluate(model, bar, images.content_size)
    figures["downsampling_factor"] = survey.downsampling_factor
    figures["interpolation_factor"] = survey.interpolation_factor
    reconstructions = _reconstructed(model, shown, batch_size)
    return Compared(survey.name, figures, centre_crop(reconstructions, images.content_size))


@torch.no_grad()
def _reconstructed(model: LooCVQModel, originals: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Return uint8 images `(n, C, H, W)` as they come back."""
    batches = (to_float(batch).to(model.device, model.dtype) for batch in originals.split(batch_size))
    return torch.cat([to_uint8(model.decode(model.encode(batch).latents).sample).cpu() for batch in batches])


# The results ----------------------------------------------------------------------------------------------------------


def _circumstances(
    surveys: list[_Survey], measures: ReconstructionMeasures, images: ImageSet, count: int, options: Compare
) -> list[str]:
    """Return lines on what was measured how, and what a careful reader would ask about single models."""
    config = images.config
    side = f"{config.resolution}x{config.resolution}"
    lines = [f"{count:,} image{'s' * (count > 1)} of {config.path}, split {config.split}, {side}, fit={config.fit}"]
    left_open = [name for name in ("resolution", "fit") if getattr(options, name) is None]
    if left_open:
        lines[0] += f" ({' and '.join(left_open)} as in the training of {surveys[0].name}, the first model)"
    if images.content_size is not None:
        height, width = images.content_size
        lines.append(f"measured, and bits counted, on the {width}x{height} pixels inside the padding")
    lines.append(f"protocol {options.protocol}")
    others = [f"{s.name} ({s.sample_size}x{s.sample_size})" for s in surveys if s.sample_size != config.resolution]
    if others:
        lines.append(f"trained at another resolution: {', '.join(others)}")
    lines += measures.not_measured
    if measures.features is not None and "rfid" in measures.metrics:
        bias = bias_note(count, measures.features.dim, f"rfid@{measures.features.name}")
        lines += [bias] if bias else []
    return lines


def _page(table: str, lines: list[str], drawings: list, options: Compare) -> str:
    """Return comparison.md."""
    parts = ["# Comparison", table, "\n".join(f"- {line}" for line in lines)]
    for drawing in drawings:
        parts += [f"## {drawing.title}", f"![{drawing.title}]({drawing.name}.png)", drawing.caption]
    parts += ["## Command", f"```\n{options.command_line}\n```"]
    return "\n\n".join(parts) + "\n"


def _write(folder: Path, page: str, record: dict, drawings: list) -> None:
    """Write all files; those of an earlier comparison are replaced."""
    files = {f"{drawing.name}.png": drawing.png() for drawing in drawings}
    files |= {f"{drawing.name}.svg": drawing.svg() for drawing in drawings}
    files |= {
        "comparison.md": page.encode(),
        "comparison.json": (json.dumps(record, indent=2, allow_nan=False) + "\n").encode(),
    }
    make_folder(folder)
    for name, content in files.items():
        replace_bytes(folder / name, content)
