"""`looc-ldm convert`: convert weights of other projects to our folders."""

from __future__ import annotations

from dataclasses import fields

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
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.scaling import check_scaling
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.utils.errors import UserError
from looc_ldm.utils.files import check_folder, folder_when_complete


def convert(options: Convert) -> None:
    """Write the converted model to a new folder, and print its main properties."""
    if options.output.exists() or options.output.is_symlink():
        raise UserError(f"--output {str(options.output)!r} exists already: give a new folder.")
    check_folder(options.output)
    tensors = read_checkpoint(options.checkpoint)
    kind = options.kind or kind_of(tensors)
    settings = Settings()
    if options.original_config is not None:
        settings = settings_of(read_original_config(options.original_config), kind)
    given = {item.name: getattr(options, item.name) for item in fields(Settings) if hasattr(options, item.name)}
    settings = settings.overridden_by(Settings(**given))
    if kind == "ldm":
        model, updates = convert_ldm(tensors, settings, use_ema=not options.no_ema)
    else:
        model, updates = convert_autoencoder(tensors, kind, settings, use_ema=not options.no_ema)
    live = "the live ones" if updates is None else f"their moving average{f', of {updates:,} steps' * (updates >= 0)}"
    notes = _notes_on_pipeline(model, settings) if kind == "ldm" else _notes_on_autoencoder(model)
    diffusers_logging.disable_progress_bar()
    with folder_when_complete(options.output) as folder:
        model.save_pretrained(folder)
    print("\n".join([f"Weights: {live}.", *notes, f"{kind}: {options.output}"]))


def _notes_on_pipeline(pipe: LooCLDMPipeline, settings: Settings) -> list[str]:
    notes = [*_notes_on_model(pipe.vqvae), *_notes_on_model(pipe.unet)]
    if pipe.class_embedding is None:
        order = "head by head" if settings.qkv_by_head else "for all heads together"
        notes.append(f"Attention: query, key and value are taken {order} (use_new_attention_order).")
    elif pipe.config.null_class_label is None:
        notes.append("No null class: guidance is off. If a label stands for no class, give it as --null-class-label.")
    return notes


def _notes_on_autoencoder(model: LooCVQModel) -> list[str]:
    try:
        check_scaling(model)
    except ValueError as error:
        return [*_notes_on_model(model), f"For a diffusion model on it: {error}"]
    return _notes_on_model(model)


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
