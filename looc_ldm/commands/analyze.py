"""`looc-ldm analyze`: draw the paper's figures for a model."""

from __future__ import annotations

from importlib.metadata import version

from torch.utils.data import Subset
from tqdm.auto import tqdm

from looc_ldm import __version__
from looc_ldm.analysis.collect import collect
from looc_ldm.analysis.page import NUMBERS, PAGE, page, write_analysis
from looc_ldm.analysis.page import analyze as draw_figures
from looc_ldm.codes.images import set_tiling
from looc_ldm.commands.many_files import batch_of_squares, pixel_budget
from looc_ldm.commands.options import Analyze
from looc_ldm.commands.record import versions
from looc_ldm.commands.shared import (
    data_of,
    load_images,
    load_model,
    use_fastest_threads_to_reconstruct,
    warn_of_training_images,
)
from looc_ldm.images.image_set import spread
from looc_ldm.training.data import float_batches
from looc_ldm.utils.devices import choose_device
from looc_ldm.utils.errors import UserError
from looc_ldm.utils.files import check_folder, make_folder


def analyze(options: Analyze) -> None:
    """Write figures, a page and numbers."""
    check_folder(options.output)
    if options.output.is_dir() and any(options.output.iterdir()) and not (options.output / PAGE).is_file():
        raise UserError(f"--output {str(options.output)!r} does not hold an analysis: give a new folder.")
    device = choose_device(options.device)
    model, fingerprint = load_model(options.model, device, options.dtype)
    use_fastest_threads_to_reconstruct(model)
    images = load_images(options.data, options, model)
    warn_of_training_images(images, model)
    side = images.config.resolution
    set_tiling(model, side**2, pixel_budget(device.type))
    chosen = spread(len(images), options.images or len(images)).tolist()
    batches = float_batches(Subset(images, chosen), batch_of_squares(device.type, side, 64))
    with tqdm(batches, desc="analyzing", unit="batch", delay=1) as bar:
        findings = collect(model, bar, len(chosen), images.content_size, options.seed)
    drawings, figures = draw_figures(findings, options.seed)

    data = f"{options.data}, {images.config.split}" if images.config.split else options.data
    html = page(drawings, figures, options.model, data, options.command_line)
    record = figures | data_of(images) | {"resolution": images.config.resolution, "seed": options.seed}
    record |= {"fingerprint": fingerprint, "dtype": options.dtype, "device": device.type}
    drawn_with = {package: version(package) for package in ("matplotlib", "scikit-learn")}
    record |= {"command": options.command_line, "version": __version__, "versions": versions() | drawn_with}
    make_folder(options.output)
    write_analysis(options.output, drawings, record, html)
    rates = f"{findings.bits_per_pixel:.4g} bits per pixel ({findings.bits_per_pixel_entropy:.4g} entropy-coded)"
    print(f"{findings.images:,} images, {findings.psnr:.2f} dB at {rates}; {findings.statistics.use:.1%} codebook use")
    print(f"{options.output / PAGE}, {len(drawings)} figures as PNG and SVG, {NUMBERS}")
