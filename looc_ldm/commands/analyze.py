"""`looc-ldm analyze`: the paper's figures for any checkpoint. Heavy packages are imported inside the functions."""

from __future__ import annotations

import argparse
from pathlib import Path

from looc_ldm.arguments import DATA_HELP, add_data_options, add_device_option, add_dtype_option, positive, seed_number
from looc_ldm.commands.many_files import batch_of_squares, pixel_budget
from looc_ldm.commands.record import versions
from looc_ldm.commands.shared import as_user_errors, choose_device, data_of, load_images
from looc_ldm.errors import DataError, ModelError, UserError
from looc_ldm.files import check_folder, check_name


def add_parsers(commands) -> None:
    """Add `analyze` to the commands of `looc-ldm`."""
    parser = commands.add_parser(
        "analyze",
        help="codebook use, per segment, sharing, t-SNE, rate and distortion, errors: the paper's figures",
        description="A look inside a model: how its codebook is used, overall and by each segment, how codevectors are "
        "shared and where they lie among the features, rate and distortion beside JPEG and WebP, where errors are, and "
        "what codevectors stand for. Every figure as PNG and SVG, one page with all of them (analysis.html), and the "
        "numbers (analysis.json).",
    )
    parser.add_argument("model", metavar="MODEL", help="autoencoder or pipeline: folder, hub id or starter")
    parser.add_argument("--data", required=True, help=DATA_HELP)
    add_data_options(parser)
    parser.add_argument("--images", type=positive, help="look at only so many images, at even distances (default: all)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("analysis"),
        help="folder: new, empty, or of an earlier analysis, which is replaced (default: analysis)",
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="of t-SNE and of samples of the data (default: 0)")
    add_device_option(parser)
    add_dtype_option(parser)
    parser.set_defaults(command=_analyze)


def _analyze(options: argparse.Namespace) -> None:
    _check_output(options.output)

    from importlib.metadata import version

    import torch
    from torch.utils.data import Subset
    from tqdm.auto import tqdm

    from looc_ldm import __version__
    from looc_ldm.analysis.collect import collect
    from looc_ldm.analysis.page import NUMBERS, PAGE, analyze, page, write_analysis
    from looc_ldm.analysis.style import counted
    from looc_ldm.files import make_folder
    from looc_ldm.fingerprint import model_fingerprint
    from looc_ldm.image_codes import MODES, set_tiling
    from looc_ldm.loading import load_autoencoder
    from looc_ldm.training.data import float_batches, spread

    device, dtype = choose_device(options.device), getattr(torch, options.dtype)
    model = load_autoencoder(options.model)
    if model.config.in_channels not in MODES:
        raise ModelError(f"images have 1 (grey) or 3 channels, the model asks for {model.config.in_channels}.")
    fingerprint = model_fingerprint(model)  # of the weights as they are stored
    images = load_images(options, model)
    if not len(images):
        raise DataError(f"no images in {options.data!r}.")
    if dtype != torch.float32:
        model = load_autoencoder(options.model, dtype)
    model = model.to(device)

    side = images.config.resolution
    set_tiling(model, side**2, pixel_budget(device.type))
    chosen = spread(len(images), min(options.images or len(images), len(images))).tolist()
    batches = float_batches(Subset(images, chosen), batch_of_squares(device.type, side, 64))
    with as_user_errors(ValueError), tqdm(batches, desc="analyzing", unit="batch", delay=1) as bar:
        findings = collect(model, bar, len(chosen), images.content_size, options.seed)
    drawings, figures = analyze(findings, model, lambda i: images[chosen[i]][0], options.seed)

    data = f"{options.data}, {images.config.split}" if images.config.split else options.data
    html = page(drawings, figures, options.model, data, options.command_line)
    record = figures | data_of(images) | {"resolution": images.config.resolution, "seed": options.seed}
    record |= {"fingerprint": fingerprint, "dtype": options.dtype, "device": device.type}
    drawn_with = {package: version(package) for package in ("matplotlib", "scikit-learn")}
    record |= {"command": options.command_line, "version": __version__, "versions": versions() | drawn_with}
    make_folder(options.output)
    write_analysis(options.output, drawings, record, html)
    rates = f"{findings.bits_per_pixel:.4g} bits per pixel ({findings.bits_per_pixel_entropy:.4g} entropy-coded)"
    images_seen = counted(findings.images, "image")
    print(f"{images_seen}, {findings.psnr:.2f} dB at {rates}; {findings.statistics.use:.1%} of the codebook used")
    print(f"{options.output / PAGE}, {len(drawings)} figures as PNG and SVG, {NUMBERS}")


def _check_output(folder: Path) -> None:
    """Refuse, before any work, a folder that cannot be written to, or that holds anything but an analysis."""
    from looc_ldm.analysis.page import NUMBERS, PAGE

    check_name(folder / "rate_distortion.png")  # the longest of them
    check_folder(folder)
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).is_file() for name in (NUMBERS, PAGE)):
        raise UserError(
            f"--output {str(folder)!r} holds something else than an analysis: give a new or an empty folder."
        )
