"""`looc-ldm compare`: measure several autoencoders on the same images, sorted by rate, beside JPEG and WebP."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from html import escape
from typing import NamedTuple

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
from looc_ldm.commands.measures import reconstruction_measures
from looc_ldm.commands.options import Compare
from looc_ldm.commands.record import versions
from looc_ldm.commands.shared import (
    cast,
    data_of,
    load_images,
    load_model,
    use_fastest_threads_to_reconstruct,
    warn_of_training_images,
)
from looc_ldm.images.image_set import ImageSet, spread
from looc_ldm.images.pixels import centre_crop, to_float, to_uint8
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.training.data import float_batches
from looc_ldm.utils.devices import choose_device
from looc_ldm.utils.errors import ModelError, UserError
from looc_ldm.utils.files import check_folder, make_folder, replace_bytes
from looc_ldm.utils.report import Report


class _Candidate(NamedTuple):
    """A model to compare: source as typed, name in the table, fingerprint of its weights as they are stored."""

    source: str
    name: str
    model: LooCVQModel
    fingerprint: str


def compare(options: Compare) -> None:
    """Measure models and write a table, pictures and every figure."""
    check_folder(options.output)
    device = choose_device(options.device)
    metrics = None if options.metrics is None else ["psnr", *options.metrics]
    measures = reconstruction_measures(replace(options, metrics=metrics))
    candidates = _load(options)
    images = load_images(options.data, options, candidates[0].model)
    for candidate in candidates:
        warn_of_training_images(images, candidate.model)
    chosen = spread(len(images), options.images or len(images))
    compressed = chosen[spread(len(chosen), options.codec_images)]
    shown = torch.stack([images[index][0] for index in chosen[spread(len(chosen), options.show)]])

    codecs = {}
    for codec in CODECS:
        pixels = (centre_crop(images[index][0], images.content_size) for index in compressed)
        with tqdm(pixels, total=len(compressed), desc=codec, unit="img", delay=1) as bar:
            codecs[codec] = codec_curve(bar, codec, protocol=options.protocol)
    side = images.config.resolution
    batch_size = batch_of_squares(device.type, side, 64)
    compared = []
    for candidate in candidates:
        model = cast(candidate.model, device, options.dtype)
        use_fastest_threads_to_reconstruct(model)
        set_tiling(model, side**2, pixel_budget(device.type))
        batches = float_batches(Subset(images, chosen.tolist()), batch_size)
        with tqdm(batches, desc=candidate.name, unit="batch", delay=1) as bar:
            figures = measures.evaluate(model, bar, images.content_size)
        figures["downsampling_factor"] = model.downsampling_factor
        figures["interpolation_factor"] = model.quantize.interpolation_factor
        reconstructions = centre_crop(_reconstruct(model, shown, batch_size), images.content_size)
        compared.append((candidate, Compared(candidate.name, figures, reconstructions)))
        model.to("cpu")
    compared.sort(key=lambda pair: pair[1].figures["bits_per_pixel"])  # stable: equal rates stay in the order given

    models = [model for _, model in compared]
    originals = centre_crop(shown, images.content_size)
    factor = difference_factor(originals, models)
    drawings = [comparison_picture(originals, models, factor), rate_distortion_figure(codecs, models, len(compressed))]
    table = markdown_table(models)
    notes = _notes(candidates, images, len(chosen), options) + measures.notes(len(chosen))
    record = {
        "models": [
            {"name": candidate.name, "model": candidate.source, "fingerprint": candidate.fingerprint, **model.figures}
            for candidate, model in compared
        ],
        "codecs": {name: [asdict(point) for point in points] for name, points in codecs.items()},
        "codec_images": len(compressed),
        "difference_factor": factor,
        **data_of(images),
        "resolution": side,
        "dtype": options.dtype,
        "weights": measures.weights,
        "seeds": measures.seeds,
        "versions": versions(),
        "command": options.command_line,
        "version": __version__,
    }
    report = Report("Comparison")
    report.text(f'<pre style="overflow-x: auto">{escape(table)}</pre>{"<br>".join(map(escape, notes))}')
    page = ["# Comparison", table, "\n".join(f"- {note}" for note in notes)]
    files = {"comparison.json": (json.dumps(record, indent=2, allow_nan=False) + "\n").encode()}
    for drawing in drawings:
        page += [f"## {drawing.title}", f"![{drawing.title}]({drawing.name}.png)", drawing.caption]
        files |= {f"{drawing.name}.png": drawing.png(), f"{drawing.name}.svg": drawing.svg()}
        report.heading(drawing.title)
        report.figure(drawing.svg(), drawing.title, drawing.caption)
    page += ["## Command", f"```\n{options.command_line}\n```\n"]
    files["comparison.md"] = "\n\n".join(page).encode()
    report.text(f"<code>{escape(options.command_line)}</code>")
    files["comparison.html"] = report.html().encode()
    make_folder(options.output)
    for name, content in files.items():
        replace_bytes(options.output / name, content)
    print("\n".join([table, "", *notes, f"{options.output}: {', '.join(files)}"]))


def _load(options: Compare) -> list[_Candidate]:
    """Load all models on the CPU; refuse models that cannot be compared, before hours of work."""
    names = options.names or distinguishing_names(options.models)
    if len(names) != len(options.models):
        raise UserError(f"--names gives {len(names)} names to {len(options.models)} models.")
    cpu = torch.device("cpu")
    candidates = [_Candidate(s, name, *load_model(s, cpu)) for s, name in zip(options.models, names, strict=True)]
    first = candidates[0]
    side = options.resolution or first.model.config.sample_size
    multiple = math.lcm(*(candidate.model.downsampling_factor for candidate in candidates))
    for source, _, model, _ in candidates:
        channels, expected = model.config.in_channels, first.model.config.in_channels
        if channels != expected:
            raise ModelError(
                f"{first.source!r} takes images of {expected} channels and {source!r} of {channels}: they cannot be "
                "compared on the same images."
            )
        if side % model.downsampling_factor:
            raise UserError(
                f"{source!r} takes images whose side is a multiple of {model.downsampling_factor}, not {side}x{side}: "
                f"give --resolution, a multiple of {multiple} for all these models."
            )
    return candidates


@torch.no_grad()
def _reconstruct(model: LooCVQModel, originals: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Return reconstructions of uint8 images `(n, C, H, W)`."""
    batches = (to_float(batch).to(model.device, model.dtype) for batch in originals.split(batch_size))
    return torch.cat([to_uint8(model.decode(model.encode(batch).latents).sample).cpu() for batch in batches])


def _notes(candidates: list[_Candidate], images: ImageSet, count: int, options: Compare) -> list[str]:
    """Return notes on the data, the protocol, and models that were trained at a different resolution."""
    config = images.config
    side = f"{config.resolution}x{config.resolution}"
    notes = [
        f"images: {count:,} of {config.path}, split {config.split}, {side}, fit={config.fit}",
        f"protocol {options.protocol}",
    ]
    if images.content_size is not None:
        height, width = images.content_size
        notes.append(f"measured, and bits counted, on the {width}x{height} pixels inside the padding")
    sizes = {candidate.name: candidate.model.config.sample_size for candidate in candidates}
    others = [f"{name} ({size}x{size})" for name, size in sizes.items() if size != config.resolution]
    return notes + ([f"trained at a different resolution: {', '.join(others)}"] if others else [])
