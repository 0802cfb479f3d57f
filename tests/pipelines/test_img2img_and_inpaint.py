"""Image to image and inpainting: what becomes of the image, the mask and the strength."""

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import ExifTags

from looc_ldm import LooCLDMImg2ImgPipeline, LooCLDMInpaintPipeline, LooCLDMPipeline
from looc_ldm.pipelines import schedulers

NOT_MIDWAY = {kind.__name__ for kind in schedulers.NOT_MIDWAY}
SIDE = 16


def image(seed: int = 0, channels: int = 3) -> torch.Tensor:
    """One smooth image `(1, C, 16, 16)` in [0, 1]."""
    coarse = torch.rand(1, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")


def left_half() -> torch.Tensor:
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 1
    return mask


def as_pil(tensor: torch.Tensor) -> PIL.Image.Image:
    """The first of images `(n, C, H, W)` in [0, 1], its last dimension dropped if C = 1."""
    array = (tensor[0].permute(1, 2, 0).float().numpy() * 255).round().astype(np.uint8)
    return PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


@pytest.fixture
def pipelines(make_pipeline):
    """The two pipelines of one tiny model."""

    def make(kind: str = "num_class_embeds", **arguments):
        pipe = make_pipeline(kind, **arguments)
        return LooCLDMImg2ImgPipeline.from_pipe(pipe), LooCLDMInpaintPipeline.from_pipe(pipe)

    return make


def run(pipe, *inputs, steps: int = 4, seed: int = 0, output_type: str = "pt", **arguments):
    arguments = {"generator": torch.Generator().manual_seed(seed), **arguments}
    return pipe(*inputs, num_inference_steps=steps, output_type=output_type, **arguments).images


@pytest.mark.parametrize("kind", ["unconditional", "num_class_embeds", "cross_attention"])
def test_they_are_made_from_a_pipeline_and_load_from_its_folder(kind, make_pipeline, tmp_path):
    pipe = make_pipeline(kind)
    pipe.save_pretrained(tmp_path)
    for one in (LooCLDMImg2ImgPipeline, LooCLDMInpaintPipeline):
        inputs = (image(), left_half()) if one is LooCLDMInpaintPipeline else (image(),)
        made, loaded = one.from_pipe(pipe), one.from_pretrained(tmp_path)
        for other in (made, loaded):
            assert other.config.id2label == pipe.config.id2label
            assert other.config.null_class_label == pipe.config.null_class_label
        assert made.unet is pipe.unet
        assert torch.equal(run(made, *inputs), run(loaded, *inputs))
        back = LooCLDMPipeline.from_pipe(made)
        assert back.vqvae is pipe.vqvae


@pytest.mark.parametrize("name", [*sorted(NOT_MIDWAY), "PNDMScheduler"])
def test_a_scheduler_that_cannot_start_midway_is_refused_by_name(name, pipelines):
    pipe, inpaint = pipelines("unconditional")
    pipe.scheduler = inpaint.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    hint = "needs skip_prk_steps=True" if name == "PNDMScheduler" else "cannot start from an image: use DDIMScheduler"
    for one, inputs in ((pipe, (image(),)), (inpaint, (image(), left_half()))):
        with pytest.raises(ValueError, match=f"{name} {hint}"):
            run(one, *inputs, strength=0.5)


def test_strength_is_the_share_of_the_steps_that_are_taken(pipelines):
    pipe, _ = pipelines()
    for strength, steps in ((1.0, 10), (0.5, 5), (0.1, 1)):
        run(pipe, image(), strength, steps=10, class_labels=0)
        assert pipe.num_timesteps == steps


def test_the_latents_it_starts_from_are_those_of_the_image_with_the_noise_of_the_first_timestep(pipelines):
    pipe, _ = pipelines("unconditional")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    inputs = []
    pipe.unet.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    run(pipe, image(), 0.5, steps=10, latents=noise)
    level = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps[5]]
    clean = pipe.vqvae.encode(image() * 2 - 1).latents * 0.7
    torch.testing.assert_close(inputs[0], level.sqrt() * clean + (1 - level).sqrt() * noise)


def test_flow_matching_starts_on_the_line_between_image_and_noise(make_pipeline):
    tiny = make_pipeline("unconditional")
    pipe = LooCLDMImg2ImgPipeline(tiny.vqvae, tiny.unet, FlowMatchEulerDiscreteScheduler())
    noise = torch.randn(1, 4, 8, 8)
    inputs = []
    pipe.unet.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    run(pipe, image(), 0.5, steps=10, latents=noise)
    sigma = pipe.scheduler.sigmas[5]
    torch.testing.assert_close(
        inputs[0], sigma * noise + (1 - sigma) * pipe.prepare_image_latents(pipe.preprocess_image(image()), 1)
    )


def test_images_come_in_every_form_and_are_resized(pipelines):
    pipe, _ = pipelines()
    tensor = (image() * 255).round() / 255
    array = tensor.permute(0, 2, 3, 1).numpy()
    pil = as_pil(tensor)
    expected = run(pipe, tensor, class_labels=1)
    for form in (pil, [pil], (pil,), array, array[0], [array[0]], [array], tensor[0], (tensor[0],)):
        torch.testing.assert_close(run(pipe, form, class_labels=1), expected, atol=1e-4, rtol=0)
    assert len(run(pipe, [pil, array[0], tensor])) == 3
    assert run(pipe, pil.resize((50, 40))).shape == (1, 3, SIDE, SIDE)
    assert run(pipe, pil.convert("L")).shape == (1, 3, SIDE, SIDE)


def test_an_array_that_rounding_left_below_0_is_in_0_1_all_the_same(pipelines):
    pipe, _ = pipelines()
    tensor = image()
    tensor[..., 0, 0] = 0
    expected = pipe.preprocess_image(tensor)
    tensor[..., 0, 0] = -1e-6
    assert torch.equal(pipe.preprocess_image(tensor), expected)
    assert torch.equal(pipe.preprocess_image(tensor.permute(0, 2, 3, 1).numpy()), expected)


def test_a_grey_model_takes_colour_images(pipelines):
    pipe, inpaint = pipelines(channels=1)
    expected = pipe.preprocess_image(as_pil(image()))
    array = image().permute(0, 2, 3, 1).numpy()
    for form in (array, array[0], [array[0]], image(), image()[0]):
        torch.testing.assert_close(pipe.preprocess_image(form), expected, atol=0.02, rtol=0)
        assert run(pipe, form).shape == run(inpaint, form, left_half()).shape == (1, 1, SIDE, SIDE)
    assert pipe.preprocess_image([as_pil(image()), array[0]]).shape == (2, 1, SIDE, SIDE)
    with pytest.raises(ValueError, match="image must have 1 channels, got 4"):
        pipe.preprocess_image(np.zeros((SIDE, SIDE, 4), np.float32))
    grey = image(channels=1)
    for form in (grey, grey[0], grey[0, 0], grey.numpy()[0, 0], grey.permute(0, 2, 3, 1).numpy()[0]):
        assert run(pipe, form).shape == (1, 1, SIDE, SIDE)


def with_orientation(pixels: np.ndarray) -> PIL.Image.Image:
    """An image that is stored upside down, as its EXIF data says."""
    picture = PIL.Image.fromarray(pixels[::-1].copy())
    picture.getexif()[ExifTags.Base.Orientation] = 4
    return picture


RAMP = np.linspace(0, 255, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint8)


@pytest.mark.parametrize(
    "stored",
    [
        PIL.Image.fromarray(RAMP.astype(np.uint16) * 257),
        PIL.Image.merge("LA", [PIL.Image.new("L", (SIDE, SIDE)), PIL.Image.fromarray(255 - RAMP)]),
        with_orientation(RAMP),
    ],
    ids=["16 bits", "transparency", "EXIF orientation"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_read_as_viewers_show_them(stored, channels, pipelines):
    pipe, inpaint = pipelines(channels=channels)
    expected = torch.from_numpy(RAMP / 255).float().expand(1, channels, SIDE, SIDE)
    torch.testing.assert_close(pipe.preprocess_image(stored) / 2 + 0.5, expected, atol=1.01 / 255, rtol=0)
    kept = run(inpaint, stored, torch.zeros(1, 1, SIDE, SIDE))
    torch.testing.assert_close(kept, expected, atol=1.01 / 255, rtol=0)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_of_32_bits_are_refused_since_their_range_is_not_known(mode, pipelines):
    pipe, inpaint = pipelines()
    deep = PIL.Image.fromarray(RAMP).convert(mode)
    with pytest.raises(ValueError, match=rf"image: its pixels have 32 bits \(mode {mode}\)"):
        run(pipe, deep)
    with pytest.raises(ValueError, match=rf"mask_image: its pixels have 32 bits \(mode {mode}\)"):
        run(inpaint, image(), deep)


def test_one_image_is_varied_for_every_label_and_several_images_go_with_their_labels(pipelines):
    pipe, inpaint = pipelines()
    two = torch.cat([image(0), image(1)])
    noise = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1)
    assert run(pipe, image(), class_labels=[0, 1, 2]).shape[0] == 3
    assert run(pipe, two, class_labels=0, num_images_per_label=3).shape[0] == 6
    both = run(pipe, two, class_labels=[0, 1], latents=noise)
    second = run(pipe, image(1), class_labels=1, latents=noise[:1])
    torch.testing.assert_close(both[1], second[0], atol=1e-4, rtol=0)
    masked = run(inpaint, two, left_half(), class_labels=[0, 1], latents=noise)
    torch.testing.assert_close(masked[1, ..., SIDE // 2 :], two[1, ..., SIDE // 2 :])


@pytest.mark.parametrize("name", ["DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_inpainting_keeps_the_known_pixels_and_latents_and_draws_the_others(name, make_pipeline):
    tiny = make_pipeline("unconditional")
    kind = getattr(diffusers, name)
    scheduler = kind() if name.startswith("FlowMatch") else kind.from_config(tiny.scheduler.config)
    pipe = LooCLDMInpaintPipeline(tiny.vqvae, tiny.unet, scheduler)
    drawn = run(pipe, image(), left_half(), steps=8)
    assert torch.allclose(drawn[..., SIDE // 2 :], image()[..., SIDE // 2 :], atol=1e-6)
    assert (drawn[..., : SIDE // 2] - image()[..., : SIDE // 2]).abs().mean() > 0.02
    latents = run(pipe, image(), left_half(), steps=8, output_type="latent")
    clean = pipe.prepare_image_latents(pipe.preprocess_image(image()), 1)
    assert torch.equal(latents[..., 4:], clean[..., 4:])
    assert not torch.allclose(latents[..., :4], clean[..., :4], atol=0.05)


def test_at_full_strength_it_starts_from_noise_alone(pipelines):
    _, pipe = pipelines("unconditional")
    noise = torch.randn(1, 4, 8, 8)
    inputs = []
    pipe.unet.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    run(pipe, image(), left_half(), latents=noise)
    assert torch.equal(inputs[0], noise)


def test_a_latent_is_drawn_anew_if_any_of_its_pixels_is(pipelines):
    _, pipe = pipelines("unconditional")
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 5, 5] = 1
    changed = run(pipe, image(), mask, output_type="latent") != pipe.prepare_image_latents(
        pipe.preprocess_image(image()), 1
    )
    assert changed.any(1).nonzero().tolist() == [[0, 2, 2]]
    pixels = (run(pipe, image(), mask) - image()).abs() > 1e-6
    assert pixels.any(1).nonzero().tolist() == [[0, 5, 5]]


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        ((image(), 0.0), {}, "strength must be at most 1 and leave one of 4 steps, got 0.0"),
        ((image(), 1.2), {}, "strength must be at most 1 and leave one of 4 steps, got 1.2"),
        ((image(), 0.2), {}, "strength must be at most 1 and leave one of 4 steps, got 0.2"),
        ((torch.rand(1, 2, 16, 16),), {}, "image must have 3 channels, got 2"),
        ((np.zeros((1, 16, 16, 3), np.uint8),), {}, r"image arrays must be floats in \[0, 1\], got uint8"),
        ((image() * 255,), {}, r"image arrays must be in \[0, 1\], got values up to"),
        (([],), {}, "image must not be an empty list"),
        ((image().expand(2, -1, -1, -1),), {"class_labels": [0, 1, 2]}, "3 class_labels do not fit 2 images"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_input_that_does_not_fit_is_refused_before_the_unet_runs(inputs, arguments, message, pipelines):
    pipe, inpaint = pipelines()
    ran = []
    pipe.unet.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=message):
        run(pipe, *inputs, **arguments)
    with pytest.raises(ValueError, match=message):
        run(inpaint, inputs[0], left_half(), *inputs[1:], **arguments)
    assert ran == []


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 3, SIDE, SIDE), "mask_image must have one channel, got 3"),
        (torch.zeros(2, 1, SIDE, SIDE), "2 masks do not fit 1 images"),
        ([], "mask_image must not be an empty list"),
        (PIL.Image.new("L", (SIDE, SIDE), 1), r"255 in 8-bit and 65535 in 16-bit images; .* up to 0\.00392"),
        (PIL.Image.new("I;16", (SIDE, SIDE), 255), r"255 in 8-bit and 65535 in 16-bit images; .* up to 0\.00389"),
        (np.full((SIDE, SIDE), 0.4), r"1 in arrays, .* up to 0\.4"),
        (np.full((SIDE, SIDE), np.nan), "1 in arrays, .* up to nan"),
    ],
    ids=["channels", "number", "empty", "1 of 255", "255 of 65535", "grey", "NaN"],
)
def test_a_mask_that_does_not_fit_is_refused(mask, message, pipelines):
    _, pipe = pipelines()
    with pytest.raises(ValueError, match=message):
        run(pipe, image(), mask)


def test_a_mask_may_be_of_any_type_and_transparent_where_the_image_stays(pipelines):
    _, pipe = pipelines()
    expected = run(pipe, image(), left_half())
    array = left_half()[0, 0].numpy()
    pil = as_pil(left_half())
    on_nothing = PIL.Image.merge("LA", [PIL.Image.new("L", pil.size, "white"), pil])
    given, kept = image(), [left_half(), array]
    for mask in (*kept, array.astype(bool), left_half().bool(), (array * 255).astype(np.uint8), pil, on_nothing):
        for form in (mask, [mask], (mask,)):
            assert torch.equal(run(pipe, given, form), expected)
    assert torch.equal(given, image())  # the given objects are not changed
    assert torch.equal(kept[0], left_half())


def test_a_mask_is_resized_to_the_size_of_the_image_whatever_that_is(make_pipeline):
    tiny = make_pipeline("unconditional")
    tiny.unet.register_to_config(sample_size=10)
    pipe = LooCLDMInpaintPipeline.from_pipe(tiny)
    assert run(pipe, image(), left_half()).shape == (1, 3, 20, 20)


@pytest.mark.parametrize("which", [0, 1])
def test_guidance_and_callbacks_reach_the_loop(which, pipelines):
    pipe = pipelines()[which]
    inputs = (image(), left_half()) if which else (image(),)
    batches, steps = [], []
    pipe.unet.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))

    def callback(pipe, step, timestep, tensors):
        steps.append((step, *sorted(tensors)))

    run(
        pipe,
        *inputs,
        strength=1.0,
        class_labels=0,
        guidance_scale=2.0,
        guidance_interval=(0.2, 0.6),
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["model_output"],
    )
    assert batches == [1, 2, 2, 1]
    assert steps == [(step, "model_output") for step in range(4)]
    guided, rescaled = (
        run(pipe, *inputs, class_labels=0, guidance_scale=8.0, guidance_rescale=rescale) for rescale in (0.0, 1.0)
    )
    assert not torch.allclose(guided, rescaled, atol=1e-3)
    noisy = run(pipe, *inputs, class_labels=0, eta=1.0)
    assert not torch.allclose(noisy, run(pipe, *inputs, class_labels=0), atol=1e-3)


@pytest.mark.parametrize("which", [0, 1])
def test_variations_of_an_image_stand_next_to_each_other(which, pipelines):
    pipe = pipelines()[which]
    two, masks = torch.cat([image(0), image(1)]), torch.cat([left_half(), left_half().flip(-1)])
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    inputs = (two, masks) if which else (two,)
    drawn = run(pipe, *inputs, class_labels=[0, 1], num_images_per_label=2, latents=noise, strength=0.5)
    for number in range(4):
        of = number // 2
        inputs = (two[of : of + 1], masks[of : of + 1]) if which else (two[of : of + 1],)
        alone = run(pipe, *inputs, class_labels=of, latents=noise[number : number + 1], strength=0.5)
        torch.testing.assert_close(drawn[number], alone[0], atol=1e-4, rtol=0)


def test_after_an_interrupt_the_known_part_is_clean(pipelines):
    _, pipe = pipelines("unconditional")

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True

    latents = run(pipe, image(), left_half(), callback_on_step_end=stop, output_type="latent")
    clean = pipe.prepare_image_latents(pipe.preprocess_image(image()), 1)
    assert torch.equal(latents[..., 4:], clean[..., 4:])


def test_a_pipeline_made_from_another_leaves_its_dtypes_alone(make_pipeline):
    pipe = make_pipeline()
    pipe.unet.to(torch.bfloat16)
    other = LooCLDMImg2ImgPipeline.from_pipe(pipe, null_class_label=None)
    assert pipe.unet.dtype == torch.bfloat16
    assert pipe.vqvae.dtype == torch.float32
    assert other.config.null_class_label is None
    assert other.config.noise_schedule == pipe.config.noise_schedule
    cast = LooCLDMImg2ImgPipeline.from_pipe(pipe, dtype=torch.bfloat16)
    assert cast.vqvae.dtype == torch.bfloat16
    half = LooCLDMImg2ImgPipeline.from_pipe(cast)
    assert half.unet.dtype == half.vqvae.dtype == torch.bfloat16
    assert half.vqvae.quantize.embedding.weight.dtype == torch.float32
    assert run(half, image(), 0.5, class_labels=0).isfinite().all()
    with pytest.raises(ValueError, match="'null_label' is no argument of LooCLDMImg2ImgPipeline"):
        LooCLDMImg2ImgPipeline.from_pipe(pipe, null_label=3)


def test_the_scheduler_may_be_used_for_drawing_again_afterwards(make_pipeline):
    pipe = make_pipeline("unconditional")
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    before = run(pipe)
    run(LooCLDMImg2ImgPipeline.from_pipe(pipe), image(), 0.5)
    assert torch.equal(run(pipe), before)
