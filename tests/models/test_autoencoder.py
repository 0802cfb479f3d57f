"""`LooCVQModel` as its users meet it: images to latents, codes and back, a rate in bits, a folder to keep it in."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from diffusers import VQModel

from looc_ldm import LooCVQModel
from tiny import tiny_autoencoder

tiny_model = partial(tiny_autoencoder, block_out_channels=(8, 16), latent_channels=6, interpolation_factor=2)

# diffusers' spatial norms have 32 groups whatever norm_num_groups is, and take latents of latent_channels channels.
NORM_TYPES = [
    pytest.param({"norm_type": "group"}, id="group"),
    pytest.param({"norm_type": "spatial", "block_out_channels": (32, 32), "latent_channels": 4}, id="spatial"),
]


def images(batch: int = 2, height: int = 8, width: int = 12) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kwargs", NORM_TYPES)
def test_a_saved_model_comes_back_the_same(kwargs, tmp_path, diffusers_log):
    model = tiny_model(**kwargs).train()
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
    assert torch.equal(loaded.quantize.usage, model.quantize.usage)
    assert model.quantize.usage.sum() > 0
    assert torch.equal(loaded(images()).sample, model(images()).sample)
    assert diffusers_log.text == ""


def test_every_setting_of_the_quantizer_survives_a_round_trip(tmp_path):
    settings = {
        "interpolation_factor": 3,
        "segment_layout": "patch",
        "distance": "euclidean",
        "commitment_weight": 0.5,
        "anchor": "probrandom",
        "usage_decay": 0.9,
        "codevector_dim": 9,
    }
    tiny_model(**settings).save_pretrained(tmp_path)
    quantizer = LooCVQModel.from_pretrained(tmp_path).quantize
    assert {name: getattr(quantizer, name) for name in settings} == settings


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


def test_training_reaches_encoder_codebook_and_decoder():
    model, x = tiny_model(codebook_update="gradient").train(), images()
    output = model(x)
    ((output.sample - x).abs().mean() + output.commit_loss).backward()
    for parameter in (model.encoder.conv_in.weight, model.quantize.embedding.weight, model.decoder.conv_out.weight):
        assert parameter.grad.abs().max() > 0


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


@pytest.mark.parametrize("wrong", [-1, 16])
def test_codes_outside_the_codebook_are_refused(wrong):
    indices = torch.zeros(1, 4, 4, 8, dtype=torch.int64)
    indices[0, 1, 2, 3] = wrong
    with pytest.raises(ValueError, match=rf"\[0, 16\), got values from .*{wrong}"):
        tiny_model().decode_indices(indices)


def test_codevectors_have_all_latent_channels_unless_told_otherwise():
    assert tiny_model(codevector_dim=None).quantize.embedding.weight.shape == (16, 4)
    assert tiny_model(codevector_dim=None, vq_embed_dim=None).quantize.embedding.weight.shape == (16, 6)


@pytest.mark.parametrize("how", ["from_pretrained", "to"])
def test_in_bfloat16_the_quantizer_stays_float32(how, tmp_path):
    model = tiny_model()
    codebook = model.quantize.codebook.detach().clone()
    if how == "to":
        model.to(torch.bfloat16)
    else:
        model.save_pretrained(tmp_path)
        model = LooCVQModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert model.dtype == model.quant_conv.weight.dtype == model.decoder.conv_in.weight.dtype == torch.bfloat16
    assert model.quantize.usage.dtype == torch.float32
    assert torch.equal(model.quantize.codebook, codebook)

    x = images().bfloat16()
    reconstruction = model(x)
    assert reconstruction.sample.dtype == torch.bfloat16
    assert reconstruction.commit_loss.dtype == torch.float32
    assert torch.equal(model.decode_indices(model.encode_indices(x)).sample, reconstruction.sample)


@pytest.mark.parametrize(
    "changed", [{"num_vq_embeddings": 32}, {"codevector_dim": 4}, {"vq_embed_dim": 8}, {"block_out_channels": (8, 8)}]
)
def test_weights_of_another_architecture_are_refused(changed, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(ValueError, match="expected shape"):
        LooCVQModel.from_pretrained(tmp_path)


def test_a_pipeline_folder_gives_the_model_to_automodel_once_looc_ldm_is_imported(tmp_path):
    tiny_model().save_pretrained(tmp_path / "vqvae")
    index = {"_class_name": "LooCLDMPipeline", "vqvae": ["looc_ldm", "LooCVQModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    script = (
        "import looc_ldm; from diffusers import AutoModel;"
        f"print(type(AutoModel.from_pretrained({str(tmp_path)!r}, subfolder='vqvae')))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "<class 'looc_ldm.models.autoencoder.LooCVQModel'>", run.stderr
    assert run.stderr == ""


def test_code_written_for_vqmodel_can_use_it():
    model = tiny_model()
    assert isinstance(model, VQModel)
    assert model.config.latent_channels == model.decoder.conv_in.in_channels == 6
