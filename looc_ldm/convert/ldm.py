"""Convert LDM's `LatentDiffusion`: the parts of a pipeline from one checkpoint.

Key names are from CompVis/latent-diffusion (ldm/models/diffusion/ddpm.py, ldm/modules/encoders/modules.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import DDIMScheduler

from looc_ldm.convert.autoencoders import check_vqgan, convert_vqgan
from looc_ldm.convert.checkpoint import Tensors, load_renamed, numbered, shape_of, under, with_ema, without_ema
from looc_ldm.convert.settings import Settings, require
from looc_ldm.convert.unet import context_of, convert_unet
from looc_ldm.models.class_embedding import ClassEmbedding
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.utils.errors import ModelError

UNET, FIRST_STAGE, CLASSES = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."

# Used, then ignored: buffers that follow from the noise schedule, weights of the loss, the state of the average.
KNOWN = (
    *("betas", "scale_factor", UNET, FIRST_STAGE, CLASSES),
    *("alphas_cumprod", "sqrt_", "log_one_minus_alphas_cumprod", "posterior_", "lvlb_weights", "logvar"),
    *("model_ema.decay", "model_ema.num_updates"),
)


def convert_ldm(tensors: Tensors, settings: Settings, use_ema: bool = True) -> tuple[LooCLDMPipeline, int | None]:
    """Convert LDM's `LatentDiffusion` with a VQ first stage, unconditional or with classes by cross-attention.

    Args:
        tensors: Keys start with `model.diffusion_model.`, `first_stage_model.`, ...
        settings (`Settings`): Needs heads, `prediction_type`, `resolution` or `latent_size`, and `scaling_factor` and
            `betas` unless the checkpoint has them.
        use_ema (`bool`): Take the averaged weights of the UNet, if there are any.

    Returns:
        The pipeline, and the number of updates of the UNet's averaged weights: -1 if unknown, None for live weights.

    Raises:
        ModelError: The model is of a different kind, or weights are missing, unexpected or mis-shaped.
        ConfigError: Settings are missing that the weights do not show.
    """
    tensors, updates = with_ema(tensors, module="model.") if use_ema else (without_ema(tensors), None)
    surplus = [key for key in tensors if not key.startswith(KNOWN)]
    if surplus:
        raise ModelError(f"not a checkpoint of LatentDiffusion: unexpected {surplus[0]} and {len(surplus) - 1} more.")
    # LDM trains on the live weights of its first stage, even if that has averaged ones.
    unet_tensors, first_stage = under(tensors, UNET), without_ema(under(tensors, FIRST_STAGE))
    check_vqgan(first_stage)
    ins, outs = shape_of(unet_tensors, "input_blocks.0.0.weight")[1], shape_of(unet_tensors, "out.2.weight")[0]
    if ins != outs:
        raise ModelError(
            f"a UNet of {ins} input and {outs} output channels is conditioned on images: only unconditional and "
            "class-conditional models are converted."
        )
    class_embedding = _class_embedding(under(tensors, CLASSES), context_of(unet_tensors))

    scaling_factor = settings.scaling_factor
    if "scale_factor" in tensors:
        shape_of(tensors, "scale_factor", 0)
        scaling_factor = tensors["scale_factor"].item()
    if "betas" in tensors:
        shape_of(tensors, "betas", 1)
    elif settings.betas is None:
        raise ModelError("the checkpoint does not keep its noise schedule (betas): give --original-config FILE.")
    factor = 2 ** (numbered(first_stage, "encoder.down") - 1)
    latent_size = settings.latent_size or (settings.resolution and settings.resolution // factor)
    quantizer = {"distance": settings.distance, "interpolation_factor": settings.interpolation_factor}
    require(
        heads=settings.num_heads or settings.num_head_channels,
        resolution=latent_size,
        prediction_type=settings.prediction_type,
        scaling_factor=scaling_factor,
        **(quantizer if "quantize.embed_prob" in first_stage else {}),
    )
    labels = 0 if class_embedding is None else class_embedding.config.num_class_embeds
    null = settings.null_class_label
    if null is not None and not 0 <= null < labels:
        raise ModelError(f"--null-class-label {null} is not one of the {labels} labels of the model.")

    vqvae_settings = replace(settings, resolution=latent_size * factor)
    vqvae = convert_vqgan(first_stage, vqvae_settings, scaling_factor)
    unet = convert_unet(unet_tensors, settings, latent_size)
    scheduler = _scheduler(tensors.get("betas"), settings)
    return LooCLDMPipeline(vqvae, unet, scheduler, class_embedding, null_class_label=null), updates


def _class_embedding(tensors: Tensors, context: int | None) -> ClassEmbedding | None:
    """Convert LDM's `ClassEmbedder`; refuse other conditions."""
    if not tensors and context is None:
        return None
    if list(tensors) != ["embedding.weight"] or context is None:
        found = next(iter(tensors), "nothing")
        raise ModelError(
            "only unconditional models and those with classes through cross-attention are converted: the UNet has "
            f"{'no ' if context is None else ''}cross-attention, and {CLASSES} holds {found}."
        )
    count, channels = shape_of(tensors, "embedding.weight", 2)
    if channels != context:
        raise ModelError(f"class tokens of {channels} channels do not fit cross-attention on {context}.")
    with torch.device("meta"):
        model = ClassEmbedding(num_class_embeds=count, embedding_dim=channels)
    load_renamed(model, tensors, ())
    return model


def _scheduler(betas: torch.Tensor | None, settings: Settings) -> DDIMScheduler:
    """Return LDM's sampler for the noise schedule: DDIM with an offset of 1 and no clipping."""
    if betas is not None:
        noise = _schedule_of(betas)
    else:
        name, first, last, steps = settings.betas
        # LDM's "linear" is linear in the square root (ldm/modules/diffusionmodules/util.py).
        names = {"linear": "scaled_linear", "sqrt_linear": "linear"}
        if name not in names:
            raise ModelError(f"--original-config: beta_schedule must be one of {', '.join(names)}, got {name!r}.")
        noise = {"num_train_timesteps": steps, "beta_schedule": names[name], "beta_start": first, "beta_end": last}
    return DDIMScheduler(
        **noise, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=settings.prediction_type
    )


def _schedule_of(betas: torch.Tensor) -> dict[str, object]:
    """Return the noise schedule of a checkpoint: first and last beta if they determine all, otherwise all betas."""
    first, last = (float(f"{value:.6g}") for value in (betas[0].item(), betas[-1].item()))  # float32 has no more digits
    for name in ("scaled_linear", "linear"):
        schedule = DDIMScheduler(len(betas), first, last, name)
        if torch.allclose(schedule.betas, betas.float(), rtol=1e-5, atol=0):
            return {"num_train_timesteps": len(betas), "beta_schedule": name, "beta_start": first, "beta_end": last}
    return {"num_train_timesteps": len(betas), "trained_betas": betas.tolist()}
