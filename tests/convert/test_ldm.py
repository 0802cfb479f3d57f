"""A converted UNet predicts what LDM's predicts, and a converted pipeline is LDM's model with LDM's sampler."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

import originals
from looc_ldm import FixedHeadsUNet2DModel
from looc_ldm.convert import Settings, convert_ldm, convert_unet, kind_of, settings_of
from looc_ldm.utils.errors import ModelError, UserError

SETTINGS = Settings(resolution=16, num_head_channels=16, prediction_type="epsilon", scaling_factor=1.0)


def predictions(model, theirs, channels: int = 4, context: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Ours and theirs, and theirs for other timesteps; in float64, where only a wrong computation differs."""
    torch.manual_seed(1)
    x, t = torch.randn(3, channels, 8, 8, dtype=torch.float64), torch.tensor([1, 500, 980])
    model.double()
    theirs.double()
    context = None if context is None else context.double()
    conditions = {} if context is None else {"encoder_hidden_states": context}
    ours = model(x, t, **conditions).sample
    return ours, theirs(x, t.float(), context), theirs(x, t.flip(0).float(), context)


def assert_same(ours, theirs, other) -> None:
    scale = theirs.abs().max().clamp_min(1)
    assert (ours - theirs).abs().max() < 1e-5 * scale
    assert (theirs - other).abs().max() > 1e-3 * scale  # the prediction depends on its conditions


@pytest.fixture
def parts() -> dict:
    """An unconditional LatentDiffusion with a VQ first stage, f = 2 and latents of four channels."""
    return {"unet": originals.unet(attention=(2,)), "vqgan": originals.vqgan()}


# UNets ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [(1, 2), (2,), (1,)])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_unet_with_heads_of_one_size(attention, layers):
    unet = originals.unet(layers=layers, attention=attention)
    model = convert_unet(unet.state_dict(), SETTINGS, latent_size=8)
    assert type(model) is UNet2DModel
    assert_same(*predictions(model, unet))


@pytest.mark.parametrize("by_head", [True, False])
def test_the_order_of_query_key_and_value(by_head):
    unet = originals.unet(by_head=by_head)
    settings = Settings(num_head_channels=16, qkv_by_head=by_head)
    assert_same(*predictions(convert_unet(unet.state_dict(), settings, latent_size=8), unet))
    other = convert_unet(unet.state_dict(), Settings(num_head_channels=16, qkv_by_head=not by_head), latent_size=8)
    ours, expected, _ = predictions(other, unet)
    assert (ours - expected).abs().max() > 1e-3


def test_a_unet_like_that_of_lsun_churches():
    """A fixed number of heads, scale and shift, blocks that resample, and a last level without attention."""
    unet = originals.unet(mult=(1, 2, 2), layers=2, num_heads=4, scale_shift=True, in_blocks=True)
    model = convert_unet(unet.state_dict(), Settings(num_heads=4), latent_size=8)
    assert type(model) is FixedHeadsUNet2DModel
    assert_same(*predictions(model, unet))


@pytest.mark.parametrize(("heads", "attention"), [({"num_head_channels": 16}, (1, 2)), ({"num_heads": 1}, (2,))])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_unet_with_cross_attention(heads, attention, depth):
    unet = originals.unet(layers=2, attention=attention, context=24, depth=depth, **heads)
    model = convert_unet(unet.state_dict(), Settings(**heads), latent_size=8)
    assert type(model) is UNet2DConditionModel
    torch.manual_seed(2)
    context = torch.randn(3, 5, 24)  # more than one token: attention to one is the same for any number of heads
    assert_same(*predictions(model, unet, context=context))


@pytest.mark.parametrize(
    ("arguments", "heads", "options", "kind", "millions"),
    [
        ((3, 224, (1, 2, 3, 4), 2, (8, 4, 2)), {"num_head_channels": 32}, {}, UNet2DModel, 274.06),
        (
            (4, 192, (1, 2, 2, 4, 4), 2, (1, 2, 4, 8)),
            {"num_heads": 8},
            {"scale_shift": True, "in_blocks": True},
            FixedHeadsUNet2DModel,
            294.97,
        ),
        ((4, 256, (1, 2, 4), 2, (4, 2, 1)), {"num_head_channels": 32}, {"context": 512}, UNet2DConditionModel, 394.98),
        ((3, 192, (1, 2, 3, 5), 2, (8, 4, 2)), {"num_heads": 1}, {"context": 512}, UNet2DConditionModel, 400.92),
    ],
    ids=["bedrooms", "churches", "cin-f8", "cin-v2"],
)
def test_the_published_unets_fit_by_name_and_size(arguments, heads, options, kind, millions):
    """LDM's configs/latent-diffusion/*.yaml, with the sizes in the paper."""
    with torch.device("meta"):
        unet = originals.UNet(*arguments, **heads, **options)
    ours = convert_unet(unet.state_dict(), Settings(**heads), latent_size=32)
    assert type(ours) is kind
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in unet.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_heads_of_a_class_conditional_unet_are_counted_not_measured():
    """`attention_head_dim` is a number of heads in UNet2DConditionModel."""
    unet = originals.unet(context=24)
    model = convert_unet(unet.state_dict(), Settings(num_head_channels=16), latent_size=8)
    assert [block.attentions[0].transformer_blocks[0].attn1.heads for block in model.down_blocks] == [2, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(), "give --num-heads or --num-head-channels, or --original-config"),
        (Settings(num_heads=3), "num_heads=3 must divide the 32 channels"),
        (Settings(num_head_channels=64), "num_head_channels=64 must divide the 32 channels"),
        (Settings(num_heads=1, architecture={"model_channels": 64}), "it says model_channels 64, the weights 32"),
    ],
)
def test_heads_that_are_unknown_or_do_not_fit_are_refused(settings, message):
    unet = originals.unet()
    with pytest.raises(UserError, match=message):
        convert_unet(unet.state_dict(), settings, latent_size=8)


def test_weights_of_another_unet_are_named():
    state = originals.unet().state_dict()
    state["label_emb.weight"] = torch.ones(10, 128)
    with pytest.raises(ModelError, match=r"unexpected label_emb\.weight"):
        convert_unet(state, SETTINGS, latent_size=8)
    state = {key: value for key, value in state.items() if not key.startswith("out.2")}
    with pytest.raises(ModelError, match=r"not complete: missing out\.2\.weight"):
        convert_unet(state, SETTINGS, latent_size=8)


# Whole checkpoints ----------------------------------------------------------------------------------------------------


def test_an_unconditional_model(parts):
    # An average that the first stage keeps is not what the UNet was trained on.
    average = {"first_stage_model.model_ema.quant_convbias": torch.ones(4)}
    state = originals.latent_diffusion(**parts, **average)
    assert kind_of(state) == "ldm"
    result, updates = convert_ldm(state, SETTINGS)
    assert_same(*predictions(result.unet, parts["unet"]))
    images = torch.rand(1, 3, 16, 16)
    assert torch.allclose(result.vqvae.encode(images).latents, parts["vqgan"].encode(images), atol=1e-5)
    assert result.class_embedding is None
    assert updates is None
    assert result.vqvae.config.scaling_factor == 1.0
    assert result.vqvae.config.sample_size == 16
    assert result.unet.config.sample_size == 8


def test_a_class_conditional_model(parts):
    classes = nn.Embedding(10, 24)
    unet = originals.unet(context=24)
    state = originals.latent_diffusion(unet, parts["vqgan"], classes)
    result, _ = convert_ldm(state, Settings(**{**vars(SETTINGS), "null_class_label": 9}))
    labels = torch.tensor([3, 0, 9])
    tokens = result.class_embedding(labels)
    assert torch.equal(tokens, classes(labels)[:, None])
    assert_same(*predictions(result.unet, unet, context=tokens))
    assert result.config.null_class_label == 9
    with pytest.raises(ModelError, match="--null-class-label 10 is not one of the 10 labels"):
        convert_ldm(state, Settings(**{**vars(SETTINGS), "null_class_label": 10}))


def test_averaged_weights_are_preferred_unless_live_ones_are_asked_for(parts):
    live = {f"diffusion_model.{key}": value for key, value in parts["unet"].state_dict().items()}
    averages = {f"model_ema.{key.replace('.', '')}": value * 0.9 + 0.01 for key, value in live.items()}
    extra = {**averages, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(123)}
    state = originals.latent_diffusion(**parts, **extra)
    result, _ = convert_ldm(state, SETTINGS, use_ema=False)
    assert_same(*predictions(result.unet, parts["unet"]))
    result, updates = convert_ldm(state, SETTINGS)
    assert updates == 123
    averaged = {key: averages[f"model_ema.diffusion_model{key.replace('.', '')}"] for key in parts["unet"].state_dict()}
    parts["unet"].load_state_dict(averaged)
    assert_same(*predictions(result.unet, parts["unet"]))
    with pytest.raises(ModelError, match=r"unexpected model_ema\.of_nothing and 0 more"):
        convert_ldm({**state, "model_ema.of_nothing": torch.ones(1)}, SETTINGS)


def test_the_noise_schedule_and_sampler_are_ldms(parts):
    config = convert_ldm(originals.latent_diffusion(**parts), SETTINGS)[0].scheduler.config
    assert (config.beta_schedule, config.beta_start, config.beta_end) == ("scaled_linear", 0.0015, 0.0195)
    assert (config.num_train_timesteps, config.steps_offset) == (1000, 1)
    assert not config.clip_sample
    assert not config.set_alpha_to_one
    betas = torch.linspace(1e-4, 0.02, 500)
    config = convert_ldm(originals.latent_diffusion(**parts, betas=betas), SETTINGS)[0].scheduler.config
    assert (config.beta_schedule, config.beta_start, config.num_train_timesteps) == ("linear", 1e-4, 500)
    betas = betas.square()
    scheduler = convert_ldm(originals.latent_diffusion(**parts, betas=betas), SETTINGS)[0].scheduler
    assert np.allclose(scheduler.betas, betas)


def test_a_measured_scale_in_the_weights_wins(parts):
    state = originals.latent_diffusion(**parts, scale_factor=torch.tensor(0.25))
    assert convert_ldm(state, SETTINGS)[0].vqvae.config.scaling_factor == 0.25


def test_a_first_stage_with_loocs_quantizer(parts):
    quantizer = originals.Codebook(64, 4, usage=True, distance="cos", scale=2)
    vqgan = originals.vqgan(quantizer, latent=3)  # d divides 3 * 2**2, not 3
    unet = originals.unet(3, attention=(2,))
    state = originals.latent_diffusion(unet, vqgan)
    with pytest.raises(UserError, match="give --distance, --interpolation-factor, or"):
        convert_ldm(state, SETTINGS)
    result, _ = convert_ldm(state, Settings(**{**vars(SETTINGS), "distance": "cosine", "interpolation_factor": 2}))
    latents = torch.randn(2, 3, 8, 8)
    expected = vqgan.decode(latents)
    assert (result.vqvae.decode(latents).sample - expected).abs().max() < 1e-5 * expected.abs().max()


CONFIG = {
    "image_size": 8,
    "unet_config": {
        "params": {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "num_head_channels": 16}
    },
    "first_stage_config": {
        "params": {"embed_dim": 4, "n_embed": 64, "ddconfig": {"resolution": 16, "ch": 32, "ch_mult": [1, 2]}}
    },
    "linear_start": 0.0015,
    "linear_end": 0.0155,
}


def test_the_original_config_says_all_that_the_weights_do_not(parts):
    state = originals.latent_diffusion(**parts)
    with pytest.raises(UserError, match="--num-heads or --num-head-channels, --resolution, --prediction-type, --scal"):
        convert_ldm(state, Settings())
    del state["betas"]
    with pytest.raises(ModelError, match=r"\(betas\): give --original-config FILE"):
        convert_ldm(state, SETTINGS)
    result, _ = convert_ldm(state, settings_of({"model": {"params": CONFIG}}, "ldm"))
    assert_same(*predictions(result.unet, parts["unet"]))
    config = result.scheduler.config
    assert (config.prediction_type, config.beta_schedule, config.beta_end) == ("epsilon", "scaled_linear", 0.0155)
    assert (result.vqvae.config.scaling_factor, result.vqvae.config.sample_size) == (1.0, 16)
    other = {**CONFIG, "first_stage_config": {"params": {"n_embed": 8192, "ddconfig": {}}}}
    with pytest.raises(ModelError, match="it says n_embed 8192, the weights 64"):
        convert_ldm(state, settings_of({"model": {"params": other}}, "ldm"))


def test_models_of_other_kinds_are_refused_with_the_reason(parts):
    state = originals.latent_diffusion(**parts)
    text = {**state, "cond_stage_model.transformer.wte": torch.ones(1)}
    with pytest.raises(ModelError, match=r"has no cross-attention, and cond_stage_model\. holds transformer\.wte"):
        convert_ldm(text, SETTINGS)
    with pytest.raises(ModelError, match=r"unexpected control_model\.x and 0 more"):
        convert_ldm({**state, "control_model.x": torch.ones(1)}, SETTINGS)
    kl = {key: value for key, value in state.items() if "quantize" not in key}
    with pytest.raises(ModelError, match=r"missing quantize\.embedding\.weight\): it may be a KL autoencoder"):
        convert_ldm(kl, SETTINGS)
    concatenated = originals.unet(7, attention=(2,))
    concatenated.out[2] = nn.Conv2d(32, 4, 3)
    with pytest.raises(ModelError, match="7 input and 4 output channels is conditioned on images"):
        convert_ldm(originals.latent_diffusion(concatenated, parts["vqgan"]), SETTINGS)
