"""Objectives of stage 2: noisy latents, the UNet's target, and the weight of its errors.

Given the noisy latents, every target determines the clean latents x0, the noise and the velocity; the targets differ in
the weight of errors at each noise level. Randomness comes from outside: noise and a uniform number for each example.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from looc_ldm.pipelines.schedulers import (
    PREDICTION_TYPES,
    check_scheduler,
    noise_schedule_of,
    prediction_type_of,
)
from looc_ldm.training.config import DiffusionConfig
from looc_ldm.utils.errors import ConfigError


class Example(NamedTuple):
    """Input and target of the UNet for one batch.

    Attributes:
        noisy (`torch.Tensor` of shape `(B, c, h, w)`): The UNet's input.
        timesteps (`torch.Tensor` of shape `(B,)`): Its timesteps: int64 in [0, T), or for flow matching float32 in
            (0, T].
        target (`torch.Tensor` of shape `(B, c, h, w)`): The values to predict.
        weight (`torch.Tensor` of shape `(B,)`, *optional*): Weight of the loss of each example; 1 if None.
    """

    noisy: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None


class Objective:
    """Base of all objectives. `Objective.from_config` makes one.

    Attributes:
        prediction_type (`str`): The UNet's target, one of `pipelines.schedulers.PREDICTION_TYPES`.
        num_timesteps (`int`): T, the scheduler's `num_train_timesteps`.
    """

    def __init__(self, config: DiffusionConfig, prediction_type: str, num_timesteps: int):
        self.prediction_type = prediction_type
        self.num_timesteps = num_timesteps
        self._logit_normal = config.timestep_sampling == "logit_normal"
        self._distance = F.mse_loss if config.loss == "l2" else F.l1_loss

    @staticmethod
    def from_config(config: DiffusionConfig, scheduler: SchedulerMixin) -> Objective:
        """Return the objective of a config, for UNets that `scheduler` is to sample from.

        Raises:
            ConfigError: The scheduler is not one to train for, or the settings do not fit each other or it.
        """
        try:
            prediction_type = prediction_type_of(scheduler)
            check_scheduler(scheduler, prediction_type, noise_schedule_of(scheduler))
        except ValueError as error:
            raise ConfigError(f"scheduler: {error}") from None
        if prediction_type not in PREDICTION_TYPES:
            raise ConfigError(
                f"scheduler.prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}."
            )
        if config.loss_weighting == "min_snr" and config.loss == "l1":
            raise ConfigError("loss_weighting=min_snr is for squared errors: it needs loss=l2.")
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return FlowMatching(config, scheduler)
        if prediction_type == "flow_prediction":
            raise ConfigError(
                f"scheduler.type={type(scheduler).__name__} only samples from flow matching models. To train one, "
                "give FlowMatchEulerDiscreteScheduler."
            )
        return Diffusion(config, scheduler, prediction_type)

    def example(self, latents: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> Example:
        """Return noisy latents and the target.

        Args:
            latents (`torch.Tensor` of shape `(B, c, h, w)`): Scaled latents, float32.
            noise (`torch.Tensor` of the same shape): Noise of unit variance.
            time (`torch.Tensor` of shape `(B,)`): Uniform numbers in [0, 1), which decide the timesteps.
        """
        raise NotImplementedError

    def loss(self, prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Return the weighted mean error of predictions `(B, c, h, w)`, a float32 scalar."""
        errors = self._distance(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)  # (B,)
        return (errors if weight is None else errors * weight).mean()

    def _timestep_fraction(self, time: torch.Tensor) -> torch.Tensor:
        """Turn uniform numbers in [0, 1) into fractions of T, in [0, 1), distributed as the config says."""
        # The inverse of the distribution function, so that one uniform number is enough.
        return torch.special.ndtri(time).sigmoid() if self._logit_normal else time


class Diffusion(Objective):
    """The noise (Ho et al. 2020), the velocity (Salimans & Ho 2022) or the clean latents, on a discrete schedule.

    With a the product of the alphas of a timestep: noisy = sqrt(a) x0 + sqrt(1 - a) noise. Timesteps are
    floor(T * fraction).
    """

    def __init__(self, config: DiffusionConfig, scheduler: SchedulerMixin, prediction_type: str):
        super().__init__(config, prediction_type, scheduler.config.num_train_timesteps)
        self.min_snr_gamma = config.min_snr_gamma if config.loss_weighting == "min_snr" else None
        # By name: `from_config` would replace the defaults of a different scheduler by the defaults of DDPM.
        self.noise_schedule = DDPMScheduler(**noise_schedule_of(scheduler))
        given = len(self.noise_schedule.alphas_cumprod)
        if given != self.num_timesteps:
            raise ConfigError(
                f"scheduler.trained_betas has {given} values, but needs one per timestep: "
                f"num_train_timesteps={self.num_timesteps}."
            )
        if scheduler.config.get("rescale_betas_zero_snr"):
            _check_zero_terminal_snr(scheduler, prediction_type)

    def example(self, latents: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> Example:
        timesteps = (self._timestep_fraction(time) * self.num_timesteps).long()
        noisy = self.noise_schedule.add_noise(latents, noise, timesteps)
        if self.prediction_type == "epsilon":
            target = noise
        elif self.prediction_type == "v_prediction":
            target = self.noise_schedule.get_velocity(latents, noise, timesteps)
        else:
            target = latents
        weight = None
        if self.min_snr_gamma is not None:
            kept = self.noise_schedule.alphas_cumprod[timesteps]  # on the device since add_noise
            weight = min_snr_weight(kept / (1 - kept), self.min_snr_gamma, self.prediction_type)
        return Example(noisy, timesteps, target, weight)


class FlowMatching(Objective):
    """The velocity noise - x0 of straight paths (Lipman et al. 2023; rectified flow), as diffusers samples it.

    noisy = (1 - sigma) x0 + sigma * noise, and the UNet is given sigma * T as the timestep. Sigma is 1 - fraction, in
    (0, 1], moved towards 1 by the scheduler's `shift` s: s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, equation
    23).
    """

    def __init__(self, config: DiffusionConfig, scheduler: FlowMatchEulerDiscreteScheduler):
        if config.loss_weighting == "min_snr":
            raise ConfigError(
                "loss_weighting=min_snr is not for flow matching, whose errors weigh by timestep_sampling; "
                "use loss_weighting=uniform."
            )
        super().__init__(config, "flow_prediction", scheduler.config.num_train_timesteps)
        self.shift = scheduler.config.shift

    def example(self, latents: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> Example:
        sigma = 1 - self._timestep_fraction(time)
        sigma = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
        return Example(noisy, sigma * self.num_timesteps, noise - latents, None)


def min_snr_weight(snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Return the weight of a squared error that gives the error of x0 the weight min(SNR, gamma).

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy". A squared error of the noise is SNR
    times that of x0, one of the velocity SNR + 1 times.

    Args:
        snr (`torch.Tensor`): Signal-to-noise ratios, in [0, inf].
        gamma (`float`): Above 0.
        prediction_type (`str`): `"epsilon"`, `"v_prediction"` or `"sample"`.

    Returns:
        `torch.Tensor` in the shape of `snr`: finite, also at its ends.
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return snr.clamp(max=gamma)


def _check_zero_terminal_snr(scheduler: SchedulerMixin, prediction_type: str) -> None:
    """Refuse settings that cannot work with zero terminal SNR (Lin et al. 2024, arXiv:2305.08891)."""
    if prediction_type == "epsilon":
        raise ConfigError(
            "scheduler.rescale_betas_zero_snr=true needs scheduler.prediction_type=v_prediction or sample: the last "
            "timestep is pure noise, and knowing that noise says nothing about the image."
        )
    if scheduler.config.get("timestep_spacing") != "trailing":
        raise ConfigError(
            "scheduler.rescale_betas_zero_snr=true needs scheduler.timestep_spacing=trailing: sampling starts with "
            "pure noise, which in training was the last timestep alone, and other spacings leave it out."
        )
