"""`looc-ldm compare`: several autoencoders on the same images, sorted by bits per pixel, beside JPEG and WebP."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from looc_ldm import __version__
from looc_ldm.arguments import DATA_HELP, add_data_options, add_device_option, add_dtype_option, positive
from looc_ldm.commands.many_files import batch_of_squares, pixel_budget
from looc_ldm.commands.reconstruction_metrics import add_reconstruction_metric_options, reconstruction_measures
from looc_ldm.commands.record import bias_note, versions
from looc_ldm.commands.shared import as_user_errors, choose_device, data_of, square_images
from looc_ldm.errors import ModelError, UserError
from looc_ldm.files import check_folder, check_name, make_folder, replace_bytes


def add_parsers(commands) -> None:
    """Add `compare` to the commands of `looc-ldm`."""
    compare = commands.add_parser(
        "compare",
        help="several models on the same images, sorted by bits per pixel",
        description="Measure several models on the same square images, and show what each makes of them. Writes "
        "comparison.md (the table), comparison.json (every figure), comparison.png and .svg (reconstructions and "
        "amplified differences), rate_distortion.png and .svg (the models beside JPEG and WebP). PSNR is always "
        "measured. Models are loaded one after the other.",
    )
    compare.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="autoencoders or pipelines of any kind and rate: folders, hub ids or starter",
    )
    compare.add_argument("--data", required=True, help=DATA_HELP)
    add_data_options(compare, model="the first model")
    compare.add_argument(
        "--images", type=positive, help="measure only so many images, at even distances (default: all)"
    )
    compare.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="what the models are called, in their order (default: what tells their paths apart)",
    )
    compare.add_argument("--show", type=positive, default=8, help="images in the picture (default: 8)")
    compare.add_argument(
        "--codec-images",
        type=positive,
        default=128,
        help="images that JPEG and WebP are measured on, at even distances among those of the models; about half a "
        "second each at 256x256 (default: 128)",
    )
    compare.add_argument(
        "--output", type=Path, default=Path("comparison"), help="folder of the results (default: comparison)"
    )
    add_reconstruction_metric_options(compare)
    add_device_option(compare)
    add_dtype_option(compare)
    compare.set_defaults(command=_compare)


@dataclass
class _Survey:
    """What is to be known of a model before anything is computed."""

    source: str  # as typed
    name: str
    fingerprint: str
    channels: int
    sample_size: int
    downsampling_factor: int
    interpolation_factor: int


def _compare(options: argparse.Namespace) -> None:
    import torch

    from looc_ldm.analysis.comparison import (
        comparison_picture,
        difference_factor,
        markdown_table,
        rate_distortion_figure,
    )
    from looc_ldm.images import centre_crop
    from looc_ldm.training.data import spread

    check_folder(options.output)
    check_name(options.output / "rate_distortion.png")  # the longest of them
    choose_device(options.device)  # refuses one that is not there
    if options.metrics is not None:
        options.metrics = ["psnr", *options.metrics]
    measures = reconstruction_measures(options)
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


def _surveys(options: argparse.Namespace) -> list[_Survey]:
    """Every model, loaded once and let go: what cannot be loaded or compared is found before hours of work."""
    from looc_ldm.analysis.comparison import distinguishing_names

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
    from looc_ldm.fingerprint import model_fingerprint
    from looc_ldm.loading import load_autoencoder

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


def _images(options: argparse.Namespace, first: _Survey):
    """The images that all models see: where the options leave it open, as the first model was trained."""
    images = square_images(options, first.source, options.resolution or first.sample_size, first.channels)
    if not len(images):
        raise UserError(f"{options.data!r} has no images in its split {images.config.split}.")
    return images


# The measuring --------------------------------------------------------------------------------------------------------


def _codec_curves(images, chosen, options: argparse.Namespace) -> dict[str, list]:
    """JPEG and WebP on what is measured of these images."""
    from tqdm.auto import tqdm

    from looc_ldm.analysis.rate_distortion import CODECS, codec_curve
    from looc_ldm.images import centre_crop

    curves = {}
    with as_user_errors(ValueError):
        for codec in CODECS:
            pixels = (centre_crop(images[index][0], images.content_size) for index in chosen)
            with tqdm(pixels, total=len(chosen), desc=codec, unit="img", delay=1) as bar:
                curves[codec] = codec_curve(bar, codec, protocol=options.protocol)
    return curves


def _measured(survey: _Survey, measures, images, chosen, shown, options: argparse.Namespace):
    """Load a model, measure it on the images `chosen`, and reconstruct those that are `shown`."""
    import torch
    from torch.utils.data import Subset
    from tqdm.auto import tqdm

    from looc_ldm.analysis.comparison import Compared
    from looc_ldm.image_codes import set_tiling
    from looc_ldm.images import centre_crop
    from looc_ldm.loading import load_autoencoder
    from looc_ldm.training.data import float_batches

    device = choose_device(options.device)
    model = load_autoencoder(survey.source, getattr(torch, options.dtype)).to(device)
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


def _reconstructed(model, originals, batch_size: int):
    """uint8 images `(n, C, H, W)` as they come back."""
    import torch

    from looc_ldm.images import to_float, to_uint8

    with torch.no_grad():
        batches = (to_float(batch).to(model.device, model.dtype) for batch in originals.split(batch_size))
        return torch.cat([to_uint8(model.decode(model.encode(batch).latents).sample).cpu() for batch in batches])


# The results ----------------------------------------------------------------------------------------------------------


def _circumstances(surveys: list[_Survey], measures, images, count: int, options: argparse.Namespace) -> list[str]:
    """On what and how it was measured, and what a careful reader would ask about single models."""
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


def _page(table: str, lines: list[str], drawings: list, options: argparse.Namespace) -> str:
    """comparison.md."""
    parts = ["# Comparison", table, "\n".join(f"- {line}" for line in lines)]
    for drawing in drawings:
        parts += [f"## {drawing.title}", f"![{drawing.title}]({drawing.name}.png)", drawing.caption]
    parts += ["## Command", f"```\n{options.command_line}\n```"]
    return "\n\n".join(parts) + "\n"


def _write(folder: Path, page: str, record: dict, drawings: list) -> None:
    """All files; those of an earlier comparison are replaced."""
    files = {f"{drawing.name}.png": drawing.png() for drawing in drawings}
    files |= {f"{drawing.name}.svg": drawing.svg() for drawing in drawings}
    files |= {
        "comparison.md": page.encode(),
        "comparison.json": (json.dumps(record, indent=2, allow_nan=False) + "\n").encode(),
    }
    make_folder(folder)
    for name, content in files.items():
        replace_bytes(folder / name, content)
