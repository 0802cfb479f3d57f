"""`LooCVQModel` as its users meet it: images to latents, codes and back, a rate in bits, a folder to keep it in."""

import json
from functools import partial

import pytest
import torch

from looc_ldm import LooCVQModel
from tiny import tiny_autoencoder

tiny_model = partial(tiny_autoencoder, block_out_channels=(8, 16), latent_channels=6, interpolation_factor=2)

# diffusers' spatial norms have 32 groups whatever norm_num_groups is, and take latents of latent_channels channels.
NORM_TYPES = [
    pytest.param({"norm_type": "group"}, id="group"),
    pytest.param({"norm_type": "spatial", "block_out_channels": (32, 32), "latent_channels": 4}, id="spatial"),
]


SETTINGS = {
    "interpolation_factor": 3,
    "segment_layout": "patch",
    "distance": "euclidean",
    "commitment_weight": 0.5,
    "anchor": "probrandom",
    "usage_decay": 0.9,
    "codevector_dim": 9,
}


def images(batch: int = 2, height: int = 8, width: int = 12) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kwargs", NORM_TYPES)
def test_a_saved_model_comes_back_the_same(kwargs, tmp_path, diffusers_log):
    model = tiny_model(**SETTINGS, **kwargs).train()
    model(images())
    model.quantize.revive()
    model.eval().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "model.py",
    }

    loaded = LooCVQModel.from_pretrained(tmp_path)
    config = json.loads(model.to_json_string())
    assert json.loads(loaded.to_json_string()) == {**config, "_name_or_path": str(tmp_path)}
    assert {name: getattr(loaded.quantize, name) for name in SETTINGS} == SETTINGS
    assert torch.equal(loaded.quantize.usage, model.quantize.usage)
    assert model.quantize.usage.sum() > 0
    assert torch.equal(loaded(images()).sample, model(images()).sample)
    assert diffusers_log.text == ""


def test_latents_are_those_before_quantization():
    model, x = tiny_model(), images()
    latents = model.encode(x).latents
    assert latents.shape == (2, 4, 4, 6)
    assert torch.equal(latents, model.quant_conv(model.encoder(x)))
    assert torch.equal(model.encode(x, return_dict=False)[0], latents)


def test_decode_quantizes_unless_told_not_to():
    model = tiny_model()
    latents = model.encode(images()).latents
    quantized, loss, (perplexity, _, indices) = model.quantize(latents)
    decoded = model.decode(latents)
    assert torch.equal(decoded.sample, model.decode(quantized, force_not_quantize=True).sample)
    assert torch.equal(decoded.commit_loss, loss)
    assert torch.equal(decoded.perplexity, perplexity)
    assert torch.equal(decoded.indices, indices)

    raw = model.decode(latents, force_not_quantize=True)
    assert torch.equal(raw.sample, model.decoder(model.post_quant_conv(latents)))
    assert not torch.allclose(raw.sample, decoded.sample)
    assert raw.commit_loss == 0
    assert raw.indices is None
    assert raw.perplexity is None


@pytest.mark.parametrize("kwargs", NORM_TYPES)
def test_decoding_the_codes_is_the_reconstruction(kwargs):
    model, x = tiny_model(**kwargs), images()
    indices = model.encode_indices(x)
    assert indices.shape == (2, 4, 6, 8)
    assert indices.dtype == torch.int64
    reconstruction = model(x)
    assert reconstruction.sample.shape == x.shape
    assert torch.equal(indices, reconstruction.indices)
    assert torch.equal(model.decode_indices(indices).sample, reconstruction.sample)


@pytest.mark.parametrize(
    ("n_q", "k", "s", "blocks", "side", "bits"),  # d = 4; h * w * C * log2(K)
    [
        pytest.param(128, 256, 1, 3, 32, 16_384, id="CIFAR-10 256x4"),
        pytest.param(256, 256, 2, 5, 256, 8 * 256**2, id="f16 s=2"),
        pytest.param(256, 256, 1, 5, 256, 2 * 256**2, id="f16 s=1"),
        pytest.param(4, 1024, 2, 4, 256, 0.625 * 256**2, id="f8 K=1024"),
    ],
)
def test_bits_per_image_of_known_models(n_q, k, s, blocks, side, bits):
    model = tiny_autoencoder(
        blocks=blocks, vq_embed_dim=n_q, num_vq_embeddings=k, codevector_dim=4, interpolation_factor=s
    )
    assert model.bits_per_image(side, side) == bits


def test_sizes_that_do_not_divide_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="divisible by 2, got 8x13"):
        model.bits_per_image(8, 13)
    for shape in [(1, 3, 8, 13), (1, 3, 9, 12), (1, 1, 8, 12), (3, 8, 12)]:
        for encode in (model.encode, model.encode_indices, model):
            with pytest.raises(ValueError, match="divisible by 2, got"):
                encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="codevector_dim=3 does not divide"):
        tiny_model(codevector_dim=3)


def test_codevectors_have_all_latent_channels_unless_told_otherwise():
    assert tiny_model(codevector_dim=None).quantize.embedding.weight.shape == (16, 4)
    assert tiny_model(codevector_dim=None, vq_embed_dim=None).quantize.embedding.weight.shape == (16, 6)
