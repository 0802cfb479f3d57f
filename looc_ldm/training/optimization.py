"""The optimizer, its schedule in images, and the precision."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator

from looc_ldm.quantizer.loocq import LooCQuantizer
from looc_ldm.training.config import OptimizerConfig


def learning_rate_at(optimizer: OptimizerConfig, images_seen: int, total_images: int) -> float:
    """Return the learning rate after `images_seen` images: linear warm-up, then constant or a cosine to 0."""
    warmup = min(1.0, (images_seen + 1) / optimizer.warmup_images) if optimizer.warmup_images else 1.0
    if optimizer.schedule == "constant":
        return optimizer.learning_rate * warmup
    length = max(1, total_images - optimizer.warmup_images)
    done = min(1.0, max(0, images_seen - optimizer.warmup_images) / length)
    return optimizer.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * done))


def adamw(model: torch.nn.Module, settings: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over all parameters that are trained by gradients."""
    # A codebook that is a moving average has no gradient: weight decay alone would move it under DDP.
    quantizers = [module for module in model.modules() if isinstance(module, LooCQuantizer)]
    averages = {quantizer.embedding.weight for quantizer in quantizers if quantizer.codebook_update == "ema"}
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in averages],
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,  # one kernel over all parameters, on CPUs as well
    )


def clip_gradients(accelerator: Accelerator, model: torch.nn.Module, max_norm: float) -> float:
    """Clip the norm of a model's gradients to `max_norm` (0: leave it), and return what it was. Waits for the device.

    Gradients are reduced by now, so all processes get the same norm.
    """
    return accelerator.clip_grad_norm_(list(model.parameters()), max_norm or math.inf).item()


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate, a function of the images seen: a scheduler's state could differ from them."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def resolve_precision(mixed_precision: str) -> str:
    """Return the precision: `auto` is bf16 on GPUs and CPUs that compute in it, elsewhere `no`."""
    if mixed_precision != "auto":
        return mixed_precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"  # CPUs with AMX, too
