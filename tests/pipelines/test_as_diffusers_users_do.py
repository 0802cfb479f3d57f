"""Usual uses of any pipeline of diffusers: other first stages, callbacks, compiling, attention, offloading."""

import json
import shutil

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DDIMScheduler, LDMPipeline, VQModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from looc_ldm import LooCLDMImg2ImgPipeline, LooCLDMPipeline, LooCVQModel
from looc_ldm.models.scaling import unscale_latents


def draw(pipe, steps: int = 3, seed: int = 0, **arguments) -> torch.Tensor:
    arguments = {"generator": torch.Generator().manual_seed(seed), "output_type": "pt", **arguments}
    return pipe(num_inference_steps=steps, **arguments).images


# First stages ---------------------------------------------------------------------------------------------------------


def plain_vqmodel(**changes) -> VQModel:
    torch.manual_seed(0)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=16,
        sample_size=16,
        **changes,
    ).eval()


def test_a_plain_vqmodel_is_a_first_stage_too(make_pipeline, tmp_path):
    tiny = make_pipeline("unconditional")
    vqvae = plain_vqmodel(scaling_factor=0.5)
    pipe = LooCLDMPipeline(vqvae, tiny.unet, tiny.scheduler)
    images = draw(pipe)
    latents = draw(pipe, output_type="latent")
    with torch.no_grad():
        decoded = vqvae.decode(latents / 0.5).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))
    pipe.save_pretrained(tmp_path)
    loaded = LooCLDMPipeline.from_pretrained(tmp_path)
    assert type(loaded.vqvae) is VQModel
    torch.testing.assert_close(draw(loaded), images)
    again = LooCLDMImg2ImgPipeline.from_pipe(loaded)
    assert draw(again, image=images).shape == images.shape


def test_the_default_scaling_factor_of_vqmodel_is_refused_wherever_it_comes_from(make_pipeline, tmp_path):
    tiny = make_pipeline("unconditional")
    pipe = LooCLDMPipeline(plain_vqmodel(), tiny.unet, tiny.scheduler)
    LDMPipeline(plain_vqmodel(), tiny.unet, tiny.scheduler).save_pretrained(tmp_path / "theirs")
    pipe.save_pretrained(tmp_path / "ours")
    without = tmp_path / "without"
    shutil.copytree(tmp_path / "theirs", without)
    config = json.loads((without / "vqvae" / "config.json").read_text())
    del config["scaling_factor"]  # diffusers wrote none when the class was new
    (without / "vqvae" / "config.json").write_text(json.dumps(config))
    for one in (pipe, *map(LooCLDMPipeline.from_pretrained, (tmp_path / "theirs", tmp_path / "ours", without))):
        for call in (lambda one=one: draw(one), lambda one=one: one.decode_latents(torch.randn(1, 4, 8, 8))):
            with pytest.raises(
                ValueError, match=r"0\.18215.*measure_scaling_factor.*register_to_config\(scaling_factor="
            ):
                call()
        one.vqvae.register_to_config(scaling_factor=0.5)
        given = LooCLDMPipeline(plain_vqmodel(scaling_factor=0.5), tiny.unet, tiny.scheduler)
        torch.testing.assert_close(draw(one), draw(given), atol=1e-4, rtol=0)


def test_diffusers_ldm_pipeline_draws_the_same_images_with_our_first_stage(make_pipeline, tmp_path):
    pipe = make_pipeline("unconditional")
    images = draw(pipe, batch_size=2, seed=3, output_type="np")
    theirs = LDMPipeline(vqvae=pipe.vqvae, unet=pipe.unet, scheduler=DDIMScheduler(clip_sample=False))
    theirs.save_pretrained(tmp_path)
    loaded = LDMPipeline.from_pretrained(tmp_path)
    assert type(loaded.vqvae) is LooCVQModel
    loaded.vqvae.enable_slicing()
    for one in (theirs, loaded):
        expected = draw(one, batch_size=2, seed=3, output_type="np")
        assert abs(images - expected).max() < 1e-5


def test_a_mean_and_a_deviation_a_channel_are_applied_to_the_latents(make_pipeline):
    pipe = make_pipeline("unconditional")
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 1.5]
    pipe.vqvae.register_to_config(scaling_factor=1.0, latents_mean=mean, latents_std=std)
    latents = draw(pipe, output_type="latent")
    with torch.no_grad():
        decoded = pipe.vqvae.decode(unscale_latents(pipe.vqvae, latents)).sample
    torch.testing.assert_close(draw(pipe), (decoded / 2 + 0.5).clamp(0, 1))


# Callbacks ------------------------------------------------------------------------------------------------------------


class Halve(PipelineCallback):
    """Halves the latents after a step, and records it."""

    tensor_inputs = ["latents", "model_output"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        assert set(callback_kwargs) == {"latents", "model_output"}
        self.steps = [*getattr(self, "steps", []), step_index]
        return {**callback_kwargs, "latents": callback_kwargs["latents"] / 2}


def test_callbacks_of_diffusers_say_themselves_which_tensors_they_take(make_pipeline):
    pipe = make_pipeline("unconditional")
    one = Halve()
    halved = draw(pipe, callback_on_step_end=one, output_type="latent")
    assert one.steps == [0, 1, 2]
    twice = draw(pipe, callback_on_step_end=MultiPipelineCallbacks([Halve(), Halve()]), output_type="latent")
    assert twice.abs().mean() < halved.abs().mean()


def test_a_callback_may_switch_guidance_off(make_pipeline):
    pipe = make_pipeline()
    batches = []
    pipe.unet.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))

    def off(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0

    draw(pipe, class_labels=0, guidance_scale=3.0, callback_on_step_end=off)
    assert batches == [2, 1, 1]


# Speed and memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_unet_draws_and_saves_the_same_images(in_place, make_pipeline, tmp_path):
    pipe = make_pipeline("cross_attention")
    images = draw(pipe, class_labels=[0, 1], guidance_scale=2.0)
    if in_place:
        pipe.unet.compile(backend="aot_eager", fullgraph=True)
    else:
        pipe.unet = torch.compile(pipe.unet, backend="aot_eager", fullgraph=True)
    pipe.save_pretrained(tmp_path)
    made = [pipe, LooCLDMPipeline.from_pipe(pipe), LooCLDMPipeline.from_pretrained(tmp_path, unet=pipe.unet)]
    for one in (*made, LooCLDMPipeline.from_pretrained(tmp_path)):
        torch.testing.assert_close(draw(one, class_labels=[0, 1], guidance_scale=2.0), images, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["unconditional", "cross_attention"])
def test_offloading_hooks_run_before_each_model_in_the_order_that_the_pipeline_says(kind, make_pipeline):
    pipe = make_pipeline(kind)
    called = []

    class Record(ModelHook):
        def __init__(self, name):
            self.name = name

        def pre_forward(self, module, *args, **kwargs):
            called.append(self.name)
            return args, kwargs

    for name, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            add_hook_to_module(model, Record(name))
    draw(pipe, steps=1)
    order = pipe.model_cpu_offload_seq.split("->")
    assert called == [name for name in order if pipe.components[name] is not None]
    called.clear()
    other = LooCLDMImg2ImgPipeline(**pipe.components, null_class_label=pipe.config.null_class_label)
    draw(other, image=torch.rand(1, 3, 16, 16), strength=1.0, steps=1)
    assert called[0] == "vqvae"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_models_wait_on_the_cpu_until_they_are_needed(make_pipeline):
    pipe = make_pipeline("cross_attention")
    images = draw(pipe, class_labels=[0, 1])
    pipe.enable_model_cpu_offload()
    torch.testing.assert_close(draw(pipe, class_labels=[0, 1]), images, atol=1e-2, rtol=0)
    assert {str(model.device) for model in (pipe.unet, pipe.vqvae, pipe.class_embedding)} == {"cpu"}
