"""`looc-ldm convert`: weights of other projects as our folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from diffusers.utils import logging as diffusers_logging

from looc_ldm.commands.options import Convert
from looc_ldm.convert import (
    Settings,
    convert_autoencoder,
    convert_ldm,
    kind_of,
    read_checkpoint,
    read_original_config,
    settings_of,
)
from looc_ldm.models.scaling import check_scaling
from looc_ldm.utils.errors import UserError
from looc_ldm.utils.files import check_folder, check_name, partial_of


def convert(options: Convert) -> None:
    """Write the converted model to a new folder, and print its main properties."""
    if options.output.exists() or options.output.is_symlink():
        raise UserError(f"--output {str(options.output)!r} exists already: give a new folder.")
    check_name(options.output)
    check_folder(options.output)
    tensors = read_checkpoint(options.checkpoint)
    kind = options.kind or kind_of(tensors)
    settings = Settings()
    if options.original_config is not None:
        settings = settings_of(read_original_config(options.original_config), kind)
    given = {item.name: getattr(options, item.name) for item in fields(Settings) if hasattr(options, item.name)}
    settings = settings.overridden_by(Settings(**given))
    write = _write_pipeline if kind == "ldm" else _write_autoencoder
    notes = write(tensors, kind, settings, options)
    print("\n".join([*notes, f"{kind}: {options.output}"]))


def _write_autoencoder(tensors: dict, kind: str, settings: Settings, options: Convert) -> list[str]:
    model, updates = convert_autoencoder(tensors, kind, settings, use_ema=not options.no_ema)
    notes = [*_notes_on_average(updates), *_notes_on_model(model)]
    with _new_folder(options.output) as folder:
        model.save_pretrained(folder)
    try:
        check_scaling(model)
    except ValueError as error:
        notes.append(f"For a diffusion model on it: {error}")
    return notes


def _write_pipeline(tensors: dict, kind: str, settings: Settings, options: Convert) -> list[str]:
    pipe, updates = convert_ldm(tensors, settings, use_ema=not options.no_ema)
    notes = [*_notes_on_average(updates), *_notes_on_model(pipe.vqvae), *_notes_on_model(pipe.unet)]
    if pipe.class_embedding is None:
        order = "head by head" if settings.qkv_by_head else "for all heads together"
        notes.append(f"Attention: query, key and value are taken {order} (use_new_attention_order).")
    elif pipe.config.null_class_label is None:
        notes.append("No null class: guidance is off. If a label stands for no class, give it as --null-class-label.")
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
            f"Further training uses, from the original config or code: anchor {config.anchor}, "
            f"codebook_update {config.codebook_update}, gradient {config.gradient}."
        )
    return notes


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder beside `folder`, which is renamed to it at the end."""
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
