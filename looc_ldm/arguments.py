"""Commands and options of `looc-ldm`: what can be typed, with units and defaults."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from looc_ldm import __version__
from looc_ldm.errors import UserError

TRAINERS = ("autoencoder", "diffusion")
DATA_HELP = "bundled name, folder of images, parquet files, WebDataset shards or LSUN's LMDBs, or hub id"
FITS = ("crop", "random_crop", "adm", "pad")
# Of looc_ldm.commands; each has `add_parsers(commands)`.
COMMAND_MODULES = ("analyze", "codes", "compare", "convert", "evaluate", "hub", "latents")
PROTOCOLS = ("clean", "paper")  # of looc_ldm.metrics.protocols, which is not imported for its names alone
DTYPES = ("float32", "bfloat16", "float16")
REPORTED_PACKAGES = ("torch", "torchvision", "diffusers", "accelerate", "transformers", "datasets", "torch-fidelity")


class Parser(argparse.ArgumentParser):
    """Ends at bad arguments as at any other bad input: in one line."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def make_parser(commands_by_name: dict[str, Callable[[argparse.Namespace], None]]) -> argparse.ArgumentParser:
    """The parser of all commands but `train STAGE`, whose flags come from the config's dataclasses.

    Args:
        commands_by_name: What each command calls with its options, by the words of the command.
    """
    parser = Parser(prog="looc-ldm", description="Latent diffusion for diffusers on a LooC first stage.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and devices, for bug reports")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    quickstart = commands.add_parser(
        "quickstart", help="the whole chain in miniature on bundled images, with a report to look at"
    )
    quickstart.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="folder of everything (default: quickstart)"
    )
    add_feature_options(quickstart, without="FID is left out")
    quickstart.set_defaults(command=commands_by_name["quickstart"])

    train = commands.add_parser("train", help="train an autoencoder (stage 1) or a diffusion model (stage 2)")
    train.add_argument("stage", choices=TRAINERS, help="`looc-ldm train STAGE --help` lists its settings and defaults")

    sample = commands.add_parser("sample", help="draw images, and a grid of them, from a trained model")
    sample.add_argument(
        "model", metavar="MODEL", help="pipeline: folder, hub id, or starter, which comes with the package"
    )
    sample.add_argument("--labels", nargs="+", help="classes, by name or index (default: all)")
    sample.add_argument(
        "--images", type=positive, default=4, help="images of each class, or of a model without classes (default: 4)"
    )
    sample.set_defaults(**add_sampling_options(sample, batch_size=64))
    add_device_option(sample)
    add_dtype_option(sample)
    sample.add_argument(
        "--output",
        type=Path,
        default=Path("samples"),
        help="folder of PNGs, a sub-folder a class; the grid is the .png of its name (default: samples)",
    )
    sample.set_defaults(command=commands_by_name["sample"])

    reconstruct = commands.add_parser("reconstruct", help="originals beside reconstructions")
    reconstruct.add_argument("model", metavar="MODEL", help="autoencoder or pipeline: folder, hub id or starter")
    reconstruct.add_argument("data", metavar="IMAGES", help=DATA_HELP)
    add_data_options(reconstruct)
    reconstruct.add_argument("--images", type=positive, default=8, help="images in the grid (default: 8)")
    reconstruct.add_argument(
        "--output", type=Path, default=Path("reconstructions.png"), help="PNG file (default: reconstructions.png)"
    )
    add_device_option(reconstruct)
    reconstruct.set_defaults(command=commands_by_name["reconstruct"], dtype="float32")

    for name in COMMAND_MODULES:
        import_module(f"looc_ldm.commands.{name}").add_parsers(commands)
    return parser


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Of `cache-latents`, which is also a module that a launcher starts on several processes."""
    parser.add_argument("--config", required=True, help="diffusion config: name or file")
    parser.add_argument("--autoencoder", help="folder or hub id of the first stage, or starter (default: the config's)")
    parser.add_argument("--data", help=f"{DATA_HELP} (default: the config's)")
    parser.add_argument(
        "--output", type=Path, help="folder (default: the config's `latents`, or latents in its output_dir)"
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        help="images a process encodes at a time (default: by device and resolution)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the encoder; latents are stored as float16 (default: float32, or what a complete cache has)",
    )
    add_device_option(parser)


def add_device_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: the best there is)")


def add_dtype_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the networks (default: float32)")


def add_sampling_options(parser: argparse._ActionsContainer, batch_size: int) -> dict[str, int | float]:
    """Of drawing images; returns the defaults, for commands that must know whether an option was given."""
    parser.add_argument("--steps", type=positive, help="denoising steps (default: 50)")
    parser.add_argument("--guidance-scale", type=float, help="1 is no guidance (default: 1)")
    parser.add_argument("--batch-size", type=positive, help=f"images drawn at a time (default: {batch_size})")
    parser.add_argument("--seed", type=seed_number, help="same seed, same images (default: 0)")
    return {"steps": 50, "guidance_scale": 1.0, "batch_size": batch_size, "seed": 0}


def add_data_options(parser: argparse._ActionsContainer, model: str = "the model") -> None:
    parser.add_argument("--split", help="which split (default: test, validation, or the first there is)")
    parser.add_argument(
        "--resolution", type=positive, help=f"side of the images in pixels (default: what {model} was trained at)"
    )
    parser.add_argument(
        "--fit",
        choices=FITS,
        help="how images become square; random_crop is crop here, adm the centre crop that most published FIDs are "
        f"measured with (default: as in {model}'s training, as far as its folder says, else crop)",
    )


def add_feature_options(parser: argparse._ActionsContainer, without: str) -> None:
    parser.add_argument(
        "--inception-weights",
        type=Path,
        metavar="FILE",
        help=f"file of torch-fidelity's Inception network (default: none; {without})",
    )
    parser.add_argument(
        "--feature-layer",
        choices=("64", "192", "768", "2048"),
        default="2048",
        help="Inception features; only 2048 compares with published FIDs (default: 2048)",
    )


def add_protocol_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="clean",
        help="clean: floats, the usual SSIM and FID; paper: as in the LooC paper's tables, of JPEGs, SSIM with a "
        "uniform window, FID after a resize to 229 (default: clean)",
    )


def add_result_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--output", type=Path, help="JSON file for the figures (default: they are only printed)")


def positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return value


def seed_number(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number in [0, 2**32), got {text!r}")
    return int(text)


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
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
