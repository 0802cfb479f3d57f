"""`looc-ldm convert`: weights of other projects as our folders. Heavy packages are imported inside the functions."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from looc_ldm.arguments import positive
from looc_ldm.commands.shared import as_user_errors
from looc_ldm.errors import UserError
from looc_ldm.files import check_folder, check_name, partial_of

KINDS = ("looc", "cvq", "vqgan", "ldm")
# Flags that not every kind uses.
KINDS_OF_FLAGS = {
    "no_ema": ("vqgan", "ldm"),
    "interpolation_factor": ("looc", "vqgan", "ldm"),
    "num_heads": ("ldm",),
    "num_head_channels": ("ldm",),
    "prediction_type": ("ldm",),
    "scaling_factor": ("ldm",),
    "null_class_label": ("ldm",),
}


def add_parsers(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="weights of the authors' LooC, CVQ-VAE, taming's VQGAN and CompVis LDM into ours",
        description="Weights of the authors' LooC and CVQ-VAE (small VQ-VAE), of taming's VQGAN and of CompVis LDM as "
        "a folder of ours. What neither weights nor the original config show is asked for, never guessed.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="file: .safetensors, .ckpt, .pt or .pth")
    parser.add_argument(
        "--output", type=Path, required=True, help="new folder: an autoencoder, or for ldm a whole pipeline"
    )
    parser.add_argument("--kind", choices=KINDS, help="what it is (default: found out from the keys)")
    parser.add_argument(
        "--original-config", type=Path, metavar="YAML", help="file it was trained with; the flags below win over it"
    )
    parser.add_argument("--resolution", type=positive, help="side of the images in pixels")
    parser.add_argument(
        "--no-ema", action="store_true", help="take the live weights (default: the averaged ones, where there are any)"
    )
    quantizer = parser.add_argument_group("a quantizer of LooC or CVQ-VAE")
    quantizer.add_argument("--distance", choices=("cosine", "euclidean"), help="by which it chooses codes (cos, l2)")
    quantizer.add_argument(
        "--interpolation-factor", type=positive, help="s, their shuffle_scale; 1 is off. Not asked for with CVQ-VAE"
    )
    diffusion = parser.add_argument_group("a diffusion model (ldm)")
    heads = diffusion.add_mutually_exclusive_group()
    heads.add_argument("--num-heads", type=positive, help="attention heads of the UNet, the same at all resolutions")
    heads.add_argument("--num-head-channels", type=positive, help="channels of each of them, at all resolutions")
    diffusion.add_argument(
        "--prediction-type", choices=("epsilon", "sample", "v_prediction"), help="what the UNet predicts (eps, x0, v)"
    )
    diffusion.add_argument(
        "--scaling-factor", type=_factor, help="what latents are multiplied by; not asked for where the weights hold it"
    )
    diffusion.add_argument(
        "--null-class-label", type=_label, help="label that stands for no class, which guidance needs (default: none)"
    )
    parser.set_defaults(command=_convert)


def _convert(options: argparse.Namespace) -> None:
    if options.output.exists() or options.output.is_symlink():
        raise UserError(f"--output {str(options.output)!r} exists already: give a new folder.")
    check_name(options.output)
    check_folder(options.output)

    from looc_ldm.convert import Settings, kind_of, read_checkpoint, read_original_config, settings_of

    tensors = read_checkpoint(options.checkpoint)
    kind = options.kind or kind_of(tensors)
    _check_flags(options, kind, tensors)
    settings = Settings()
    if options.original_config is not None:
        settings = settings_of(read_original_config(options.original_config), kind)
    settings = settings.overridden_by(
        Settings(
            resolution=options.resolution,
            distance=options.distance,
            interpolation_factor=options.interpolation_factor,
            num_heads=options.num_heads,
            num_head_channels=options.num_head_channels,
            prediction_type=options.prediction_type,
            scaling_factor=options.scaling_factor,
            null_class_label=options.null_class_label,
        )
    )
    with as_user_errors(ValueError):  # of settings that do not fit the weights
        if kind == "ldm":
            notes = _convert_pipeline(tensors, settings, options)
        else:
            notes = _convert_autoencoder(tensors, kind, settings, options)
    print("\n".join([*notes, f"{kind}: {options.output}"]))


def _check_flags(options: argparse.Namespace, kind: str, tensors: dict) -> None:
    """Refuse flags that would change nothing."""
    for name, kinds in KINDS_OF_FLAGS.items():
        if getattr(options, name) not in (None, False) and kind not in kinds:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} goes with {' and '.join(kinds)} only, and this is of the kind {kind}.")
    quantizer = "_vq_vae" if kind in ("looc", "cvq") else "quantize"
    kept = {key.rpartition(".")[2] for key in tensors if f"{quantizer}." in key}
    if kept and "embed_prob" not in kept:
        for name in ("distance", "interpolation_factor"):
            if getattr(options, name) is not None:
                raise UserError(
                    f"--{name.replace('_', '-')} goes with quantizers of LooC and CVQ-VAE only: this one keeps no use "
                    "of its codevectors (embed_prob), as theirs do, and has euclidean distance and no interpolation."
                )
    if "scale_factor" in tensors and options.scaling_factor is not None:
        raise UserError("--scaling-factor: the weights hold it already (scale_factor).")


def _convert_autoencoder(tensors: dict, kind: str, settings, options: argparse.Namespace) -> list[str]:
    from looc_ldm.convert import convert_autoencoder
    from looc_ldm.scaling import check_scaling

    model, updates = convert_autoencoder(tensors, kind, settings, use_ema=not options.no_ema)
    notes = [*_notes_on_average(updates), *_notes_on_model(model)]
    with _new_folder(options.output) as folder:
        model.save_pretrained(folder)
    try:
        check_scaling(model)
    except ValueError as error:
        notes.append(f"For a diffusion model on it: {error}")
    return notes


def _convert_pipeline(tensors: dict, settings, options: argparse.Namespace) -> list[str]:
    from diffusers.utils import logging as diffusers_logging

    from looc_ldm.convert import convert_ldm
    from looc_ldm.pipelines.ldm import LooCLDMPipeline

    parts = convert_ldm(tensors, settings, use_ema=not options.no_ema)
    notes = [*_notes_on_average(parts.ema_updates), *_notes_on_model(parts.vqvae), *_notes_on_model(parts.unet)]
    if parts.class_embedding is None:
        order = "head by head" if settings.qkv_by_head else "for all heads together"
        notes.append(f"Attention: query, key and value are taken {order} (use_new_attention_order).")
    elif parts.null_class_label is None:
        notes.append("No null class: guidance is off. If a label stands for no class, give it as --null-class-label.")
    pipe = LooCLDMPipeline(
        parts.vqvae, parts.unet, parts.scheduler, parts.class_embedding, null_class_label=parts.null_class_label
    )
    diffusers_logging.disable_progress_bar()
    with _new_folder(options.output) as folder:
        pipe.save_pretrained(folder)
    return notes


def _notes_on_average(updates: int | None) -> list[str]:
    if updates is None:
        return ["Weights: the live ones."]
    return [f"Weights: their moving average{'' if updates < 0 else f', of {updates:,} steps'}."]


def _notes_on_model(model) -> list[str]:
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    notes = [f"{type(model).__name__}: {parameters:.2f}M parameters."]
    if hasattr(model, "quantize"):
        config, side = model.config, model.config.sample_size
        notes.append(
            f"Codebook: {config.num_vq_embeddings} x {config.codevector_dim}, {config.distance} distance, "
            f"interpolation factor {config.interpolation_factor}: "
            f"{model.bits_per_image(side, side) / side**2:.3f} bits per pixel."
        )
        notes.append(
            f"Of further training only, from the original config or their code: anchor {config.anchor}, "
            f"codebook_update {config.codebook_update}, gradient {config.gradient}."
        )
    return notes


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, renamed to it at the end."""
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, folder)
    except OSError as error:
        raise UserError(f"cannot write {str(folder)!r}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def _label(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a label, a whole number from 0 on, got {text!r}")
    return int(text)
