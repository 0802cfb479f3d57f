"""The targets of the UNet, against closed forms: a perfect model has no loss, weights count errors of x0 alike, and
flow matching regresses to the exact velocity field."""

from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
)

from looc_ldm.pipelines.schedulers import PREDICTION_TYPES
from looc_ldm.training.config import DiffusionConfig
from looc_ldm.training.objectives import Objective, min_snr_weight
from looc_ldm.utils.errors import ConfigError

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
ENDS = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-24])  # uniform numbers: the first and the last timestep
MEAN, DEVIATION = 2.0, 0.5


def diffusion(prediction_type: str, **arguments) -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, prediction_type=prediction_type, **BETAS, **arguments)


def scheduler_for(prediction_type: str):
    return (
        FlowMatchEulerDiscreteScheduler(shift=3.0)
        if prediction_type == PREDICTION_TYPES[3]
        else diffusion(prediction_type)
    )


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, count, 3, 8, 8, generator=generator)
    return latents, noise


# Targets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_target_gives_the_latents_and_the_noise_back_and_predicting_it_costs_nothing(
    prediction_type, sampling, loss
):
    config = DiffusionConfig(timestep_sampling=sampling, loss=loss)
    scheduler = scheduler_for(prediction_type)
    objective = Objective.from_config(config, scheduler)
    assert objective.prediction_type == prediction_type
    latents, noise = batch()
    noisy, timesteps, target, weight = objective.example(latents, noise, ENDS)
    assert noisy.dtype == target.dtype == torch.float32
    assert timesteps.shape == (4,)
    if prediction_type == "flow_prediction":
        signal = (1 - timesteps / 1000).view(-1, 1, 1, 1)
        amount = 1 - signal
        torch.testing.assert_close(noisy - amount * target, latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(noisy + signal * target, noise, rtol=0, atol=1e-5)
    else:
        assert timesteps.min() >= 0
        assert timesteps.max() <= 999
        kept = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        signal, amount = kept.sqrt(), (1 - kept).sqrt()
        clean = {
            "epsilon": lambda: (noisy - amount * target) / signal,
            "v_prediction": lambda: signal * noisy - amount * target,
            "sample": lambda: target,
        }[prediction_type]()
        torch.testing.assert_close(clean, latents, rtol=0, atol=1e-4)
        torch.testing.assert_close(signal * latents + amount * noise, noisy)
    assert objective.loss(target, target, weight).item() == 0
    off = {"l1": 0.5, "l2": 0.25}[loss]  # everywhere wrong by 0.5
    assert objective.loss(target + 0.5, target, weight).item() == pytest.approx(off, rel=1e-5)


def test_the_loss_is_float32_and_weighs_examples_one_by_one():
    objective = Objective.from_config(DiffusionConfig(), diffusion("epsilon"))
    target = torch.zeros(2, 3, 8, 8)
    prediction = torch.stack([torch.full((3, 8, 8), 1.0), torch.full((3, 8, 8), 2.0)]).bfloat16()
    loss = objective.loss(prediction, target, torch.tensor([3.0, 0.5]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((3 * 1 + 0.5 * 4) / 2)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusion("epsilon"),
        EulerDiscreteScheduler(**BETAS),
        DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=200),
        DDIMScheduler(clip_sample=False, trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3),
        TCDScheduler(),  # whose defaults are not DDPM's, and which `DDPMScheduler.from_config` would lose
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_noise_schedule_is_the_one_of_the_saved_scheduler(scheduler):
    objective = Objective.from_config(DiffusionConfig(), scheduler)
    latents, noise = batch(1)
    noisy, timesteps, _, _ = objective.example(latents, noise, torch.tensor([1 - 2**-24]))
    assert int(timesteps) == scheduler.config.num_train_timesteps - 1
    kept = scheduler.alphas_cumprod[-1]
    torch.testing.assert_close(noisy, kept.sqrt() * latents + (1 - kept).sqrt() * noise)


# Timesteps ------------------------------------------------------------------------------------------------------------


def shares(sampling: str, scheduler, count: int = 100_000) -> torch.Tensor:
    """Timesteps as shares of all, of uniform numbers at even distances."""
    objective = Objective.from_config(DiffusionConfig(timestep_sampling=sampling), scheduler)
    time = (torch.arange(count) + 0.5) / count
    zeros = torch.zeros(count, 1, 1, 1)
    timesteps = objective.example(zeros, zeros, time)[1]
    return timesteps.double() / scheduler.config.num_train_timesteps


def test_uniform_timesteps_meet_each_timestep_alike():
    counts = torch.bincount((shares("uniform", diffusion("epsilon")) * 1000).round().long(), minlength=1000)
    assert counts.min() >= 99
    assert counts.max() <= 101


@pytest.mark.parametrize("scheduler", [diffusion("epsilon"), FlowMatchEulerDiscreteScheduler()])
def test_logit_normal_timesteps_have_a_standard_normal_logit(scheduler):
    logits = torch.logit(shares("logit_normal", scheduler) + (0.0005 if scheduler.config.get("beta_start") else 0))
    assert logits.mean().item() == pytest.approx(0, abs=0.01)
    assert logits.std().item() == pytest.approx(1, abs=0.01)
    assert (logits.abs() < 1.96).double().mean().item() == pytest.approx(0.95, abs=2e-3)


def test_the_uniform_number_0_is_a_timestep_also_where_its_logit_is_infinite():
    latents, noise = batch(1)
    for scheduler in (diffusion("v_prediction"), FlowMatchEulerDiscreteScheduler()):
        objective = Objective.from_config(DiffusionConfig(timestep_sampling="logit_normal"), scheduler)
        noisy, timesteps, _, _ = objective.example(latents, noise, torch.zeros(1))
        assert noisy.isfinite().all()
        assert float(timesteps) in (0.0, 1000.0)


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES[:3])
def test_min_snr_counts_an_error_of_x0_by_the_smaller_of_snr_and_gamma(prediction_type):
    scheduler = diffusion(prediction_type)
    objective = Objective.from_config(DiffusionConfig(loss_weighting="min_snr", min_snr_gamma=5.0), scheduler)
    latents, noise = batch(1)
    error = 0.01 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    for share in torch.linspace(0, 0.9995, 20):
        noisy, timesteps, target, weight = objective.example(latents, noise, share.view(1))
        kept = scheduler.alphas_cumprod[timesteps].double().view(1, 1, 1, 1)
        # The prediction that stands for x0 + error, given the noisy latents.
        prediction = {
            "epsilon": (noisy - kept.sqrt() * (latents + error)) / (1 - kept).sqrt(),
            "v_prediction": (kept.sqrt() * noisy - (latents + error)) / (1 - kept).sqrt(),
            "sample": latents + error,
        }[prediction_type]
        snr = (kept / (1 - kept)).item()
        expected = min(snr, 5.0) * error.square().mean().item()
        assert objective.loss(prediction, target, weight).item() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES[:3])
def test_min_snr_weights_are_finite_without_noise_and_without_signal(prediction_type):
    weight = min_snr_weight(torch.tensor([0.0, 1e-30, 5.0, 1e30, torch.inf]), 5.0, prediction_type)
    ends = {"epsilon": (1, 0), "v_prediction": (0, 0), "sample": (0, 5)}[prediction_type]
    assert weight.isfinite().all()
    assert (weight[0].item(), weight[-1].item()) == ends
    if prediction_type == "epsilon":
        return
    scheduler = diffusion(prediction_type, **ZERO_SNR)
    objective = Objective.from_config(DiffusionConfig(loss_weighting="min_snr"), scheduler)
    latents, noise = batch()
    example = objective.example(latents, noise, ENDS)
    assert all(part.isfinite().all() for part in example)
    assert objective.loss(example.target + 1, example.target, example.weight).isfinite()


# Zero terminal SNR ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_with_zero_terminal_snr_the_last_timestep_is_noise_alone_and_sampling_starts_there(kind, prediction_type):
    clip = {"clip_sample": False} if kind in (DDIMScheduler, DDPMScheduler) else {}
    scheduler = kind(prediction_type=prediction_type, **BETAS, **ZERO_SNR, **clip)
    objective = Objective.from_config(DiffusionConfig(), scheduler)
    latents, noise = batch(1)
    noisy, timesteps, target, _ = objective.example(latents, noise, torch.tensor([0.9999]))
    torch.testing.assert_close(noisy, noise, rtol=0, atol=1e-6)
    torch.testing.assert_close(target, -latents if prediction_type == "v_prediction" else latents, rtol=0, atol=1e-6)
    scheduler.set_timesteps(10)
    assert int(scheduler.timesteps[0]) == int(timesteps) == 999


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "settings", "message"),
    [
        (diffusion("epsilon", **ZERO_SNR), {}, "prediction_type=v_prediction or sample: the last timestep is pure"),
        (diffusion("sample", rescale_betas_zero_snr=True), {}, "needs scheduler.timestep_spacing=trailing"),
        (FlowMatchEulerDiscreteScheduler(), {"loss_weighting": "min_snr"}, "min_snr is not for flow matching"),
        (diffusion("epsilon"), {"loss_weighting": "min_snr", "loss": "l1"}, "it needs loss=l2"),
        (PNDMScheduler(prediction_type="sample"), {}, "does not support UNets that predict"),
        (
            DDIMScheduler(trained_betas=[0.1, 0.2]),
            {},
            "trained_betas has 2 values, but needs one per timestep: num_train_timesteps=1000",
        ),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {}, "use_dynamic_shifting=True"),
        (diffusion("nonsense"), {}, "one of epsilon, .* got 'nonsense'"),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            {},
            "To train one, give FlowMatchEulerDiscreteScheduler",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(scheduler, settings, message):
    config = replace(DiffusionConfig(), **settings)
    with pytest.raises(ConfigError, match=message) as caught:
        Objective.from_config(config, scheduler)
    assert "\n" not in str(caught.value)


# Flow matching --------------------------------------------------------------------------------------------------------


def gaussian_velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[noise - x0 | (1 - sigma) x0 + sigma noise = x] for x0 of N(MEAN, DEVIATION^2), by Gaussian regression."""
    variance = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
    slope = (sigma - (1 - sigma) * DEVIATION**2) / variance
    return slope * (x - (1 - sigma) * MEAN) - MEAN


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_what_flow_matching_regresses_to_at_a_timestep_is_the_velocity_there(shift):
    """The timestep that the UNet is told, the sign and the scale of the target, in one closed form."""
    objective = Objective.from_config(DiffusionConfig(), FlowMatchEulerDiscreteScheduler(shift=shift))
    generator = torch.Generator().manual_seed(0)
    latents = MEAN + DEVIATION * torch.randn(400_000, 1, 1, 1, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    for share in (0.2, 0.6, 0.9):
        noisy, timesteps, target, _ = objective.example(latents, noise, torch.full((len(latents),), share))
        raw = 1 - share
        sigma = timesteps[0].double() / 1000
        assert sigma.item() == pytest.approx(shift * raw / (1 + (shift - 1) * raw), rel=1e-5)
        x, y = noisy.double().flatten(), target.double().flatten()
        slope = torch.cov(torch.stack([x, y]))[0, 1] / x.var()
        places = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
        fitted = y.mean() + slope * (places - x.mean())
        torch.testing.assert_close(fitted, gaussian_velocity(places, sigma), rtol=0, atol=0.03)
