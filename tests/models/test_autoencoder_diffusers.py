"""Requirements of diffusers on each of its own models, stated for `LooCVQModel`."""

import inspect
import json
from functools import partial

import accelerate
import diffusers
import pytest
import torch
from diffusers import VQModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from safetensors.torch import load_file, save_file

from looc_ldm import LooCVQModel
from looc_ldm.models.fingerprint import model_fingerprint
from looc_ldm.models.loading import load_autoencoder
from looc_ldm.models.scaling import scale_latents, unscale_latents
from looc_ldm.utils.errors import ModelError
from tiny import tiny_autoencoder

tiny_model = partial(
    tiny_autoencoder,
    down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    block_out_channels=(8, 16),
    latent_channels=6,
    interpolation_factor=2,
)


def images(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, 8, 12, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def everything(model: LooCVQModel, x: torch.Tensor) -> list[torch.Tensor]:
    """Results of each public entry. Each is called first once, so that none relies on weights another has loaded."""
    z = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(1)).to(x)
    indices = torch.randint(16, (2, 4, 6, 8), generator=torch.Generator().manual_seed(2))
    decoded = model.decode(z)
    return [
        model.encode(x).latents,
        model.encode_indices(x),
        model.decode_indices(indices).sample,
        model(x).sample,
        model.decode(z, force_not_quantize=True).sample,
        *(decoded[name] for name in ("sample", "commit_loss", "indices", "perplexity")),
    ]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# Saving and loading


@pytest.mark.parametrize("variant", ["fp16", "ema"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"], ids=["one file", "shards"])
def test_each_variant_comes_back_as_it_was_saved(variant, max_shard_size, tmp_path):
    plain, other = tiny_model(), tiny_model(seed=1)
    other.quantize.usage.uniform_()
    plain.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    other.save_pretrained(tmp_path, variant=variant, max_shard_size=max_shard_size)
    names = {path.name for path in tmp_path.iterdir()}
    if max_shard_size == "10GB":
        assert {f"diffusion_pytorch_model{part}.safetensors" for part in ("", f".{variant}")} < names
    else:
        assert f"diffusion_pytorch_model.safetensors.index.{variant}.json" in names
        assert sum(name.endswith(".safetensors") and f".{variant}" in name for name in names) > 1
    for model, wanted in ((plain, None), (other, variant)):
        loaded = LooCVQModel.from_pretrained(tmp_path, variant=wanted)
        assert_equal(list(loaded.state_dict().values()), list(model.state_dict().values()))
    with pytest.raises(OSError, match="bf16"):
        LooCVQModel.from_pretrained(tmp_path, variant="bf16")


@pytest.mark.parametrize(
    ("keyword", "dtype", "max_shard_size"),
    [
        ("dtype", torch.float16, "10GB"),
        ("dtype", torch.bfloat16, "20KB"),
        ("torch_dtype", torch.bfloat16, "10GB"),
        ("torch_dtype", torch.float32, "20KB"),
    ],
)
def test_weights_are_loaded_in_the_dtype_asked_for_and_the_quantizer_in_float32(
    keyword, dtype, max_shard_size, tmp_path
):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded = LooCVQModel.from_pretrained(tmp_path, **{keyword: dtype})
    assert loaded.dtype == dtype
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == (torch.float32 if name.startswith("quantize.") else dtype), name
    assert torch.equal(loaded.quantize.codebook, model.quantize.codebook)


def test_a_model_saved_in_half_precision_keeps_its_codebook(tmp_path):
    model = tiny_model()
    codebook = model.quantize.codebook.detach().clone()
    model.half().save_pretrained(tmp_path, variant="fp16")
    loaded = LooCVQModel.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert torch.equal(loaded.quantize.codebook, codebook)
    x = images().half()
    assert_equal(everything(loaded, x), everything(model, x))


# Outputs


def test_a_stored_config_with_withdrawn_arguments_loads_without_a_warning(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(diffusers.configuration_utils.logger, "warning", warnings.append)
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "contrastive_weight": 0.0, "revive_first_batch_only": False}))
    model = LooCVQModel.from_pretrained(tmp_path)
    assert not warnings
    model.save_pretrained(tmp_path)
    assert json.loads(file.read_text()).keys() == config.keys() | {"_name_or_path"}
    assert model_fingerprint(model) == model_fingerprint(tiny_model())


def test_signatures_and_outputs_are_those_of_vqmodel():
    for name in ("forward", "encode", "decode"):
        own, theirs = (inspect.signature(getattr(kind, name)).parameters for kind in (LooCVQModel, VQModel))
        assert [(p.name, p.default) for p in own.values()] == [(p.name, p.default) for p in theirs.values()]
    model, x = tiny_model(), images()
    plain = VQModel.from_config(model.config).eval()
    for own, theirs in ((model.encode, plain.encode), (model, plain), (lambda *a, **k: model.decode(*a, **k), None)):
        given = x if theirs is not None else model.encode(x).latents
        theirs = plain.decode if theirs is None else theirs
        as_dict, as_tuple = own(given), own(given, return_dict=False)
        expected = theirs(given, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert [part.shape for part in as_tuple] == [part.shape for part in expected]
        assert_equal(list(as_tuple), list(as_dict.to_tuple()[: len(expected)]))


def test_scaling_survives_saving_and_undoes_itself(tmp_path):
    model = tiny_model(latents_mean=[0.1, -0.2, 0.3, 0], latents_std=[0.5, 1, 2, 4], scaling_factor=0.75)
    model.save_pretrained(tmp_path)
    loaded = LooCVQModel.from_pretrained(tmp_path)
    assert list(loaded.config.latents_mean) == [0.1, -0.2, 0.3, 0]
    assert list(loaded.config.latents_std) == [0.5, 1, 2, 4]
    assert loaded.config.scaling_factor == 0.75
    z = loaded.encode(images()).latents
    scaled = scale_latents(loaded, z)
    torch.testing.assert_close(scaled[:, 2], (z[:, 2] - 0.3) / 2 * 0.75)
    torch.testing.assert_close(unscale_latents(loaded, scaled), z)
    tiny_model(scaling_factor=None).save_pretrained(tmp_path)
    unmeasured = LooCVQModel.from_pretrained(tmp_path).config
    assert unmeasured.scaling_factor is unmeasured.latents_mean is unmeasured.latents_std is None


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
@pytest.mark.parametrize("values", [[1.0] * 3, [1.0] * 5, [1.0, 1.0, 1.0, float("nan")], []])
def test_one_finite_mean_and_deviation_a_channel(name, values):
    with pytest.raises(ValueError, match=f"{name} must be vq_embed_dim=4 finite numbers"):
        tiny_model(**{name: values})


@pytest.mark.parametrize("wrong", [0.0, -1.0])
def test_deviations_are_positive(wrong):
    with pytest.raises(ValueError, match=f"latents_std must be positive, got .*{wrong}"):
        tiny_model(latents_std=[1.0, 1.0, wrong, 1.0])


# Training


def test_a_plain_vqmodel_becomes_a_model_that_quantizes_as_it_did(tmp_path, caplog):
    torch.manual_seed(0)
    plain = VQModel(block_out_channels=(8,), norm_num_groups=4, vq_embed_dim=4, num_vq_embeddings=16).eval()
    torch.nn.init.normal_(plain.quantize.embedding.weight)
    plain.save_pretrained(tmp_path)
    as_dict = {name: value for name, value in plain.config.items() if not name.startswith("_")}
    made = [LooCVQModel.from_config(config).eval() for config in (plain.config, as_dict)]
    for model in made:
        model.load_state_dict(plain.state_dict(), strict=False)
    diffusers.utils.logging.enable_propagation()
    loaded = [LooCVQModel.from_pretrained(tmp_path), load_autoencoder(str(tmp_path))]
    diffusers.utils.logging.disable_propagation()
    assert "newly initialized" not in caplog.text
    assert loaded[0].quantize.usage.min() > 0
    for model in (*loaded, *made):
        assert model.config.scaling_factor is None  # 0.18215 was never measured
        assert model.config.interpolation_factor == 1
        assert model.config.distance == "euclidean"
        assert model.quantize.codes_per_position == 1
        with torch.no_grad():
            torch.testing.assert_close(model(images()).sample, plain(images()).sample)
    assert LooCVQModel.from_config({"vq_embed_dim": 4}).config.interpolation_factor == 2
    with pytest.raises(ValueError, match=r"0\.18215 is the default of VQModel.*from_config\(vq\.config\)"):
        LooCVQModel(**plain.config)
    assert LooCVQModel.from_config(plain.config, interpolation_factor=2).config.interpolation_factor == 2


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_prefix_that_a_wrapper_left_in_the_weights_is_named(prefix, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({prefix + name: value for name, value in load_file(file).items()}, file, {"format": "pt"})
    for load in (LooCVQModel.from_pretrained, lambda folder: load_autoencoder(str(folder))):
        with pytest.raises(ModelError, match=f"begin with '{prefix}'"):
            load(tmp_path)


def gradients_of_a_step(model: LooCVQModel, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything that a training step leaves behind."""
    model.train()
    output = model(x)
    ((output.sample - x).square().mean() + output.commit_loss).backward()
    model.quantize.revive()
    return {
        **{name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None},
        "loss": output.commit_loss.detach(),
        "codebook": model.quantize.codebook.detach(),
        "usage": model.quantize.usage,
    }


@pytest.mark.parametrize("kwargs", [{}, {"codebook_update": "gradient", "anchor": "probrandom"}], ids=["ema", "grad"])
def test_gradient_checkpointing_changes_neither_gradients_nor_codebook(kwargs):
    plain, checkpointed = tiny_model(**kwargs), tiny_model(**kwargs)
    assert not checkpointed.is_gradient_checkpointing
    checkpointed.enable_gradient_checkpointing()
    assert checkpointed.is_gradient_checkpointing
    calls = {"mid": 0, "quantize": 0}
    checkpointed.decoder.mid_block.register_forward_pre_hook(lambda *_: calls.update(mid=calls["mid"] + 1))
    checkpointed.quantize.register_forward_pre_hook(lambda *_: calls.update(quantize=calls["quantize"] + 1))
    plain.quantize.revive()
    checkpointed.quantize.revive()
    for step in range(2):
        torch.manual_seed(step)  # for anchors that are drawn
        expected = gradients_of_a_step(plain, images(seed=step))
        torch.manual_seed(step)
        found = gradients_of_a_step(checkpointed, images(seed=step))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
    assert calls == {"mid": 4, "quantize": 2}  # blocks run again in backward, the quantizer does not
    assert plain.quantize.usage.sum() > 0
    checkpointed.disable_gradient_checkpointing()
    assert not checkpointed.is_gradient_checkpointing


def test_every_weight_that_learns_by_gradient_gets_one():
    model = tiny_model(codebook_update="gradient")
    found = gradients_of_a_step(model, images())
    for name, parameter in model.named_parameters():
        assert name in found, name
        assert parameter.grad.isfinite().all(), name


# Memory


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_layerwise_casting_stores_less_and_leaves_the_quantizer_alone(storage, compute):
    model = tiny_model().to(compute)
    z = torch.randn(2, 4, 4, 6).to(compute)
    with torch.no_grad():
        expected_image = model.decode(z).sample
        expected = model.quantize(z)
    codebook = model.quantize.codebook.detach().clone()
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
    for name in ("encoder.conv_in", "quant_conv", "post_quant_conv", "decoder.mid_block.attentions.0.to_q"):
        assert model.get_submodule(name).weight.dtype == storage, name
    with torch.no_grad():
        decoded, again = model.decode(z), model(images().to(compute))
        assert torch.equal(model.quantize(z)[0], expected[0])
    assert torch.equal(decoded.indices, expected[2][2])
    assert torch.equal(decoded.commit_loss, expected[1])
    assert model.quantize.embedding.weight.dtype == model.quantize.usage.dtype == torch.float32
    assert torch.equal(model.quantize.codebook, codebook)
    assert decoded.sample.dtype == again.sample.dtype == compute
    assert (decoded.sample - expected_image).abs().mean() < 0.2 * expected_image.abs().mean()
    assert model.get_submodule("encoder.conv_in").weight.dtype == storage  # again, afterwards


def forget_what_is_not_loaded(model: LooCVQModel) -> None:
    """Weights that are offloaded to disk leave memory behind that nobody may read."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(torch.nan)


@pytest.mark.parametrize(
    ("entry", "offload_type"),
    [
        ("encode", "block_level"),
        ("decode", "leaf_level"),
        ("encode_indices", "leaf_level"),
        ("decode_indices", "block_level"),
        ("forward", "block_level"),
    ],
)
def test_group_offloading_loads_what_each_entry_needs(offload_type, entry, tmp_path):
    model, x = tiny_model(), images()
    given = {"decode": torch.randn(2, 4, 4, 6), "decode_indices": torch.randint(16, (2, 4, 6, 8))}.get(entry, x)
    with torch.no_grad():
        expected = getattr(model, entry)(given)
        model.enable_group_offload(
            torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
        )
        forget_what_is_not_loaded(model)
        for _ in range(2):
            found = getattr(model, entry)(given)
            if entry == "encode_indices":
                assert torch.equal(found, expected)
            else:
                assert torch.equal(found[0], expected[0])
    if entry.startswith("encode"):
        assert model.decoder.conv_in.weight.isnan().all()


def test_tiles_load_layers_that_are_offloaded_one_by_one(tmp_path):
    model, x = tiny_model(), images()
    with torch.no_grad():
        expected = model(x).sample
        model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
        forget_what_is_not_loaded(model)
        model.enable_tiling(4)
        torch.testing.assert_close(model(x).sample, expected, rtol=0, atol=1e-5)


def test_each_entry_brings_a_model_of_a_pipeline_to_the_device():
    x = images()
    entries = {
        "encode": x,
        "decode": torch.randn(2, 4, 4, 6),
        "encode_indices": x,
        "decode_indices": torch.randint(16, (2, 4, 6, 8)),
        "forward": x,
    }
    for entry, given in entries.items():
        model = tiny_model()
        hook = accelerate.hooks.CpuOffload("cpu")
        moved = []
        hook.pre_forward = lambda module, *args, moved=moved, **kwargs: (moved.append(module), (args, kwargs))[1]
        accelerate.hooks.add_hook_to_module(model, hook)
        (model if entry == "forward" else getattr(model, entry))(given)
        assert model in moved, entry


@pytest.mark.parametrize("tiling", [False, True])
def test_sequential_offloading_loads_the_codebook_too(tiling):
    model, x = tiny_model(), images()
    expected = everything(model, x)
    accelerate.cpu_offload(model, "cpu")
    assert model.quantize.embedding.weight.device.type == "meta"
    if tiling:
        model.enable_tiling(4)
    for found, wanted in zip(everything(model, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 if tiling else 0)


PARTS = ("encoder", "quant_conv", "quantize", "post_quant_conv", "decoder")


@pytest.mark.parametrize(
    ("device_map", "max_shard_size"),
    [("auto", "20KB"), ({"": "cpu"}, "10GB"), ({**dict.fromkeys(PARTS, "disk"), "encoder": "cpu"}, "20KB")],
    ids=["auto", "all", "disk"],
)
def test_a_device_map_places_the_parts(device_map, max_shard_size, tmp_path):
    model, x = tiny_model(), images()
    model.save_pretrained(tmp_path / "model", max_shard_size=max_shard_size)
    loaded = LooCVQModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert loaded.hf_device_map
    if isinstance(device_map, dict) and "decoder" in device_map:
        assert loaded.quantize.embedding.weight.device.type == "meta"
    assert_equal(everything(loaded, x), everything(model, x))


# Attention


def test_the_plain_attention_processor_is_set_everywhere_and_computes_the_same():
    model, x = tiny_model(), images()
    expected = model(x).sample
    assert all(type(processor) is AttnProcessor2_0 for processor in model.attn_processors.values())
    model.set_default_attn_processor()
    assert all(type(processor) is AttnProcessor for processor in model.attn_processors.values())
    torch.testing.assert_close(model(x).sample, expected, rtol=0, atol=1e-5)
