"""`looc-ldm`: the command line. The outermost layer: it may use every part, and imports them inside its commands."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys

from looc_ldm.arguments import TRAINERS, make_parser
from looc_ldm.commands.shared import (
    as_user_errors,
    by_index,
    check_file,
    data_of,
    draw_samples,
    fingerprints_for,
    inception_features,
    load_images,
    load_pipeline,
    model_and_images,
    rate_of,
    report_figures,
)
from looc_ldm.errors import one_line_errors
from looc_ldm.files import check_folder

GRID_COLUMNS, GRID_ROWS = 16, 100  # of the grid of samples, at most


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with one_line_errors():
        if arguments[:1] == ["train"] and arguments[1:2] and arguments[1] in TRAINERS:
            _train(arguments[1], arguments[2:])  # its flags come from the config's dataclasses; it logs more
            return
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        options = make_parser(COMMANDS).parse_args(arguments)
        options.command_line = shlex.join(["looc-ldm", *arguments])
        options.command(options)


# Commands ------------------------------------------------------------------------------------------------------------


def _train(stage: str, arguments: list[str]) -> None:
    if stage == "autoencoder":
        from looc_ldm.training.autoencoder import main as train
    else:
        from looc_ldm.training.diffusion import main as train
    train(arguments)


def _quickstart(options: argparse.Namespace) -> None:
    from looc_ldm.quickstart import quickstart

    features = inception_features(options) if options.inception_weights else None
    report = quickstart(options.output, features)
    print(f"report: {report}")


def _sample(options: argparse.Namespace) -> None:
    from diffusers.utils import make_image_grid

    from looc_ldm.files import write_image
    from looc_ldm.images import to_pil

    check_folder(options.output)
    pipe = load_pipeline(options)
    classes = options.labels or sorted(pipe.config.id2label or {}) or [None]
    labels = [by_index(label, pipe) for label in classes for _ in range(options.images)]
    columns, rows = min(options.images, GRID_COLUMNS), min(len(classes), GRID_ROWS)
    grid = []
    with as_user_errors(ValueError):
        for i, drawn in enumerate(draw_samples(pipe, labels, options)):
            options.output.mkdir(parents=True, exist_ok=True)
            image = to_pil(drawn)
            write_image(image, options.output / f"{i:05d}.png")
            if i // options.images < rows and i % options.images < columns:
                grid.append(image)
    write_image(make_image_grid(grid, rows, columns), options.output / "grid.png")
    print(f"{len(labels)} images and {options.output / 'grid.png'}, a row a class")


def _reconstruct(options: argparse.Namespace) -> None:
    from looc_ldm.files import write_image
    from looc_ldm.training.validation import reconstruction_grid

    check_file(options.output)
    model, images = model_and_images(options)
    grid = reconstruction_grid([model], images, options.images)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_image(grid, options.output)
    bits, pixels = rate_of(model, images)
    print(
        f"{options.output}: originals above, reconstructions below, {bits:.0f} bits an image, "
        f"{bits / pixels:.4g} bits per pixel"
    )


def _evaluate_reconstruction(options: argparse.Namespace) -> None:
    from torch.utils.data import Subset
    from tqdm.auto import tqdm

    from looc_ldm.metrics import evaluate_reconstruction
    from looc_ldm.training.data import float_batches, spread

    check_file(options.output)
    features = inception_features(options) if options.inception_weights else None
    model, images = model_and_images(options)
    fingerprints = fingerprints_for(options)
    chosen = spread(len(images), options.images or len(images)).tolist()
    bar = tqdm(float_batches(Subset(images, chosen)), desc="reconstructing", unit="batch", delay=1)
    with as_user_errors(ValueError):
        figures = evaluate_reconstruction(model, bar, images.content_size, features)
    report_figures(figures | data_of(images), fingerprints, options)


def _evaluate_generation(options: argparse.Namespace) -> None:
    from looc_ldm.metrics import fid_and_kid

    check_file(options.output)
    pipe = load_pipeline(options)
    images = load_images(options, pipe.vqvae)
    fingerprints = fingerprints_for(options, generation=True)
    features = inception_features(options)
    # From places at even distances in the reference: samples and reference then have the same share of each class.
    known = images.labels().tolist() if pipe.num_class_embeds and images.classes else [None]
    labels = [known[i * len(known) // options.images] for i in range(options.images)]
    with as_user_errors(ValueError):
        figures = fid_and_kid(list(draw_samples(pipe, labels, options)), images.pixels(), features)
    bits, pixels = rate_of(pipe.vqvae, images)
    figures |= {
        "bits_per_pixel": bits / pixels,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
    }
    report_figures(figures | data_of(images), fingerprints, options)


COMMANDS = {
    "quickstart": _quickstart,
    "sample": _sample,
    "reconstruct": _reconstruct,
    "evaluate reconstruction": _evaluate_reconstruction,
    "evaluate generation": _evaluate_generation,
}


if __name__ == "__main__":
    main()
