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
    draw_samples,
    inception_features,
    load_pipeline,
    model_and_images,
    rate_of,
)
from looc_ldm.errors import UserError, one_line_errors
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

    from looc_ldm.commands.class_labels import class_folder
    from looc_ldm.files import write_image
    from looc_ldm.images import to_pil

    grid_file = options.output.with_name(f"{options.output.resolve().name}.png")  # not among what it shows
    check_folder(options.output)
    check_file(grid_file)
    pipe = load_pipeline(options)
    classes = options.labels or sorted(pipe.config.id2label or {}) or [None]
    labels = [by_index(label, pipe) for label in classes for _ in range(options.images)]
    columns, rows = min(options.images, GRID_COLUMNS), min(len(classes), GRID_ROWS)
    grid, replaced = [], 0
    with as_user_errors(ValueError):
        for i, drawn in enumerate(draw_samples(pipe, labels, options)):
            folder = options.output / class_folder(labels[i], pipe)
            folder.mkdir(parents=True, exist_ok=True)
            image, file = to_pil(drawn), folder / f"{i:05d}.png"
            replaced += file.exists()
            write_image(image, file)
            if i // options.images < rows and i % options.images < columns:
                grid.append(image)
    write_image(make_image_grid(grid, rows, columns), grid_file)
    print(f"{len(labels)} images in {options.output}, and {grid_file}, a row a class")
    others = sum(1 for _ in options.output.rglob("*.png")) - len(labels)
    if others or replaced:
        print(f"warning: {options.output} held images before: {replaced} replaced, {others} still there")


def _reconstruct(options: argparse.Namespace) -> None:
    from looc_ldm.files import write_image
    from looc_ldm.training.validation import reconstruction_grid

    check_file(options.output)
    if options.output.suffix.lower() != ".png":
        raise UserError(f"--output must be a .png file, got {str(options.output)!r}.")
    model, images = model_and_images(options)
    grid = reconstruction_grid([model], images, options.images)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_image(grid, options.output)
    bits, pixels = rate_of(model, images)
    print(
        f"{options.output}: originals above, reconstructions below, {bits:.0f} bits an image, "
        f"{bits / pixels:.4g} bits per pixel"
    )


COMMANDS = {
    "quickstart": _quickstart,
    "sample": _sample,
    "reconstruct": _reconstruct,
}


if __name__ == "__main__":
    main()
