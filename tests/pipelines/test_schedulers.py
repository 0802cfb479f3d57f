"""Every scheduler draws from the distribution that the UNet knows, and one for another kind of model is refused.

The UNet here is the exact denoiser of latents that are normal with a known mean and deviation: then every sampler must
end there.
"""

import logging
import re
from itertools import product

import diffusers
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDDIMScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    RePaintScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import KarrasDiffusionSchedulers

from looc_ldm import LooCLDMImg2ImgPipeline, LooCLDMInpaintPipeline, LooCLDMPipeline
from looc_ldm.pipelines.schedulers import NOT_MIDWAY, WITHOUT_SAMPLE

MEAN, DEVIATION = 0.4, 0.6
NAMES = [kind.name for kind in KarrasDiffusionSchedulers if kind.name != "EDMEulerScheduler"]
OTHERS = ["DDIMParallelScheduler", "DDPMParallelScheduler", "SASolverScheduler"]
SETTINGS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "timestep_spacing": "trailing"}
IMAGES = 32
MIDWAY = [name for name in NAMES if name not in {kind.__name__ for kind in NOT_MIDWAY}]


class GaussianUNet(UNet2DModel):
    """Predicts, exactly, for latents x0 that are independently normal: E[. | x_t]."""

    prediction_type = "epsilon"

    @staticmethod
    def levels(timestep):
        """Shares of signal and noise at a timestep, which may lie between two whole ones."""
        products = DDIMScheduler(**SETTINGS).alphas_cumprod.double()
        levels = ((1 - products) / products).log() / 2  # log of sigma / alpha at whole timesteps
        low = timestep.double().floor().long().clamp(0, 999)
        share = timestep.double() - low
        ratio = torch.lerp(levels[low], levels[(low + 1).clamp(max=999)], share).exp()
        alpha = (1 + ratio**2).rsqrt()
        return alpha, ratio * alpha

    def forward(self, sample, timestep, return_dict=True):
        if self.prediction_type == "flow_prediction":
            sigma = timestep.double() / 1000
            alpha = 1 - sigma
        else:
            alpha, sigma = self.levels(timestep)
        x = sample.double()
        variance = (alpha * DEVIATION) ** 2 + sigma**2
        noise = sigma * (x - alpha * MEAN) / variance
        clean = MEAN + alpha * DEVIATION**2 * (x - alpha * MEAN) / variance
        prediction = {
            "epsilon": noise,
            "sample": clean,
            "v_prediction": alpha * noise - sigma * clean,
            "flow_prediction": noise - clean,
        }[self.prediction_type]
        return (prediction.to(sample.dtype),)


def scheduler_from(name: str, prediction_type: str = "epsilon"):
    trained = DDIMScheduler(clip_sample=False, prediction_type=prediction_type, **SETTINGS)
    return getattr(diffusers, name).from_config(trained.config)


def with_prediction_type(name: str) -> tuple[diffusers.SchedulerMixin, str]:
    """A scheduler, and what the UNet for it predicts."""
    if name.startswith("FlowMatch"):
        return FlowMatchEulerDiscreteScheduler(), "flow_prediction"
    return scheduler_from(name), "epsilon"


@pytest.fixture
def gaussian_pipeline(make_pipeline):
    def make(scheduler, prediction_type: str = "epsilon") -> LooCLDMPipeline:
        tiny = make_pipeline("unconditional")
        unet = GaussianUNet(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8,), norm_num_groups=4,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )  # fmt: skip
        unet.prediction_type = prediction_type
        pipe = LooCLDMPipeline(tiny.vqvae, unet, scheduler)
        return pipe

    return make


def generators(count: int = IMAGES) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def latents_of(pipe, steps: int = 50, count: int = IMAGES, **arguments) -> torch.Tensor:
    arguments = {"generator": generators(count), **arguments}
    return pipe(batch_size=count, num_inference_steps=steps, output_type="latent", **arguments).images


@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [
        *product([*NAMES, *OTHERS], ["epsilon"]),
        *product(["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"], ["v_prediction", "sample"]),
    ],
)
def test_every_scheduler_draws_from_the_distribution_the_unet_knows(name, prediction_type, gaussian_pipeline):
    # First-order samplers come close with many steps only; torchsde's noise is slow to draw.
    steps, count, tolerance = (25, 8, 0.12) if name == "DPMSolverSDEScheduler" else (200, IMAGES, 0.05)
    latents = latents_of(gaussian_pipeline(scheduler_from(name, prediction_type), prediction_type), steps, count)
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert latents.std().item() == pytest.approx(DEVIATION, rel=tolerance)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
    ids=["Euler", "Euler-shift", "DPM++", "UniPC"],
)
def test_a_flow_matching_model_draws_from_its_distribution(scheduler, gaussian_pipeline):
    latents = latents_of(gaussian_pipeline(scheduler, "flow_prediction"), steps=100)
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert latents.std().item() == pytest.approx(DEVIATION, rel=0.05)


def test_lcm_takes_the_steps_it_is_told_to(gaussian_pipeline):
    pipe = gaussian_pipeline(scheduler_from("LCMScheduler"))
    latents = latents_of(pipe, steps=4)  # the mean is right; its deviation takes a distilled model
    assert pipe.num_timesteps == 4
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.03)
    with pytest.raises(ValueError, match="51"):
        latents_of(pipe, steps=51)


@pytest.mark.parametrize("name", [*NAMES, "LCMScheduler"])
def test_with_a_generator_an_image_a_batch_and_a_call_before_change_nothing(name, gaussian_pipeline):
    pipe = gaussian_pipeline(scheduler_from(name))
    steps = 4
    batch = latents_of(pipe, steps, count=3)
    alone = latents_of(pipe, steps, count=1, generator=generators(3)[2:])
    torch.testing.assert_close(alone[0], batch[2], atol=1e-4, rtol=0)
    assert not torch.allclose(batch[0], batch[1], atol=0.1)
    assert torch.equal(latents_of(pipe, steps, count=3), batch)
    one = latents_of(pipe, steps, count=2, generator=torch.Generator().manual_seed(5))
    assert torch.equal(latents_of(pipe, steps, count=2, generator=torch.Generator().manual_seed(5)), one)


@pytest.mark.parametrize("name", [*NAMES, "FlowMatchEulerDiscreteScheduler"])
def test_in_half_precision_every_scheduler_draws_the_images_of_float32_but_for_rounding(name, gaussian_pipeline):
    pipe = gaussian_pipeline(*with_prediction_type(name))
    wide = latents_of(pipe, steps=6, count=2)
    pipe.to(torch.bfloat16)
    half = latents_of(pipe, steps=6, count=2)
    assert half.dtype == torch.float32
    assert (half.float() - wide).abs().mean() < 0.02
    assert pipe(num_inference_steps=4, output_type="pt").images.dtype == torch.float32


# From an image --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MIDWAY, "FlowMatchEulerDiscreteScheduler"])
def test_started_midway_from_its_distribution_every_scheduler_ends_there(name, gaussian_pipeline):
    scheduler, prediction_type = with_prediction_type(name)
    if name == "PNDMScheduler":
        scheduler = diffusers.PNDMScheduler.from_config(scheduler.config, skip_prk_steps=True)
    pipe = LooCLDMImg2ImgPipeline.from_pipe(gaussian_pipeline(scheduler, prediction_type))
    noise = torch.randn(2, IMAGES, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.prepare_image_latents = lambda pixels, count: MEAN + DEVIATION * noise[0]
    end = pipe(
        torch.zeros(IMAGES, 3, 16, 16),
        strength=0.3,
        num_inference_steps=60,
        latents=noise[1],
        generator=generators(),
        output_type="latent",
    ).images
    assert end.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert end.std().item() == pytest.approx(DEVIATION, rel=0.12)


@pytest.mark.parametrize("name", [*MIDWAY, "LCMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_while_inpainting_the_unet_sees_the_known_part_with_the_noise_of_each_timestep(name, gaussian_pipeline):
    flow = name.startswith("FlowMatch")
    pipe = LooCLDMInpaintPipeline.from_pipe(gaussian_pipeline(*with_prediction_type(name)))
    pipe.prepare_image_latents = lambda pixels, count: torch.zeros(count, 4, 8, 8)  # the rest of it is noise
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    ratios = []

    def look(unet, arguments):
        sample, timestep = arguments
        sigma = timestep.double() / 1000 if flow else unet.levels(timestep)[1]
        ratios.append((sample[..., 4:].std() / noise[..., 4:].std() / sigma).item())

    pipe.unet.register_forward_pre_hook(look)
    pipe(torch.zeros(1, 3, 16, 16), mask, num_inference_steps=8, latents=noise, generator=generators(1), eta=0.0)
    assert len(ratios) >= 8
    assert ratios[1:] == pytest.approx([1] * (len(ratios) - 1), abs=0.02)


# Schedulers that do not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (EDMEulerScheduler(), "for another kind of model"),
        (CMStochasticIterativeScheduler(), "for another kind of model"),
        (CMStochasticIterativeScheduler.from_config(DDIMScheduler().config), "for another kind of model"),
        (DDIMInverseScheduler.from_config(DDIMScheduler().config), "for another kind of model"),
        (DPMSolverMultistepInverseScheduler.from_config(DDIMScheduler().config), "for another kind of model"),
        (CogVideoXDDIMScheduler.from_config(DDIMScheduler().config), "for another kind of model"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=True"),
        (RePaintScheduler(), "for another kind of model"),
        (FlowMatchEulerDiscreteScheduler.from_config(DDIMScheduler().config), '"epsilon".*"flow_prediction"'),
        (DDIMScheduler(prediction_type="v_prediction"), '"epsilon".*"v_prediction"'),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas=True"),
        (UNet2DModel(block_out_channels=(32,) * 4), "must be a diffusers scheduler, got UNet2DModel"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_scheduler_of_a_wrong_kind_is_refused_before_the_unet_runs(scheduler, reason, gaussian_pipeline):
    pipe = gaussian_pipeline(DDIMScheduler(clip_sample=False))
    ran = []
    pipe.unet.register_forward_pre_hook(lambda *_: ran.append(1))
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=reason):
        pipe()
    assert ran == []


@pytest.mark.parametrize("kind", WITHOUT_SAMPLE)
def test_a_scheduler_that_cannot_take_a_prediction_of_the_sample_is_refused(kind, gaussian_pipeline):
    pipe = gaussian_pipeline(scheduler_from(kind.__name__, "sample"), "sample")
    with pytest.raises(ValueError, match=f'{kind.__name__} does not support UNets that predict "sample"'):
        latents_of(pipe)


def test_what_the_unet_predicts_is_saved_with_the_pipeline(make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe = LooCLDMPipeline(pipe.vqvae, pipe.unet, DDIMScheduler(prediction_type="v_prediction", clip_sample=False))
    assert pipe.config.prediction_type == "v_prediction"
    pipe.save_pretrained(tmp_path)
    assert pipe.config.noise_schedule["beta_end"] == 0.02
    loaded = LooCLDMPipeline.from_pretrained(tmp_path, scheduler=EulerDiscreteScheduler())
    assert loaded.config.noise_schedule == pipe.config.noise_schedule
    with pytest.raises(ValueError, match='"v_prediction", but EulerDiscreteScheduler takes its output for "epsilon"'):
        loaded(class_labels=0)


@pytest.mark.parametrize(
    ("scheduler", "warning"),
    [
        (DDIMScheduler(**SETTINGS, clip_sample=True), "clip_sample=True"),
        (
            LCMScheduler(beta_end=0.012),
            "different noise schedule from the one the UNet came with, beta_start=0.00085, beta_end=0.012.* "
            r"give from_config also beta_start=0\.0015, beta_end=0\.0195\.",
        ),
    ],
    ids=["clipping", "betas"],
)
def test_a_scheduler_that_spoils_the_images_is_warned_of(scheduler, warning, gaussian_pipeline, caplog):
    pipe = gaussian_pipeline(DDIMScheduler(clip_sample=False, **SETTINGS))
    with caplog.at_level(logging.WARNING):
        latents_of(pipe, steps=2, count=1)
    assert "clip_sample" not in caplog.text
    assert "noise schedule" not in caplog.text
    pipe.scheduler = scheduler
    with caplog.at_level(logging.WARNING):
        latents_of(pipe, steps=2, count=1)
    assert re.search(warning, caplog.text)
