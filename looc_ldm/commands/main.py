"""`looc-ldm`: the command line. A command's options and code are imported only when its name is known."""

from __future__ import annotations

import difflib
import logging
import os
import platform
import sys
from importlib import import_module

from looc_ldm import __version__
from looc_ldm.utils.errors import UserError, one_line_errors

# The class of the options in `commands.options`, the function in `commands`, and one line of help.
COMMANDS = {
    "quickstart": ("Quickstart", "quickstart:run", "run the whole chain in miniature"),
    "train photos": ("TrainPhotos", "train_photos:run", "from a folder of photographs to a model and a report"),
    "train autoencoder": ("AutoencoderConfig", "train:train", "train the first stage"),
    "train diffusion": ("DiffusionConfig", "train:train", "train the second stage"),
    "cache-latents": ("CacheLatents", "train:cache_latents", "encode a data set once, for stage 2"),
    "sample": ("Sample", "sample:sample", "draw images from a trained model"),
    "reconstruct": ("Reconstruct", "reconstruct:reconstruct", "show originals beside reconstructions"),
    "encode": ("Encode", "codes:encode", "encode images as packed codes or a table of codes"),
    "decode": ("Decode", "codes:decode", "decode packed codes to images"),
    "evaluate reconstruction": ("EvaluateReconstruction", "evaluate_reconstruction:evaluate", "measure an autoencoder"),
    "evaluate generation": (
        "EvaluateGeneration",
        "evaluate_generation:evaluate",
        "measure samples against real images",
    ),
    "analyze": ("Analyze", "analyze:analyze", "draw the paper's figures for a model"),
    "compare": ("Compare", "compare:compare", "measure several models on the same images"),
    "convert": ("Convert", "convert:convert", "convert weights of other projects"),
    "demo": ("Demo", "demo:demo", "serve a page to sample, vary, inpaint and tokenize"),
    "push": ("Push", "hub:push", "upload a model with its card to the hub"),
    "pull": ("Pull", "hub:pull", "download a model from the hub, and verify it"),
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with one_line_errors():
        shown = _help_or_version(arguments)
        if shown is not None:
            print(shown)
            sys.exit(0)
        name, options = parse_command(arguments)
        module, _, function = COMMANDS[name][1].partition(":")
        if threads := getattr(options, "threads", None):
            os.environ["OMP_NUM_THREADS"] = str(threads)  # torch, which is imported next, reads it
        run = getattr(import_module(f"looc_ldm.commands.{module}"), function)
        if not name.startswith(("train", "quickstart")):  # training has its own log
            logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        run(options)


def parse_command(arguments: list[str]):
    """Return the name of a command and its options.

    Raises:
        UserError: There is no such command, or its options are wrong.
        SystemExit: After `--help`.
    """
    words = 2 if arguments and arguments[0] in _groups() else 1
    name = " ".join(arguments[:words])
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        known = f"did you mean {close[0]!r}?" if close else f"give a COMMAND: {', '.join(COMMANDS)}."
        raise UserError(f"no command {name!r}; {known}")
    options_class = getattr(import_module("looc_ldm.commands.options"), COMMANDS[name][0])
    if name in ("train autoencoder", "train diffusion"):
        from looc_ldm.training.config_parsing import parse_command_line as parse
    else:
        from looc_ldm.utils.arguments import parse_options as parse
    return name, parse(options_class, arguments[words:], f"looc-ldm {name}")


def _groups() -> set[str]:
    return {name.split()[0] for name in COMMANDS if " " in name}


def _help_or_version(arguments: list[str]) -> str | None:
    """Return the output of `--version`, or of `--help` before a whole command; None for other arguments."""
    if arguments[:1] == ["--version"]:
        return _versions()
    group = arguments[0] if arguments and arguments[0] in _groups() else ""
    if arguments[1 if group else 0 :][:1] not in (["-h"], ["--help"]):
        return None
    lines = [f"  {name:25}{entry[2]}" for name, entry in COMMANDS.items() if name.startswith(group)]
    usage = f"usage: looc-ldm [--help] [--version] {group or 'COMMAND'} ..."
    note = "looc-ldm COMMAND --help lists the options of a command."
    return "\n".join([usage, "", "Latent diffusion for diffusers on a LooC first stage.", "", *lines, "", note])


def _versions() -> str:
    """Return versions and devices, for bug reports."""
    import torch

    from looc_ldm.commands.record import versions

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    packages = [f"{name} {number}" for name, number in versions().items()]
    return "\n".join([f"looc-ldm {__version__}", platform.platform(), *packages, gpu])


if __name__ == "__main__":
    main()
