"""`looc-ldm evaluate`: how well a first stage reconstructs, and how well a model generates.

By several processes: `accelerate launch -m looc_ldm.cli evaluate ...`. They divide the images; figures are those of
one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from looc_ldm.arguments import (
    DATA_HELP,
    add_data_options,
    add_device_option,
    add_dtype_option,
    add_result_option,
    add_sampling_options,
    positive,
)
from looc_ldm.commands.generation_metrics import add_generation_metric_options
from looc_ldm.commands.reconstruction_metrics import add_reconstruction_metric_options

LAUNCH = "By several processes: accelerate launch -m looc_ldm.cli evaluate ..., with the same options and figures."
READ_BATCH = 32  # images that are read, and reconstructed, at a time


def add_parsers(commands) -> None:
    """Add `evaluate reconstruction` and `evaluate generation` to the commands of `looc-ldm`."""
    evaluate = commands.add_parser("evaluate", help="measure reconstructions or samples")
    kinds = evaluate.add_subparsers(title="what", metavar="WHAT", required=True)

    reconstruction = kinds.add_parser(
        "reconstruction",
        help="PSNR, SSIM, L1, LPIPS, rFID, KID, codebook use and entropy, bits per pixel",
        description=f"How well images are reconstructed, and at which rate. {LAUNCH}",
    )
    reconstruction.add_argument("model", metavar="MODEL", help="autoencoder or pipeline: folder, hub id or starter")
    images = reconstruction.add_argument_group("images")
    images.add_argument("--data", required=True, help=DATA_HELP)
    add_data_options(images)
    images.add_argument("--images", type=positive, help="measure only so many images, at even distances (default: all)")
    add_reconstruction_metric_options(reconstruction)
    _add_run_options(reconstruction)
    reconstruction.set_defaults(command=_evaluate_reconstruction)

    generation = kinds.add_parser(
        "generation",
        help="FID, KID, Inception score, precision and recall, FID of classes, FD-DINOv2, CMMD",
        description="How close generated images are to real ones. They are drawn from a model, without a detour over "
        f"files, or are read from a folder or an npz. {LAUNCH}",
    )
    generation.add_argument(
        "model",
        metavar="SAMPLES",
        help="pipeline (folder, hub id or starter) that draws them; or folder of images; or .npz in ADM's layout",
    )
    reference = generation.add_argument_group(
        "real images", "Where samples are files, real images are brought to the side of these, cropped to squares."
    )
    reference.add_argument(
        "--reference",
        "--data",
        dest="data",
        required=True,
        metavar="DATA",
        help=f"{DATA_HELP}; or .npz of ADM's reference batches, whose statistics (mu, sigma) FID is measured against",
    )
    add_data_options(reference)
    reference.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="where their features are kept for further runs (default: $LOOC_LDM_CACHE, or looc_ldm in the user's "
        "cache folder)",
    )
    reference.add_argument("--no-cache", action="store_true", help="neither read nor keep them (default: both)")
    samples = generation.add_argument_group(
        "samples", "--images, --steps, --guidance-scale, --batch-size and --seed go with a model that draws."
    )
    samples.add_argument(
        "--images",
        type=positive,
        help="how many; of each class in its share of the real images (default: 10000)",
    )
    sampling_defaults = add_sampling_options(samples, batch_size=100)
    samples.add_argument(
        "--export-npz", type=Path, metavar="FILE", help="also write them, in ADM's layout (default: they are not kept)"
    )
    add_generation_metric_options(generation)
    _add_run_options(generation)
    generation.set_defaults(command=_evaluate_generation, sampling_defaults=sampling_defaults)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run and result")
    add_device_option(group)
    add_dtype_option(group)
    add_result_option(group)


def _evaluate_reconstruction(options: argparse.Namespace) -> None:
    import torch
    from tqdm.auto import tqdm

    from looc_ldm.commands.image_sets import StoredImages
    from looc_ldm.commands.many_files import batch_of_squares, pixel_budget
    from looc_ldm.commands.reconstruction_metrics import reconstruction_measures
    from looc_ldm.commands.record import bias_note, machine, make_record, print_record, write_record
    from looc_ldm.commands.shared import check_file, data_of, fingerprints_for, load_images
    from looc_ldm.distributed import start_processes
    from looc_ldm.image_codes import set_tiling
    from looc_ldm.images import to_float
    from looc_ldm.loading import load_autoencoder
    from looc_ldm.metrics.shares import share_of_batches
    from looc_ldm.training.data import spread

    check_file(options.output)
    measures = reconstruction_measures(options)
    device, accelerator = start_processes(options.device)
    is_main = accelerator is None or accelerator.is_main_process
    model = load_autoencoder(options.model, getattr(torch, options.dtype)).to(device)
    images = load_images(options, model)
    fingerprints = fingerprints_for(options) if is_main else {}
    side = images.config.resolution
    set_tiling(model, side**2, pixel_budget(device.type))
    chosen = StoredImages(images, spread(len(images), options.images or len(images)).tolist())
    shares = share_of_batches(len(chosen), batch_of_squares(device.type, side, READ_BATCH), accelerator)
    with tqdm(
        chosen.batches(shares), desc="reconstructing", unit="batch", total=len(shares), delay=1, disable=not is_main
    ) as bar:
        figures = measures.evaluate(model, map(to_float, bar), images.content_size, accelerator)
    if accelerator is not None:
        accelerator.end_training()
    if not is_main:
        return
    record = make_record(
        figures | data_of(images),
        options,
        weights=measures.weights,
        fingerprints=fingerprints,
        seeds=measures.seeds,
        machine=machine(device, accelerator),
    )
    notes = list(measures.not_measured)
    if options.images is not None and options.images > len(images):
        notes.append(f"note: there are only {len(images):,} images")
    if measures.features is not None and "rfid" in measures.metrics:
        notes.append(bias_note(figures["images"], measures.features.dim, f"rfid@{measures.features.name}"))
    record["notes"] = [note for note in notes if note]
    write_record(record, options.output)
    print_record(record, record["notes"])


def _evaluate_generation(options: argparse.Namespace) -> None:
    from looc_ldm.commands.evaluate_generation import evaluate_samples

    evaluate_samples(options)
