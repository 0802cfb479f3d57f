"""`looc-ldm`: the command line. The outermost layer: it may use every part, and imports them inside its commands."""

from __future__ import annotations

import argparse
import json
import logging
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from looc_ldm import __version__
from looc_ldm.arguments import TRAINERS, make_parser
from looc_ldm.errors import UserError, one_line_errors
from looc_ldm.files import check_folder

GRID_COLUMNS, GRID_ROWS = 16, 100  # of the grid of samples, at most


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    with one_line_errors():
        if arguments[:1] == ["train"] and arguments[1:2] and arguments[1] in TRAINERS:
            _train(arguments[1], arguments[2:])  # its flags come from the config's dataclasses
            return
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

    features = _features(options) if options.inception_weights else None
    report = quickstart(options.output, features)
    print(f"report: {report}")


def _cache_latents(options: argparse.Namespace) -> None:
    import torch
    from accelerate import Accelerator

    from looc_ldm.loading import load_autoencoder
    from looc_ldm.training.config import DiffusionConfig, load_config
    from looc_ldm.training.data import load_image_sets
    from looc_ldm.training.latents import cache_latents, check_cache_folder

    overrides = {"autoencoder": options.autoencoder, "data__path": options.data, "latents": options.output}
    config = load_config(DiffusionConfig, options.config, **{k: v for k, v in overrides.items() if v is not None})
    if not config.autoencoder:
        raise UserError(f"the config {options.config!r} names no autoencoder: give --autoencoder.")
    folder = Path(config.latents or Path(config.output_dir) / "latents")
    check_folder(folder)
    check_cache_folder(folder)
    device = _device(options.device)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    accelerator = Accelerator(cpu=device.type == "cpu")
    model = load_autoencoder(config.autoencoder).to(accelerator.device)
    images, _ = load_image_sets(config.data, model.config.in_channels)
    cache = cache_latents(model, images, folder, accelerator)
    print(f"{folder}: {len(cache)} images, standard deviation {cache.standard_deviation:.4g}")


def _sample(options: argparse.Namespace) -> None:
    from diffusers.utils import make_image_grid

    from looc_ldm.files import write_image
    from looc_ldm.images import to_pil

    check_folder(options.output)
    pipe = _load_pipeline(options)
    classes = options.labels or sorted(pipe.config.id2label or {}) or [None]
    labels = [_by_index(label, pipe) for label in classes for _ in range(options.images)]
    columns, rows = min(options.images, GRID_COLUMNS), min(len(classes), GRID_ROWS)
    grid = []
    with _as_user_errors(ValueError):
        for i, drawn in enumerate(_samples(pipe, labels, options)):
            options.output.mkdir(parents=True, exist_ok=True)
            image = to_pil(drawn)
            write_image(image, options.output / f"{i:05d}.png")
            if i // options.images < rows and i % options.images < columns:
                grid.append(image)
    write_image(make_image_grid(grid, rows, columns), options.output / "grid.png")
    print(f"{len(labels)} images and {options.output / 'grid.png'}, a row a class")


def _reconstruct(options: argparse.Namespace) -> None:
    from looc_ldm.files import write_image
    from looc_ldm.training.autoencoder import preview

    _check_file(options.output)
    model, images = _model_and_images(options)
    grid = preview(model, images, options.images)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_image(grid, options.output)
    bits, pixels = _rate(model, images)
    print(
        f"{options.output}: originals above, reconstructions below, {bits:.0f} bits an image, "
        f"{bits / pixels:.4g} bits per pixel"
    )


def _evaluate_reconstruction(options: argparse.Namespace) -> None:
    from torch.utils.data import Subset
    from tqdm.auto import tqdm

    from looc_ldm.metrics import evaluate_reconstruction
    from looc_ldm.training.autoencoder import float_batches
    from looc_ldm.training.data import spread

    _check_file(options.output)
    features = _features(options) if options.inception_weights else None
    model, images = _model_and_images(options)
    chosen = spread(len(images), options.images or len(images)).tolist()
    bar = tqdm(float_batches(Subset(images, chosen)), desc="reconstructing", unit="batch", delay=1)
    with _as_user_errors(ValueError):
        figures = evaluate_reconstruction(model, bar, images.content_size, features)
    _report(figures, options)


def _evaluate_generation(options: argparse.Namespace) -> None:
    from looc_ldm.metrics import fid_and_kid

    _check_file(options.output)
    features = _features(options)
    pipe = _load_pipeline(options)
    images = _images(options, pipe.vqvae)
    # From places at even distances in the reference: samples and reference then have the same share of each class.
    known = images.labels().tolist() if pipe.num_class_embeds and images.classes else [None]
    labels = [known[i * len(known) // options.images] for i in range(options.images)]
    with _as_user_errors(ValueError):
        figures = fid_and_kid(list(_samples(pipe, labels, options)), images.pixels(), features)
    bits, pixels = _rate(pipe.vqvae, images)
    figures |= {
        "bits_per_pixel": bits / pixels,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
    }
    _report(figures, options)


COMMANDS = {
    "quickstart": _quickstart,
    "cache-latents": _cache_latents,
    "sample": _sample,
    "reconstruct": _reconstruct,
    "evaluate reconstruction": _evaluate_reconstruction,
    "evaluate generation": _evaluate_generation,
}


# What commands share -------------------------------------------------------------------------------------------------


def _device(name: str | None):
    import torch

    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def _load_pipeline(options: argparse.Namespace):
    import torch
    from diffusers.utils import logging as diffusers_logging

    from looc_ldm.errors import ModelError
    from looc_ldm.pipelines.ldm import LooCLDMPipeline

    device, name = _device(options.device), options.model
    folder = Path(name)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ModelError(f"no pipeline in {name!r}: it holds no model_index.json.")
    if not folder.is_dir() and (folder.is_absolute() or name.count("/") != 1):
        raise ModelError(f"no pipeline {name!r}: neither a folder nor a hub id (user/name).")
    diffusers_logging.disable_progress_bar()  # of loading a handful of files
    try:
        pipe = LooCLDMPipeline.from_pretrained(name, dtype=getattr(torch, options.dtype), use_safetensors=True)
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError, KeyError) as error:
        raise ModelError(f"cannot load {name!r}: {' '.join(str(error).split())[:400]}") from error
    return pipe.to(device)


def _by_index(label: int | str | None, pipe) -> int | str | None:
    """A label as typed: an index, unless it is a name."""
    is_index = isinstance(label, str) and label.isdecimal() and label not in pipe.labels
    return int(label) if is_index else label


def _samples(pipe, labels: list, options: argparse.Namespace):
    """Images from a pipeline, one by one, as the options of `_add_sampling_options` say."""
    from looc_ldm.pipelines.sampling import sample_images

    return sample_images(
        pipe,
        labels,
        seed=options.seed,
        batch_size=options.batch_size,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
    )


def _images(options: argparse.Namespace, model):
    from looc_ldm.training.config import DataConfig
    from looc_ldm.training.data import load_image_set

    resolution = options.resolution or model.config.sample_size
    with _as_user_errors(ValueError):
        model.bits_per_image(resolution, resolution)  # refuses a side that the model cannot take
    config = DataConfig(path=options.data, split=options.split or "", resolution=resolution, fit=options.fit)
    return load_image_set(config, model.config.in_channels)


def _model_and_images(options: argparse.Namespace):
    import torch

    from looc_ldm.loading import load_autoencoder

    device = _device(options.device)
    model = load_autoencoder(options.model, getattr(torch, options.dtype)).to(device)
    return model, _images(options, model)


def _rate(model, images) -> tuple[float, int]:
    """Bits an image costs, and pixels it has; padding costs bits, but is nothing anybody wanted."""
    side = images.config.resolution
    return model.bits_per_image(side, side), math.prod(images.content_size or (side, side))


def _features(options: argparse.Namespace):
    from looc_ldm.metrics import InceptionFeatures

    with _as_user_errors(ValueError, FileNotFoundError):
        features = InceptionFeatures(options.feature_layer, options.inception_weights)
        try:
            features.check()
        except ConnectionError as error:
            raise UserError(f"--inception-weights: {error}") from error
        return features


@contextmanager
def _as_user_errors(*types: type[Exception]) -> Iterator[None]:
    """Errors of these types, raised by our own checks of input, are shown as one line."""
    try:
        yield
    except types as error:
        raise UserError(" ".join(str(error).split())) from error


def _check_file(file: Path | None) -> None:
    """Refuse, before any work, a file that cannot be written. None is no file."""
    if file is None:
        return
    if file.is_dir():
        raise UserError(f"cannot write {str(file)!r}: it is a folder.")
    check_folder(file.parent)


def _report(figures: dict, options: argparse.Namespace) -> None:
    """Print the figures, and write them with what is needed to repeat them."""
    for name, value in figures.items():
        print(f"{name:20} {value:.4f}" if isinstance(value, float) else f"{name:20} {value}")
    if options.output is not None:
        from looc_ldm.files import replace_text

        record = {**figures, "dtype": options.dtype, "command": options.command_line, "version": __version__}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(options.output, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
