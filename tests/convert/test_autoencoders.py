"""Converted first stages compute what the networks they come from compute."""

import pytest
import torch
from torch import nn

import originals
from looc_ldm import LooCVQModel
from looc_ldm.convert import Settings, convert_autoencoder, kind_of, settings_of
from looc_ldm.models.small import LooCSmallVQModel
from looc_ldm.utils.errors import ModelError, UserError

LOOC = Settings(resolution=32, distance="cosine", interpolation_factor=2)


def assert_same(model, theirs, channels: int = 3, size: int = 16) -> None:
    """Equal latents of an image, and an equal image from different latents; in float64 except for the search."""
    torch.manual_seed(1)
    model.double()
    theirs.double()
    images = torch.rand(2, channels, size, size, dtype=torch.float64) * 2 - 1
    expected = theirs.encode(images.clone())
    assert (model.encode(images).latents - expected).abs().max() < 1e-5 * expected.abs().max().clamp_min(1)
    latents = torch.randn_like(expected)
    decoded = theirs.decode(latents)
    assert (model.decode(latents).sample - decoded).abs().max() < 1e-5 * decoded.abs().max().clamp_min(1)
    assert (theirs.decode(latents.roll(1, 0)) - decoded).abs().max() > 1e-3  # the image depends on them


# The small VQ-VAE -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_loocs_small_model(scale, distance):
    quantizer = originals.Codebook(32, 4, usage=True, distance="cos" if distance == "cosine" else "l2", scale=scale)
    small = originals.small_vqvae(quantizer)
    state = small.state_dict()
    assert kind_of(state) == "looc"
    settings = Settings(resolution=32, distance=distance, interpolation_factor=scale)
    model, _ = convert_autoencoder(state, "looc", settings)
    assert isinstance(model, LooCSmallVQModel)
    assert_same(model, small)
    assert torch.equal(model.quantize.usage, quantizer.embed_prob)


def test_cvqs_small_model():
    quantizer = originals.Codebook(32, 8, usage=True, distance="cos")
    small = originals.small_vqvae(quantizer, channels=1, layers=3, latent=8)
    assert kind_of(small.state_dict()) == "cvq"
    model, _ = convert_autoencoder(small.state_dict(), "cvq", Settings(resolution=28, distance="cosine"))
    assert model.config.layers_per_block == 3
    assert_same(model, small, channels=1)


def test_the_small_model_with_the_plain_quantizer_of_the_baselines():
    small = originals.small_vqvae(originals.Codebook(32, 16, usage=False))
    with pytest.raises(ModelError, match="choose --kind looc or --kind cvq"):
        kind_of(small.state_dict())
    model, _ = convert_autoencoder(small.state_dict(), "looc", Settings(resolution=32))
    assert_same(model, small)
    assert model.quantize.usage.sum() == pytest.approx(1)  # no codevector counts as unused


def test_a_codebook_narrower_than_the_latents_needs_the_use_of_codevectors():
    weights = originals.small_vqvae(originals.Codebook(32, 16, usage=False)).state_dict()
    weights["_vq_vae.embedding.weight"] = torch.zeros(32, 4)
    with pytest.raises(ModelError, match="the codebook has 4 channels and the latents have 16"):
        convert_autoencoder(weights, "looc", Settings(resolution=32))


@pytest.mark.parametrize(
    ("channels", "latent", "parameters"), [(1, 128, 740_609), (3, 128, 744_707), (1, 64, 658_625), (3, 64, 662_723)]
)
def test_the_small_model_has_the_papers_numbers_of_parameters(channels, latent, parameters):
    model = LooCSmallVQModel(channels, channels, vq_embed_dim=latent)
    codebook = model.quantize.embedding.weight.numel()
    assert sum(p.numel() for p in model.parameters()) - codebook == parameters
    small = originals.SmallVQVAE(channels, 128, 32, 2, latent, originals.Codebook(256, latent, usage=True))
    assert sum(p.numel() for p in small.parameters()) - codebook == parameters


def test_the_small_model_is_an_autoencoder_like_the_others(tmp_path):
    torch.manual_seed(0)
    model = LooCSmallVQModel(
        1, 1, 16, 8, vq_embed_dim=8, codevector_dim=4, num_vq_embeddings=16, interpolation_factor=1
    )
    images = torch.rand(2, 1, 28, 28)
    model.save_pretrained(tmp_path)
    again = LooCSmallVQModel.from_pretrained(tmp_path)
    assert isinstance(again, LooCVQModel)
    codes = again.eval().encode_indices(images)
    assert codes.shape == (2, 7, 7, 2)
    assert torch.equal(again.decode_indices(codes).sample, model.eval()(images).sample)
    assert again.bits_per_image(28, 28) == 7 * 7 * 2 * 4
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        again.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="divisible by 4"):
        again.encode(torch.rand(1, 1, 30, 30))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_channels": 15}, "even number, got 15"),
        ({"norm_type": "spatial"}, "spatial"),
        ({"latents_mean": [0.0]}, "latents_mean must be vq_embed_dim=128 finite numbers"),
        ({"vq_embed_dim": 4, "latents_std": [1.0, 1.0, 0.0, 1.0]}, "latents_std must be positive"),
    ],
)
def test_the_small_model_refuses_what_it_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        LooCSmallVQModel(**arguments)


# VQGAN ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("mid_attention", [True, False])
def test_tamings_vqgan(attention, mid_attention):
    vqgan = originals.vqgan(attention=attention, mid_attention=mid_attention)
    assert kind_of(vqgan.state_dict()) == "vqgan"
    model, updates = convert_autoencoder(vqgan.state_dict(), "vqgan", Settings(resolution=256))
    assert_same(model, vqgan)
    config = model.config
    assert (config.codevector_dim, config.interpolation_factor, config.distance) == (4, 1, "euclidean")
    assert (config.vq_embed_dim, config.latent_channels, config.sample_size) == (4, 8, 256)
    assert config.scaling_factor is None
    assert updates is None


@pytest.mark.parametrize(("scale", "channels"), [(1, 4), (1, 2), (2, 4), (2, 8)])
def test_a_vqgan_with_loocs_or_cvqs_quantizer(scale, channels):
    quantizer = originals.Codebook(64, channels, usage=True, distance="cos", scale=scale)
    vqgan = originals.vqgan(quantizer, layers=2)
    settings = Settings(resolution=256, distance="cosine", interpolation_factor=scale)
    model, _ = convert_autoencoder(vqgan.state_dict(), "vqgan", settings)
    assert_same(model, vqgan)
    assert torch.equal(model.quantize.usage, quantizer.embed_prob)


def test_loss_networks_are_left_out_and_averages_are_preferred():
    vqgan = originals.vqgan()
    live = {**vqgan.state_dict(), "loss.discriminator.main.0.weight": torch.ones(3)}
    averages = {f"model_ema.{key.replace('.', '')}": value * 1.01 + 0.01 for key, value in live.items()}
    state = {**live, **averages, "model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(7)}
    model, updates = convert_autoencoder(state, "vqgan", Settings(resolution=256), use_ema=False)
    assert updates is None
    assert_same(model, vqgan)
    model, updates = convert_autoencoder(state, "vqgan", Settings(resolution=256))
    assert updates == 7
    vqgan.load_state_dict({key: averages[f"model_ema.{key.replace('.', '')}"] for key in vqgan.state_dict()})
    assert_same(model, vqgan)


def test_the_vqgan_inside_a_taming_transformer():
    vqgan = originals.vqgan()
    state = {f"first_stage_model.{key}": value for key, value in vqgan.state_dict().items()}
    state["transformer.tok_emb.weight"] = torch.ones(2)
    assert kind_of(state) == "vqgan"
    model, _ = convert_autoencoder(state, "vqgan", Settings(resolution=256))
    assert_same(model, vqgan)
    with pytest.raises(ModelError, match=r"unexpected head\.weight and 0 more"):
        convert_autoencoder({**state, "head.weight": torch.ones(1)}, "vqgan", Settings(resolution=256))


def test_the_published_vqgans_fit_by_name_and_size():
    """The sizes of taming's configs/imagenet_vqgan.yaml and LDM's models/first_stage_models/vq-f8."""
    with torch.device("meta"):
        f16 = originals.VQGAN(128, (1, 1, 2, 2, 4), 2, (0, 0, 0, 0, 1), 256, 256, originals.Codebook(1024, 256, False))
        f8 = originals.VQGAN(128, (1, 2, 2, 4), 2, (0, 0, 0, 1), 4, 4, originals.Codebook(16384, 4, False))
    model, _ = convert_autoencoder(f16.state_dict(), "vqgan", Settings(resolution=256))
    assert sum(p.numel() for p in model.parameters()) == 72_141_699
    assert model.bits_per_image(256, 256) == 16 * 16 * 10
    model, _ = convert_autoencoder(f8.state_dict(), "vqgan", Settings(resolution=256))
    assert model.bits_per_image(256, 256) == 32 * 32 * 14


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> dict:
    return originals.small_vqvae().state_dict()


def test_missing_surplus_and_mis_shaped_weights_are_named_and_counted(small):
    small["extra.a"] = small["extra.b"] = small["extra.c"] = torch.ones(1)
    del small["_decoder._conv_1.bias"], small["_encoder._conv_2.bias"]
    small["_encoder._conv_3.bias"] = torch.ones(5)
    with pytest.raises(ModelError) as caught:
        convert_autoencoder(small, "looc", LOOC)
    message = str(caught.value)
    assert "missing encoder.conv_down.bias and 1 more" in message
    assert "unexpected extra.a and 2 more" in message
    assert "mis-shaped: _encoder._conv_3.bias is (5,) instead of (16,)" in message


def test_what_weights_do_not_show_is_asked_for_at_once(small):
    with pytest.raises(UserError, match="--distance, --interpolation-factor, --resolution, or --original-config"):
        convert_autoencoder(small, "looc", Settings())
    with pytest.raises(UserError, match="give --distance, --resolution, or"):  # CVQ-VAE does not interpolate
        convert_autoencoder(small, "cvq", Settings())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantize.embed.weight": torch.ones(4, 4)}, "Gumbel"),
        ({"quantize.embedding.weight": None}, "it may be a KL autoencoder, which cannot be converted"),
        ({"quantize.embedding.weight": torch.ones(64, 2)}, "the codebook has 2 channels and the latents have 4"),
        ({"encoder.conv_out.weight": None}, r"missing encoder\.conv_out\.weight and 0 more"),
    ],
)
def test_autoencoders_of_other_kinds_are_refused(change, message):
    vqgan = originals.vqgan()
    state = {key: value for key, value in {**vqgan.state_dict(), **change}.items() if value is not None}
    with pytest.raises(ModelError, match=message):
        convert_autoencoder(state, "vqgan", Settings(resolution=256))


def test_unknown_weights_are_of_no_kind():
    with pytest.raises(ModelError, match=r"its first weight is 'fc\.weight'"):
        kind_of(nn.ModuleDict({"fc": nn.Linear(1, 1)}).state_dict())


# The config file ------------------------------------------------------------------------------------------------------

LOOC_CONFIG = {
    "dataset": "cifar10",
    "shuffle_scale": 0,
    "distance": "l2",
    "split_type": "fixed",
    "anchor": "random",
    "hidden_size": 16,
}


def test_loocs_config_says_what_the_weights_do_not_show():
    quantizer = originals.Codebook(32, 4, usage=True, distance="l2")
    small = originals.small_vqvae(quantizer)
    model, _ = convert_autoencoder(small.state_dict(), "looc", settings_of(LOOC_CONFIG, "looc"))
    assert_same(model, small)
    config = model.config
    assert (config.interpolation_factor, config.anchor, config.sample_size) == (1, "random", 32)
    assert settings_of({**LOOC_CONFIG, "shuffle_scale": 2}, "looc").interpolation_factor == 2


def test_flags_win_over_the_config():
    settings = settings_of(LOOC_CONFIG, "looc").overridden_by(Settings(distance="cosine", resolution=64))
    assert (settings.distance, settings.resolution, settings.interpolation_factor) == ("cosine", 64, 1)
    assert settings.architecture == {"hidden_size": 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split_type": "random"}, "split_type 'random' is not supported"),
        ({"dataset": "imagenet"}, r"do not take images in \[-1, 1\]"),
        ({"distance": "dot"}, "distance must be one of cos, l2, got 'dot'"),
        ({"hidden_size": 128}, "it says hidden_size 128, the weights 16"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(small, change, message):
    with pytest.raises(UserError, match=message):
        convert_autoencoder(small, "looc", settings_of({**LOOC_CONFIG, **change}, "looc"))


def test_tamings_config_gives_the_resolution_and_is_compared():
    vqgan = originals.vqgan()
    network = {"resolution": 128, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 8}
    config = {"model": {"params": {"embed_dim": 4, "n_embed": 64, "ddconfig": network}}}
    model, _ = convert_autoencoder(vqgan.state_dict(), "vqgan", settings_of(config, "vqgan"))
    assert model.config.sample_size == 128
    network["ch_mult"] = [1, 4]
    with pytest.raises(ModelError, match=r"it says ch_mult \(1, 4\), the weights \(1, 2\)"):
        convert_autoencoder(vqgan.state_dict(), "vqgan", settings_of(config, "vqgan"))
    with pytest.raises(UserError, match="has no mapping 'model'"):
        settings_of(LOOC_CONFIG, "vqgan")
