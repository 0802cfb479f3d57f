"""`looc-ldm`: the command line. The outermost layer: it may use every part, and imports them inside its commands."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import shlex
import sys
from pathlib import Path

from looc_ldm import __version__
from looc_ldm.errors import UserError, one_line_errors

TRAINERS = ("autoencoder", "diffusion")
DATA_HELP = "bundled name, folder of images or parquet files, or hub id"
DTYPES = ("float32", "bfloat16", "float16")
REPORTED_PACKAGES = ("torch", "torchvision", "diffusers", "accelerate", "transformers", "datasets", "torch-fidelity")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    with one_line_errors():
        if arguments[:1] == ["train"] and arguments[1:2] and arguments[1] in TRAINERS:
            _train(arguments[1], arguments[2:])  # its flags come from the config's dataclasses
            return
        options = _make_parser().parse_args(arguments)
        options.command_line = shlex.join(["looc-ldm", *arguments])
        options.command(options)


class _Parser(argparse.ArgumentParser):
    """Ends at bad arguments as at any other bad input: in one line."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="looc-ldm", description="Latent diffusion for diffusers on a LooC first stage.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and devices, for bug reports")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    quickstart = commands.add_parser(
        "quickstart", help="the whole chain in miniature on bundled images, with a report to look at"
    )
    quickstart.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="folder of everything (default: quickstart)"
    )
    _add_feature_options(quickstart, without="FID is left out")
    quickstart.set_defaults(command=_quickstart)

    train = commands.add_parser("train", help="train an autoencoder (stage 1) or a diffusion model (stage 2)")
    train.add_argument("stage", choices=TRAINERS, help="`looc-ldm train STAGE --help` lists its settings and defaults")

    cache = commands.add_parser("cache-latents", help="encode a data set once, for stage 2")
    cache.add_argument("--config", required=True, help="diffusion config: name or file")
    cache.add_argument("--autoencoder", help="folder or hub id of the first stage (default: the config's)")
    cache.add_argument("--data", help="bundled name, folder or hub id (default: the config's)")
    cache.add_argument("--output", type=Path, help="folder (default: the config's `latents`, or latents in its output)")
    _add_device_option(cache)
    cache.set_defaults(command=_cache_latents)

    sample = commands.add_parser("sample", help="draw images, and a grid of them, from a trained model")
    sample.add_argument("model", metavar="MODEL", help="pipeline: folder or hub id")
    sample.add_argument("--labels", nargs="+", help="classes, by name or index (default: all)")
    sample.add_argument("--images", type=_positive, default=4, help="images of each class, or in all (default: 4)")
    _add_sampling_options(sample, batch_size=64)
    sample.add_argument("--output", type=Path, default=Path("samples"), help="folder of PNGs (default: samples)")
    sample.set_defaults(command=_sample)

    reconstruct = commands.add_parser("reconstruct", help="originals beside reconstructions")
    reconstruct.add_argument("model", metavar="MODEL", help="autoencoder or pipeline: folder or hub id")
    reconstruct.add_argument("data", metavar="IMAGES", help=DATA_HELP)
    _add_data_options(reconstruct)
    reconstruct.add_argument("--images", type=_positive, default=8, help="images in the grid (default: 8)")
    reconstruct.add_argument(
        "--output", type=Path, default=Path("reconstructions.png"), help="PNG file (default: reconstructions.png)"
    )
    _add_device_option(reconstruct)
    reconstruct.set_defaults(command=_reconstruct, dtype="float32")

    evaluate = commands.add_parser("evaluate", help="measure reconstructions or samples")
    kinds = evaluate.add_subparsers(title="what", metavar="WHAT", required=True)
    reconstruction = kinds.add_parser("reconstruction", help="PSNR, SSIM, L1, codebook use, bits per pixel, rFID")
    reconstruction.add_argument("model", metavar="MODEL", help="autoencoder or pipeline: folder or hub id")
    reconstruction.add_argument("--data", required=True, help=DATA_HELP)
    _add_data_options(reconstruction)
    reconstruction.add_argument("--images", type=_positive, help="measure only so many images (default: all)")
    _add_feature_options(reconstruction, without="rFID is left out")
    _add_device_option(reconstruction)
    _add_dtype_option(reconstruction)
    _add_result_option(reconstruction)
    reconstruction.set_defaults(command=_evaluate_reconstruction)

    generation = kinds.add_parser("generation", help="FID and KID of samples against real images")
    generation.add_argument("model", metavar="MODEL", help="pipeline: folder or hub id")
    generation.add_argument("--data", required=True, help=DATA_HELP)
    _add_data_options(generation)
    generation.add_argument("--images", type=_positive, default=10_000, help="samples to draw (default: 10000)")
    _add_sampling_options(generation, batch_size=100)
    _add_feature_options(generation, without="it is downloaded")
    _add_result_option(generation)
    generation.set_defaults(command=_evaluate_generation)
    return parser


def _add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: the best there is)")


def _add_dtype_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the networks (default: float32)")


def _add_sampling_options(parser: argparse.ArgumentParser, batch_size: int) -> None:
    parser.add_argument("--steps", type=_positive, default=50, help="denoising steps (default: 50)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="1 is no guidance (default: 1)")
    parser.add_argument(
        "--batch-size", type=_positive, default=batch_size, help="images drawn at a time (default: %(default)s)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="same seed, same images (default: 0)")
    _add_device_option(parser)
    _add_dtype_option(parser)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", help="which split (default: test, validation, or the first there is)")
    parser.add_argument(
        "--resolution", type=_positive, help="side of the images in pixels (default: what the model was trained at)"
    )
    parser.add_argument(
        "--fit", choices=("crop", "pad"), default="crop", help="how images become square (default: crop)"
    )


def _add_feature_options(parser: argparse.ArgumentParser, without: str) -> None:
    parser.add_argument(
        "--inception-weights",
        type=Path,
        help=f"file of torch-fidelity's Inception network (default: none; {without})",
    )
    parser.add_argument(
        "--feature-layer",
        choices=("64", "192", "768", "2048"),
        default="2048",
        help="Inception features; only 2048 compares with published FIDs (default: 2048)",
    )


def _add_result_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="JSON file for the figures (default: they are only printed)")


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number in [0, 2**32), got {text!r}")
    return int(text)


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
    from looc_ldm.training.latents import cache_latents

    overrides = {"autoencoder": options.autoencoder, "data__path": options.data, "latents": options.output}
    config = load_config(DiffusionConfig, options.config, **{k: v for k, v in overrides.items() if v is not None})
    if not config.autoencoder:
        raise UserError(f"the config {options.config!r} names no autoencoder: give --autoencoder.")
    folder = Path(config.latents or Path(config.output_dir) / "latents")
    _check_folder(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "description.json").is_file():
        raise UserError(f"{str(folder)!r} holds something else than cached latents: give another --output.")
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

    _check_folder(options.output)
    pipe = _load_pipeline(options)
    classes = options.labels or sorted(pipe.config.id2label or {}) or [None]
    labels = [_by_index(label, pipe) for label in classes for _ in range(options.images)]
    with _as_user_errors(ValueError):
        images = [to_pil(image) for image in _samples(pipe, labels, options)]
    options.output.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        write_image(image, options.output / f"{i:05d}.png")
    write_image(make_image_grid(images, len(classes), options.images), options.output / "grid.png")
    print(f"{len(images)} images and {options.output / 'grid.png'}, a row a class")


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
    batches = float_batches(Subset(images, chosen), batch_size=64)
    bar = tqdm(batches, total=math.ceil(len(chosen) / 64), desc="reconstructing", unit="batch", delay=1)
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

    with _as_user_errors(ValueError, FileNotFoundError, ConnectionError):
        features = InceptionFeatures(options.feature_layer, options.inception_weights)
        features.check()
        return features


class _as_user_errors:
    """Errors of these types, raised by our own checks of input, are shown as one line."""

    def __init__(self, *types: type[Exception]):
        self.types = types

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None and isinstance(error, self.types):
            raise UserError(" ".join(str(error).split())) from error


def _check_folder(folder: Path) -> None:
    """Refuse, before any work, a folder that cannot be made or written to. Makes nothing."""
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write to {str(folder)!r}: {str(nearest)!r} is not a folder.")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write to {str(folder)!r}: no permission.")


def _check_file(file: Path | None) -> None:
    """Refuse, before any work, a file that cannot be written. None is no file."""
    if file is None:
        return
    if file.is_dir():
        raise UserError(f"cannot write {str(file)!r}: it is a folder.")
    _check_folder(file.parent)


def _report(figures: dict, options: argparse.Namespace) -> None:
    """Print the figures, and write them with what is needed to repeat them."""
    for name, value in figures.items():
        print(f"{name:20} {value:.4f}" if isinstance(value, float) else f"{name:20} {value}")
    if options.output is not None:
        from looc_ldm.files import replace_text

        record = {**figures, "dtype": options.dtype, "command": options.command_line, "version": __version__}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(options.output, json.dumps(record, indent=2) + "\n")


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import PackageNotFoundError, version

        lines = [f"looc-ldm {__version__}", f"Python {platform.python_version()}, {platform.platform()}"]
        for package in REPORTED_PACKAGES:
            try:
                lines.append(f"{package} {version(package)}")
            except PackageNotFoundError:
                lines.append(f"{package} is not installed")
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        lines.append(gpu)
        print("\n".join(lines))
        parser.exit()


if __name__ == "__main__":
    main()
