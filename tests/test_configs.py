"""The bundled configs: what they say can be built, has the published sizes, and fits together."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention

from looc_ldm import FixedHeadsUNet2DModel, LooCLDMPipeline, LooCVQModel, configs
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.config_parsing import construct, load_config
from looc_ldm.training.data import with_stage_1_images
from looc_ldm.training.denoiser import Denoiser, make_scheduler
from tiny import tiny_autoencoder

AUTOENCODERS = [name for name in configs.names() if name.split("/")[1].startswith("autoencoder")]
DIFFUSIONS = [name for name in configs.names() if name.split("/")[1].startswith("diffusion")]

# Published by VQGAN and LDM: downsampling factor, n_q, bits per pixel, millions of parameters.
F16_PARAMETERS = (72_141_699 - 1024 * 256 + 256 * 4) / 1e6  # VQGAN's, without its codebook of 1,024 x 256, with ours
FULL_SIZE_AUTOENCODERS = {
    "ffhq/autoencoder": (16, 256, 8.0, F16_PARAMETERS),
    "imagenet/autoencoder": (16, 256, 8.0, F16_PARAMETERS),
    "imagenet/autoencoder_f8": (8, 4, 0.625, 67.66),
    "imagenet/autoencoder_f8_m2": (8, 8, 1.25, 67.69),
    "lsun_bedrooms/autoencoder": (4, 4, 2.5, 55.31),
    "lsun_bedrooms/autoencoder_m2": (4, 8, 5.0, 55.35),
    "lsun_churches/autoencoder": (8, 4, 0.625, 67.66),
    "lsun_churches/autoencoder_m2": (8, 8, 1.25, 67.69),
}
# Millions of parameters; (heads, channels of a head) at each level from the top, and in the middle.
FULL_SIZE_DIFFUSIONS = {
    "imagenet/diffusion": (394.98, [(8, 32), (16, 32), (32, 32)], (32, 32)),
    "imagenet/diffusion_class_embed": (258.76, [(8, 32), (16, 32), (32, 32)], (32, 32)),
    "lsun_bedrooms/diffusion": (274.06, [None, (14, 32), (21, 32), (28, 32)], (28, 32)),
    "lsun_churches/diffusion": (294.97, [(8, 24), (8, 48), (8, 48), (8, 96), None], (8, 96)),
}
# Learning rate, images per step, steps, steps of warm-up, beta_end and loss of LDM.
LDM_TRAINING = {
    "imagenet/diffusion": (1e-6 * 64, 64, 4_800_000, 0, 0.0195, "l2"),
    "imagenet/diffusion_class_embed": (1e-6 * 64, 64, 4_800_000, 0, 0.0195, "l2"),
    "lsun_bedrooms/diffusion": (2e-6 * 48, 48, 1_900_000, 0, 0.0195, "l2"),
    "lsun_churches/diffusion": (5e-5, 96, 500_000, 10_000, 0.0155, "l1"),
}


def build_autoencoder(name: str) -> LooCVQModel:
    config = load_config(AutoencoderConfig, name)
    with torch.device("meta"):
        return construct(LooCVQModel, {"sample_size": config.data.resolution, **config.model}, "model")


def autoencoder_of(name: str) -> str:
    """The bundled autoencoder config whose result a diffusion config is trained on."""
    results = {f"{load_config(AutoencoderConfig, other).output_dir}/model": other for other in AUTOENCODERS}
    return results[load_config(DiffusionConfig, name).autoencoder]


def build_denoiser(name: str, autoencoder: str) -> Denoiser:
    config, vqvae = load_config(DiffusionConfig, name), build_autoencoder(autoencoder)
    num_classes = {"imagenet": 1000}.get(name.split("/")[0], 10) if config.class_conditional else 0
    with torch.device("meta"):
        return Denoiser.from_config(with_stage_1_images(config, vqvae), vqvae, num_classes)


def millions(model: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def heads_of(block: torch.nn.Module) -> tuple[int, int] | None:
    """(heads, channels of a head) of all attentions of a block; None without attention."""
    found = {(a.heads, a.inner_dim // a.heads) for a in block.modules() if isinstance(a, Attention)}
    assert len(found) <= 1
    return found.pop() if found else None


def test_every_full_size_config_is_checked_here():
    full_size = {name for name in configs.names() if name.split("/")[0] in ("ffhq", "imagenet") or "lsun" in name}
    assert full_size == {*FULL_SIZE_AUTOENCODERS, *FULL_SIZE_DIFFUSIONS}
    assert set(configs.names()) == {*AUTOENCODERS, *DIFFUSIONS}
    folders = {load_config(AutoencoderConfig, name).output_dir for name in AUTOENCODERS}
    folders |= {load_config(DiffusionConfig, name).output_dir for name in DIFFUSIONS}
    assert len(folders) == len(configs.names())  # no two write to one folder


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(KeyError, match=r"no bundled config 'garmets': it must be one of .*ffhq/autoencoder"):
        configs.path("garmets")


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder_builds_and_its_images_fit(name):
    model = build_autoencoder(name)
    assert load_config(AutoencoderConfig, name).data.resolution % model.downsampling_factor == 0


@pytest.mark.parametrize("rate", [0.25, 0.625, 1.25])
def test_names_with_a_rate_tell_the_truth(rate):
    assert build_autoencoder(f"f8_256/autoencoder_{rate}bpp").bits_per_image(256, 256) / 256**2 == rate


@pytest.mark.parametrize("name", FULL_SIZE_AUTOENCODERS)
def test_full_size_autoencoder_has_the_published_size_and_heads(name):
    factor, n_q, bits_per_pixel, parameters = FULL_SIZE_AUTOENCODERS[name]
    model = build_autoencoder(name)
    codevectors = 256 if factor == 16 else 1024
    assert model.downsampling_factor == factor
    assert model.quantize.vq_embed_dim == n_q
    assert model.quantize.embedding.weight.shape == (codevectors, 4)
    assert n_q * 2**2 / 4 * math.log2(codevectors) / factor**2 == bits_per_pixel
    assert model.bits_per_image(256, 256) / 256**2 == bits_per_pixel
    assert millions(model) == pytest.approx(parameters, abs=0.005)
    # Attention is where the source has it.
    at_lowest_level = None if model.downsampling_factor == 4 else (1, 512)
    levels = [None] * (len(model.config.block_out_channels) - 1) + [at_lowest_level]
    assert [heads_of(block) for block in model.encoder.down_blocks] == levels
    assert [heads_of(block) for block in model.decoder.up_blocks] == levels[::-1]
    assert heads_of(model.encoder.mid_block) == heads_of(model.decoder.mid_block) == (1, 512)


@pytest.mark.parametrize("name", FULL_SIZE_AUTOENCODERS)
def test_full_size_autoencoder_trains_as_vqgan(name):
    config = load_config(AutoencoderConfig, name)
    weight, start, layers = {
        "ffhq/autoencoder": (0.8, 30_001, 3),
        "imagenet/autoencoder": (0.8, 250_001, 3),
        "lsun_bedrooms/autoencoder": (0.75, 0, 3),
        "lsun_bedrooms/autoencoder_m2": (0.75, 0, 3),
    }.get(name, (0.6, 1, 2))
    assert config.optimizer.learning_rate == pytest.approx(4.5e-6 * config.batch_size)
    assert config.optimizer.betas == (0.5, 0.9)
    assert config.optimizer.weight_decay == config.optimizer.max_grad_norm == config.optimizer.warmup_images == 0
    assert config.optimizer.schedule == "constant"
    assert (config.loss.reconstruction, config.loss.lpips_weight, config.loss.adaptive_weight) == ("l1", 1.0, True)
    assert config.loss.adversarial_weight == weight
    assert config.loss.adversarial_start_images == start * config.batch_size
    assert config.loss.discriminator_layers == layers
    assert config.model["anchor"] == "probrandom"
    assert 0.5 ** (config.batch_size / config.ema_halflife_images) == pytest.approx(0.9999, abs=1e-8)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_diffusion_fits_its_autoencoder(name):
    autoencoder = build_autoencoder(autoencoder_of(name))
    config = load_config(DiffusionConfig, name)
    if config.data.fit is not None:  # its data set is always fitted so
        assert config.data.fit == load_config(AutoencoderConfig, autoencoder_of(name)).data.fit
    config = with_stage_1_images(config, autoencoder)
    images = load_config(AutoencoderConfig, autoencoder_of(name)).data
    unet = build_denoiser(name, autoencoder_of(name)).unet
    assert (config.data.path, config.data.resolution) == (images.path, images.resolution)
    assert unet.config.in_channels == unet.config.out_channels == autoencoder.quantize.vq_embed_dim
    assert unet.config.sample_size == config.data.resolution / autoencoder.downsampling_factor


@pytest.mark.parametrize("name", FULL_SIZE_DIFFUSIONS)
def test_full_size_unet_has_the_size_and_heads_of_ldm(name):
    parameters, levels, middle = FULL_SIZE_DIFFUSIONS[name]
    unet = build_denoiser(name, autoencoder_of(name)).unet
    assert millions(unet) == pytest.approx(parameters, abs=0.005)
    assert [heads_of(block) for block in unet.down_blocks] == levels
    assert [heads_of(block) for block in unet.up_blocks] == levels[::-1]
    assert heads_of(unet.mid_block) == middle


def test_imagenet_has_a_null_class_and_a_class_token():
    attending = build_denoiser("imagenet/diffusion", "imagenet/autoencoder_f8")
    adding = build_denoiser("imagenet/diffusion_class_embed", "imagenet/autoencoder_f8")
    assert attending.null_label == adding.null_label == 1000
    assert attending.class_embedding.embedding.weight.shape == (1001, 512)
    assert attending.unet.config.cross_attention_dim == 512
    assert attending.unet.config.num_class_embeds is None
    assert adding.class_embedding is None
    assert adding.unet.class_embedding.weight.shape == (1001, 1024)


def test_every_normalization_of_churches_is_there_and_a_compositional_first_stage_needs_no_other_config():
    """With scale-shift, diffusers leaves the norm of the middle attention out unless it is asked for."""
    unet = build_denoiser("lsun_churches/diffusion", "lsun_churches/autoencoder_m2").unet
    assert all(a.group_norm.num_groups == 32 for a in unet.modules() if isinstance(a, Attention))
    assert unet.config.in_channels == 8


@pytest.mark.parametrize("name", FULL_SIZE_DIFFUSIONS)
def test_full_size_diffusion_trains_as_ldm(name):
    rate, batch_size, steps, warmup_steps, beta_end, loss = LDM_TRAINING[name]
    config = load_config(DiffusionConfig, name)
    scheduler = make_scheduler(config.scheduler)
    assert config.optimizer.learning_rate == pytest.approx(rate)
    assert config.batch_size == batch_size
    assert config.total_images == steps * batch_size
    assert config.optimizer.warmup_images == warmup_steps * batch_size
    assert 0.5 ** (batch_size / config.ema_halflife_images) == pytest.approx(0.9999, abs=1e-8)
    assert config.loss == loss
    assert config.optimizer.schedule == "constant"
    assert config.optimizer.max_grad_norm == 0
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config.prediction_type == "epsilon"
    assert not scheduler.config.clip_sample
    # linspace in sqrt(beta); the last step ends at the alpha of timestep 0; timesteps 1, 6, 11, ...
    expected = torch.linspace(0.0015**0.5, beta_end**0.5, 1000, dtype=torch.float64).square()
    torch.testing.assert_close(scheduler.betas.double(), expected, rtol=1e-5, atol=0)
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0] < 1
    scheduler.set_timesteps(200)
    assert scheduler.timesteps.tolist() == list(range(996, 0, -5))


# FixedHeadsUNet2DModel ------------------------------------------------------------------------------------------------

SMALL = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 8,
}


@pytest.fixture
def small_unet() -> FixedHeadsUNet2DModel:
    torch.manual_seed(0)
    return FixedHeadsUNet2DModel(block_out_channels=(24, 48), num_attention_heads=8, **SMALL).eval()


def noisy_latents() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def predict(unet: UNet2DModel) -> torch.Tensor:
    return unet(noisy_latents(), 500).sample


@torch.no_grad()
def test_every_attention_is_split_into_the_given_number_of_heads(small_unet):
    attentions = [module for module in small_unet.modules() if isinstance(module, Attention)]
    assert {attention.inner_dim for attention in attentions} == {24, 48}

    for attention in attentions:
        channels = attention.inner_dim
        x = torch.randn(2, channels, 4, 4)
        tokens = attention.group_norm(x.flatten(2)).transpose(1, 2)  # (B, n, channels)
        heads = []
        for head in range(8):
            part = slice(head * channels // 8, (head + 1) * channels // 8)
            q, k, v = (f(tokens)[..., part] for f in (attention.to_q, attention.to_k, attention.to_v))
            heads.append(F.softmax(q @ k.transpose(1, 2) / (channels / 8) ** 0.5, dim=-1) @ v)
        expected = x + attention.to_out[0](torch.cat(heads, -1)).transpose(1, 2).reshape(x.shape)

        torch.testing.assert_close(attention(x), expected)
        attention.set_attention_slice(1)  # another processor of diffusers, with a scale of its own
        torch.testing.assert_close(attention(x), expected)


def test_is_unet2dmodel_where_that_can_say_the_same(small_unet):
    """Same keys and sizes; at one width the two ways to give the heads agree, and another number of heads does not."""
    plain = UNet2DModel(block_out_channels=(24, 48), attention_head_dim=24, **SMALL).eval()
    plain.load_state_dict(small_unet.state_dict())
    assert (predict(plain) - predict(small_unet)).abs().max() > 1e-5

    even = FixedHeadsUNet2DModel(block_out_channels=(32, 32), num_attention_heads=4, **SMALL).eval()
    plain = UNet2DModel(block_out_channels=(32, 32), attention_head_dim=8, **SMALL).eval()
    plain.load_state_dict(even.state_dict())
    assert torch.equal(predict(plain), predict(even))


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="num_attention_heads=7 must divide the 24 channels"):
        FixedHeadsUNet2DModel(block_out_channels=(24, 48), num_attention_heads=7, **SMALL)


def test_unet_comes_back_inside_a_pipeline(small_unet, tmp_path):
    LooCLDMPipeline(tiny_autoencoder(), small_unet, DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    loaded = LooCLDMPipeline.from_pretrained(tmp_path).unet
    assert type(loaded) is FixedHeadsUNet2DModel
    assert torch.equal(predict(loaded), predict(small_unet))
