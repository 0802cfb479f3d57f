"""Check that a scheduler fits a model. diffusers lets any be assigned, and a wrong one draws garbage."""

from __future__ import annotations

import logging

import diffusers
import torch
from diffusers import (
    DPMSolverSDEScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
)
from diffusers.schedulers import KarrasDiffusionSchedulers

logger = logging.getLogger(__name__)

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
# A UNet has learned to denoise at the noise levels of these settings.
NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)

# Others go by the same settings, also when made with `from_config`, and mean something else by them.
FITTING = tuple(
    getattr(diffusers, name)
    for name in (
        *(kind.name for kind in KarrasDiffusionSchedulers if not kind.name.startswith("EDM")),
        "DDIMParallelScheduler",
        "DDPMParallelScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "LCMScheduler",
        "SASolverScheduler",
        "TCDScheduler",
    )
)
# These do not fit UNets that predict the clean latents, and say so only when the UNet has run.
WITHOUT_SAMPLE = (
    PNDMScheduler,
    EulerAncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    DPMSolverSDEScheduler,
)
# Started midway, they would need noise between two levels, or the outputs of steps that were not taken.
NOT_MIDWAY = (KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler, DPMSolverSDEScheduler, LMSDiscreteScheduler)


def prediction_type_of(scheduler: SchedulerMixin) -> str:
    """Return the kind of UNet output that a scheduler expects, one of `PREDICTION_TYPES`.

    Raises:
        ValueError: The scheduler is for a different kind of model.
    """
    name = type(scheduler).__name__
    if not isinstance(scheduler, SchedulerMixin):
        raise ValueError(f"the scheduler must be a diffusers scheduler, got {name}.")
    if not isinstance(scheduler, FITTING):
        raise ValueError(
            f"{name} is for another kind of model; these fit: {', '.join(sorted(kind.__name__ for kind in FITTING))}."
        )
    config = scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        for setting in ("invert_sigmas", "use_dynamic_shifting"):
            if config.get(setting):
                raise ValueError(f"{name} has {setting}=True, which is for other models; make it without.")
        return "flow_prediction"
    flow = (config.prediction_type == "flow_prediction", bool(config.get("use_flow_sigmas")))
    if flow[0] != flow[1]:
        raise ValueError(
            f'{name} has prediction_type="{config.prediction_type}" with use_flow_sigmas={flow[1]}; for models trained '
            'by flow matching give prediction_type="flow_prediction" and use_flow_sigmas=True, for others neither.'
        )
    return config.prediction_type


def check_scheduler(scheduler: SchedulerMixin, prediction_type: str, noise_schedule: dict) -> None:
    """Refuse a scheduler for UNets that predict something else; warn about one that spoils the images.

    Args:
        prediction_type (`str`): The target that the UNet was trained to predict.
        noise_schedule (`dict`): `noise_schedule_of` the scheduler that came with the UNet.

    Raises:
        ValueError: The scheduler takes the UNet's output for something else.
    """
    name = type(scheduler).__name__
    taken_for = prediction_type_of(scheduler)
    if taken_for != prediction_type:
        raise ValueError(
            f'the UNet was trained to predict "{prediction_type}", but {name} takes its output for "{taken_for}".'
        )
    if prediction_type == "sample" and isinstance(scheduler, WITHOUT_SAMPLE):
        raise ValueError(f'{name} does not support UNets that predict "sample"; DDIM, DPMSolver and UniPC do.')
    if scheduler.config.get("clip_sample"):
        logger.warning("%s has clip_sample=True, which cuts latents, that are no pixels, off at 1.", name)
    changed = {k: v for k, v in noise_schedule_of(scheduler).items() if v != noise_schedule.get(k, v)}
    if changed:
        # Also after `from_config`: diffusers leaves out what was a default of the old class, and takes the new class's.
        logger.warning(
            "%s has a different noise schedule from the one the UNet came with, %s; give from_config also %s.",
            name,
            ", ".join(f"{k}={v!r}" for k, v in changed.items()),
            ", ".join(f"{k}={noise_schedule[k]!r}" for k in changed),
        )


def noise_schedule_of(scheduler: SchedulerMixin) -> dict:
    """Return the settings of a scheduler that say how noisy its training timesteps are."""
    return {name: scheduler.config[name] for name in NOISE_SCHEDULE if name in scheduler.config}


def seed_scheduler(
    scheduler: SchedulerMixin, generator: torch.Generator | list[torch.Generator] | None, count: int
) -> None:
    """Seed DPMSolverSDEScheduler, which takes no generator, from the generators of the images."""
    if not isinstance(scheduler, DPMSolverSDEScheduler):
        return
    if generator is None and isinstance(scheduler.noise_sampler_seed, int):
        return  # seeded by its owner; what a call has left is a list
    generators = generator if isinstance(generator, list) else [generator] * count
    draws = (torch.randint(2**62, (), generator=g, device="cpu" if g is None else g.device) for g in generators)
    scheduler.noise_sampler_seed = [int(seed) for seed in draws]
    scheduler.noise_sampler = None  # from an earlier call
