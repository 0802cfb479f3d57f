"""`LooCLDMPipeline` as its users meet it: labels and guidance in, images out, a folder to keep it in."""

import json
import math

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from diffusers.callbacks import PipelineCallback

from looc_ldm import LooCLDMPipeline
from looc_ldm.training.latents import measure_scaling_factor

KINDS = ["unconditional", "num_class_embeds", "cross_attention"]
CONDITIONAL = KINDS[1:]
NO_NAMES = [{9: "z"}, {0: None}, {-1: "z"}]
STEPS = 4  # out of DDIM's default 1000 timesteps: 750, 500, 250, 0


def draw(pipe, output_type="pt", seed=5, **arguments):
    arguments = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(seed)} | arguments
    return pipe(output_type=output_type, **arguments).images


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def unet_batches(pipe) -> list[int]:
    """Fills with the batch size of each pass of the UNet from now on."""
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return sizes


def first_model_output(pipe, **arguments) -> torch.Tensor:
    outputs = []
    draw(
        pipe,
        latents=noise(2),
        batch_size=2,
        callback_on_step_end=lambda pipe, step, timestep, tensors: outputs.append(tensors["model_output"]),
        callback_on_step_end_tensor_inputs=["model_output"],
        **arguments,
    )
    return outputs[0]


# Saving and loading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_pipeline_draws_the_same_images_and_loads_without_a_warning(
    kind, make_pipeline, tmp_path, diffusers_log
):
    pipe = make_pipeline(kind)
    pipe.save_pretrained(tmp_path)
    loaded = LooCLDMPipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(loaded), draw(pipe))
    assert diffusers_log.text == ""
    assert loaded.config.null_class_label == pipe.config.null_class_label
    assert loaded.config.id2label == pipe.config.id2label  # whole numbers again, which JSON turns into strings
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vqvae"] == ["looc_ldm", "LooCVQModel"]
    assert kind != "cross_attention" or index["class_embedding"] == ["looc_ldm", "ClassEmbedding"]


class Wrapper(torch.nn.Module):
    """Stands for peft's `PeftModel`: a different class, with the attributes of the model in it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapped_unet_is_taken_for_what_is_inside(kind, make_pipeline):
    pipe = make_pipeline(kind)
    images = draw(pipe)
    pipe.unet = Wrapper(pipe.unet)
    made = LooCLDMPipeline.from_pipe(pipe)
    assert torch.equal(draw(made), images)


def with_adapter(unet):
    """The UNet with a layer in an adapter's place, as peft puts it there."""
    layer = torch.nn.Module()
    layer.base_layer = unet.conv_out
    unet.conv_out = layer
    return unet


@pytest.mark.parametrize("wrap", [Wrapper, with_adapter, lambda unet: torch.compile(Wrapper(unet))])
@pytest.mark.parametrize("save", ["save_pretrained", "push_to_hub"])
def test_a_unet_that_would_not_load_again_is_not_saved(save, wrap, make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.unet = wrap(pipe.unet)
    with pytest.raises(ValueError, match=r"the pipeline's unet cannot be saved.*pipe\.unet = unet\.merge_and_unload"):
        getattr(pipe, save)(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_a_class_is_given_by_index_or_by_any_of_its_names_in_any_case(kind, make_pipeline):
    pipe = make_pipeline(kind)
    by_index = draw(pipe, class_labels=[1, 1, 1, 0, 2], latents=noise(5))
    by_name = draw(pipe, class_labels=["Sandal", "FLIP-FLOP", 1, "t-Shirt", " Ankle Boot"], latents=noise(5))
    assert torch.equal(by_name, by_index)
    assert not torch.equal(draw(pipe, class_labels=[2, 2, 2, 2, 1], latents=noise(5)), by_index)
    assert pipe.get_label_ids([pipe.config.id2label[1]]) == [1]  # all its names, as they stand there


@pytest.mark.parametrize("labels", [np.array([1, 2]), torch.tensor([1, 2]), (1, 2), [np.int64(1), "ankle boot"]])
def test_labels_may_be_arrays_and_tensors(labels, make_pipeline):
    pipe = make_pipeline()
    assert torch.equal(draw(pipe, class_labels=labels), draw(pipe, class_labels=[1, 2]))


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_no_label_is_the_null_class(kind, make_pipeline):
    pipe = make_pipeline(kind)
    null = draw(pipe, class_labels=3, batch_size=2)
    assert torch.equal(draw(pipe, batch_size=2), null)
    assert torch.equal(draw(pipe, class_labels=[None, None]), null)
    assert not torch.equal(draw(pipe, class_labels=0, batch_size=2), null)


def test_a_name_of_two_classes_is_refused_with_their_labels(make_pipeline):
    pipe = make_pipeline(id2label={0: "crane", 1: "heron", 2: "crane, derrick"})
    with pytest.raises(ValueError, match="'Crane' names the classes 0 and 2"):
        draw(pipe, class_labels="Crane")
    assert pipe.get_label_ids(["derrick", "heron"]) == [2, 1]


def test_one_label_and_a_batch_size_draw_images_of_one_class(make_pipeline):
    pipe = make_pipeline()
    assert torch.equal(
        draw(pipe, class_labels="ankle boot", batch_size=3, latents=noise(3)),
        draw(pipe, class_labels=[2, 2, 2], latents=noise(3)),
    )


def test_images_of_one_label_stand_next_to_each_other(make_pipeline):
    images = draw(make_pipeline(), class_labels=[0, 1], num_images_per_label=2, latents=noise(1).expand(4, -1, -1, -1))
    assert torch.allclose(images[0], images[1], atol=1e-5)
    assert torch.allclose(images[2], images[3], atol=1e-5)
    assert not torch.allclose(images[0], images[2], atol=1e-3)


# Guidance -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_the_guided_output_is_that_of_the_null_class_plus_w_times_the_difference(kind, make_pipeline):
    pipe = make_pipeline(kind)
    conditional = first_model_output(pipe, class_labels=1)
    null = first_model_output(pipe, class_labels=None)
    assert not torch.allclose(conditional, null, atol=1e-3)
    for scale in (0.0, 0.5, 3.0):
        guided = first_model_output(pipe, class_labels=1, guidance_scale=scale)
        torch.testing.assert_close(guided, null + scale * (conditional - null), atol=1e-5, rtol=1e-5)


def test_without_guidance_the_unet_sees_each_image_once_and_its_output_is_taken_as_it_is(make_pipeline):
    pipe = make_pipeline()
    batches = unet_batches(pipe)
    output = first_model_output(pipe, class_labels=1, guidance_scale=1.0, num_inference_steps=1)
    assert batches == [2]
    direct = pipe.unet(noise(2), pipe.scheduler.timesteps[0], class_labels=torch.tensor([1, 1])).sample
    assert torch.equal(output, direct)


def test_outside_the_guidance_interval_the_unet_sees_each_image_once(make_pipeline):
    pipe = make_pipeline()
    batches = unet_batches(pipe)
    draw(pipe, class_labels=[0, 1], guidance_scale=2.0, guidance_interval=(0.2, 0.6), num_inference_steps=STEPS)
    assert [int(t) for t in pipe.scheduler.timesteps] == [750, 500, 250, 0]
    assert batches == [2, 4, 4, 2]


def test_full_rescale_gives_the_guided_output_the_deviation_of_the_unguided_one(make_pipeline):
    pipe = make_pipeline()
    deviation = {
        rescale: first_model_output(pipe, class_labels=1, guidance_scale=8.0, guidance_rescale=rescale).std((1, 2, 3))
        for rescale in (0.0, 0.5, 1.0)
    }
    conditional = first_model_output(pipe, class_labels=1).std((1, 2, 3))
    torch.testing.assert_close(deviation[1.0], conditional)
    torch.testing.assert_close(deviation[0.5], (deviation[0.0] + conditional) / 2)
    assert (deviation[0.0] / conditional - 1).abs().min() > 0.01


# Randomness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_drawn_alone_is_the_one_drawn_in_a_batch(kind, make_pipeline):
    pipe = make_pipeline(kind)

    def generators(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    batch = draw(pipe, "latent", batch_size=3, generator=generators([1, 2, 3]), eta=1.0, num_inference_steps=STEPS)
    alone = draw(pipe, "latent", generator=generators([2]), eta=1.0, num_inference_steps=STEPS)
    torch.testing.assert_close(alone[0], batch[1], atol=1e-3, rtol=0)


def test_given_latents_are_the_noise_that_is_denoised(make_pipeline):
    pipe = make_pipeline()
    drawn = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw(pipe, batch_size=2, latents=drawn), draw(pipe, batch_size=2, seed=5))


def test_eta_adds_noise_to_ddim(make_pipeline):
    pipe = make_pipeline()
    assert not torch.equal(draw(pipe, "latent", eta=1.0), draw(pipe, "latent", eta=0.0))


# Outputs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_images_come_as_pil_numpy_torch_or_latents(channels, mode, make_pipeline):
    pipe = make_pipeline(channels=channels)
    pil = draw(pipe, "pil", batch_size=2)
    array = draw(pipe, "np", batch_size=2)
    tensor = draw(pipe, "pt", batch_size=2)
    assert all(isinstance(image, PIL.Image.Image) and (image.mode, image.size) == (mode, (16, 16)) for image in pil)
    assert array.shape == (2, 16, 16, channels)
    assert tensor.shape == (2, channels, 16, 16)
    assert 0 <= array.min() < array.max() <= 1
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(pil[1]).reshape(16, 16, channels), (array[1] * 255).round().astype(np.uint8))
    assert draw(pipe, "latent", batch_size=2).shape == (2, 4, 8, 8)


def test_the_latents_are_divided_by_the_scaling_factor_and_decoded(make_pipeline):
    pipe = make_pipeline()
    latents = draw(pipe, "latent", batch_size=2)
    with torch.no_grad():
        decoded = pipe.vqvae.decode(latents / 0.7).sample
    torch.testing.assert_close(draw(pipe, batch_size=2), (decoded / 2 + 0.5).clamp(0, 1))


def test_a_plain_tuple_is_returned_on_demand(make_pipeline):
    pipe = make_pipeline()
    (images,) = pipe(num_inference_steps=1, output_type="pt", return_dict=False)
    assert images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_it_draws_and_its_quantizer_stays_in_float32(kind, make_pipeline, tmp_path):
    make_pipeline(kind).save_pretrained(tmp_path)
    for pipe in (
        LooCLDMPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16),
        make_pipeline(kind).to(torch.bfloat16),
    ):
        assert draw(pipe, "latent").dtype == torch.float32  # rounded ones would have other codes
        assert draw(pipe).isfinite().all()
        assert pipe.vqvae.quantize.embedding.weight.dtype == torch.float32
        assert pipe.vqvae.encoder.conv_in.weight.dtype == torch.bfloat16


def test_a_unet_without_sample_size_draws_images_of_the_size_of_the_first_stage(make_pipeline):
    pipe = make_pipeline()
    pipe.unet.register_to_config(sample_size=None)
    assert draw(pipe).shape == (1, 3, 16, 16)


# Callbacks ------------------------------------------------------------------------------------------------------------


def test_a_callback_sees_every_step_and_its_latents_replace_those_of_the_loop(make_pipeline):
    pipe = make_pipeline()
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), pipe.num_timesteps, pipe.guidance_scale, sorted(tensors)))
        return {"latents": torch.full_like(tensors["latents"], 0.25)}

    latents = draw(
        pipe,
        "latent",
        class_labels=0,
        guidance_scale=2.0,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "model_output"],
    )
    assert seen == [(0, 500, 2, 2.0, ["latents", "model_output"]), (1, 0, 2, 2.0, ["latents", "model_output"])]
    assert torch.equal(latents, torch.full((1, 4, 8, 8), 0.25))


def test_an_interrupt_skips_the_steps_that_are_left(make_pipeline):
    pipe = make_pipeline()
    batches = unet_batches(pipe)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True

    assert draw(pipe, num_inference_steps=STEPS, callback_on_step_end=stop).shape == (1, 3, 16, 16)
    assert pipe.interrupt
    assert batches == [1]
    draw(pipe, num_inference_steps=STEPS)  # the next call is not interrupted
    assert batches == [1] * (1 + STEPS)


def test_the_progress_bar_counts_steps_and_can_be_switched_off(make_pipeline, capsys):
    pipe = make_pipeline()
    draw(pipe)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    draw(pipe)
    assert "2/2" in capsys.readouterr().err


# Inputs that do not fit -----------------------------------------------------------------------------------------------


class Foreign(PipelineCallback):
    """A callback for text-to-image pipelines."""

    tensor_inputs = ["prompt_embeds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive whole number, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a positive whole number, got 1.5"),
        ({"num_inference_steps": -1}, "num_inference_steps must be a positive whole number, got -1"),
        ({"num_inference_steps": 1001}, r"num_inference_steps must be in \[1, 1000\] for DDIMScheduler, got 1001"),
        ({"num_images_per_label": 0}, "num_images_per_label must be a positive whole number, got 0"),
        ({"output_type": "png"}, "output_type must be one of pil, np, pt, latent, got 'png'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "must be of latents, model_output, got noise"),
        ({"guidance_interval": (0.6, 0.2)}, "guidance_interval must be 0 <= low <= high <= 1"),
        ({"guidance_interval": (0.0, 1.2)}, "guidance_interval must be 0 <= low <= high <= 1"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale must be in \[0, 1\], got 1.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number, got nan"),
        ({"eta": 2.0}, r"eta must be in \[0, 1\], got 2.0"),
        ({"class_labels": 1.5}, r"class label must be in \[0, 4\) or a class name, got 1.5"),
        ({"generator": (torch.Generator(),) * 3}, "3 generators for 1 images"),
        ({"callback_on_step_end": Foreign()}, "must be of latents, model_output, got prompt_embeds"),
        ({"class_labels": 4}, r"class label must be in \[0, 4\) or a class name, got 4"),
        ({"class_labels": [0, -1]}, r"class label must be in \[0, 4\) or a class name, got -1"),
        ({"class_labels": []}, "0 class_labels do not fit 1 images"),
        ({"class_labels": [0, 1, 2], "batch_size": 2}, "3 class_labels do not fit 2 images"),
        ({"class_labels": "trouser"}, "unknown class name 'trouser'"),
        ({"class_labels": "Sandle"}, "unknown class name 'Sandle'; did you mean .*sandal"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, r"latents must have the shape \(1, 4, 8, 8\), got \(1, 4, 8, 9\)"),
        ({"generator": [torch.Generator()] * 3, "batch_size": 2}, "3 generators for 2 images"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_an_input_that_does_not_fit_is_refused_before_the_unet_runs(arguments, message, make_pipeline):
    pipe = make_pipeline()
    batches = unet_batches(pipe)
    with pytest.raises(ValueError, match=message):
        draw(pipe, **arguments)
    assert batches == []


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("unconditional", {"class_labels": 0}, "this model is unconditional"),
        ("unconditional", {"class_labels": "sandal"}, "this model is unconditional"),
        ("without null class", {}, "no null class"),
        ("without null class", {"class_labels": 0, "guidance_scale": 2.0}, "no null class"),
        ("without null class", {"class_labels": [0, None]}, "got None"),
    ],
)
def test_a_model_takes_no_labels_and_no_guidance_that_it_has_not_learned(kind, arguments, message, make_pipeline):
    unconditional = kind == "unconditional"
    pipe = make_pipeline(kind) if unconditional else make_pipeline(null_class_label=None)
    batches = unet_batches(pipe)
    with pytest.raises(ValueError, match=message):
        draw(pipe, **arguments)
    assert batches == []
    assert draw(pipe, class_labels=None if unconditional else 3).shape == (1, 3, 16, 16)


def test_an_unconditional_model_ignores_guidance_with_a_warning(make_pipeline, caplog):
    pipe = make_pipeline("unconditional")
    assert torch.equal(draw(pipe, class_labels=None, guidance_scale=2.0), draw(pipe, class_labels=None))
    assert caplog.messages == ["guidance_scale=2.0 has no effect: this model is unconditional"]


def test_a_first_stage_without_scaling_factor_is_refused_with_how_to_measure_it(make_pipeline):
    pipe = make_pipeline()
    pipe.vqvae.register_to_config(scaling_factor=None)
    batches = unet_batches(pipe)
    with pytest.raises(ValueError, match=r"looc_ldm\.training\.latents\.measure_scaling_factor.*register_to_config"):
        draw(pipe)
    assert batches == []
    measured = measure_scaling_factor(pipe.vqvae, [torch.rand(4, 3, 16, 16) * 2 - 1])
    pipe.vqvae.register_to_config(scaling_factor=measured)
    assert draw(pipe).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("factor", [0, -1.0, math.nan, math.inf, "1.0"])
def test_a_scaling_factor_that_is_no_positive_number_is_refused(factor, make_pipeline):
    pipe = make_pipeline()
    pipe.vqvae.register_to_config(scaling_factor=factor)
    with pytest.raises(ValueError, match="scaling_factor must be a positive number, got"):
        draw(pipe)


@pytest.mark.parametrize(
    ("scheduler", "steps", "allowed"),
    [
        (DDPMScheduler(clip_sample=False, steps_offset=1), 1000, r"\[1, 999\] for DDPMScheduler with steps_offset=1"),
        (EulerDiscreteScheduler(beta_start=0.0001, beta_end=0.02), 1001, r"\[1, 1000\] for EulerDiscreteScheduler"),
        (PNDMScheduler(), 3, r"\[4, 1000\] for PNDMScheduler"),
    ],
    ids=["offset", "many", "few"],
)
def test_steps_that_a_scheduler_has_no_timesteps_for_are_refused(scheduler, steps, allowed, make_pipeline):
    pipe = make_pipeline()
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=f"num_inference_steps must be in {allowed}, got {steps}"):
        draw(pipe, num_inference_steps=steps)


# Components that do not fit -------------------------------------------------------------------------------------------


def test_components_that_do_not_fit_each_other_are_refused_at_once(make_pipeline):
    plain, attending = make_pipeline("unconditional"), make_pipeline("cross_attention")
    other = UNet2DModel(block_out_channels=(32,) * 4, in_channels=3)
    with pytest.raises(ValueError, match="denoises latents of 3 channels, but the first stage has 4"):
        LooCLDMPipeline(plain.vqvae, other, plain.scheduler)
    for unet, embedding in ((plain.unet, attending.class_embedding), (attending.unet, None)):
        with pytest.raises(ValueError, match="given with a UNet2DConditionModel, and with no other"):
            LooCLDMPipeline(plain.vqvae, unet, plain.scheduler, embedding)
    for other in (AutoencoderKL(), torch.nn.Identity(), None):
        fitting = f"vqvae must be a LooCVQModel, a LooCSmallVQModel or a VQModel, got {type(other).__name__}"
        with pytest.raises(ValueError, match=fitting):
            LooCLDMPipeline(other, plain.unet, plain.scheduler)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        *(({"id2label": names}, r"id2label must give names to labels in \[0, 4\), got") for names in NO_NAMES),
        ({"null_class_label": -1}, r"null_class_label must be in \[0, 4\).*got -1"),
        ({"null_class_label": 4}, r"null_class_label must be in \[0, 4\).*got 4"),
        ({"prediction_type": "noise"}, "prediction_type must be one of epsilon, .*, got 'noise'"),
    ],
    ids=str,
)
def test_a_setting_that_does_not_fit_the_model_is_refused(argument, message, make_pipeline):
    with pytest.raises(ValueError, match=message):
        make_pipeline(**argument)


def test_the_models_are_let_go_at_the_end(make_pipeline):
    pipe = make_pipeline()
    freed = []
    pipe.maybe_free_model_hooks = lambda: freed.append(True)
    draw(pipe)
    draw(pipe, "latent")
    assert freed == [True, True]
