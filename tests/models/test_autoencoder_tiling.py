"""Slicing and tiling of `LooCVQModel` save memory and change nothing."""

import itertools

import pytest
import torch
import torch.nn as nn
from diffusers.hooks import apply_group_offloading
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from tqdm.auto import tqdm

from looc_ldm import LooCSmallVQModel, LooCVQModel
from tiny import tiny_autoencoder


def model_with(*, down: str = "ddd", up: str = "uuu", seed: int = 0, **kwargs) -> LooCVQModel:
    """f = 2 ** (blocks - 1); "a" in place of a letter for a block with attention. Norms are far from the identity."""
    settings = {
        "block_out_channels": (8, 16, 16)[-len(down) :],
        "down_block_types": ["AttnDownEncoderBlock2D" if block == "a" else "DownEncoderBlock2D" for block in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if block == "a" else "UpDecoderBlock2D" for block in up],
        "latent_channels": 6,
        "num_vq_embeddings": 64,
        "interpolation_factor": 2,
    }
    model = tiny_autoencoder(seed=seed, **{**settings, **kwargs})
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


SPATIAL = {"norm_type": "spatial", "block_out_channels": (32, 32, 64), "latent_channels": 4, "norm_num_groups": 8}


def uneven_images(batch: int, height: int, width: int) -> torch.Tensor:
    """Noise whose brightness and contrast grow from the upper left: no part has the statistics of the whole."""
    generator = torch.Generator().manual_seed(height + width)
    noise = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    ramp = torch.linspace(0.1, 1, height)[:, None] * torch.linspace(0.2, 1, width)
    return (noise * ramp + ramp - 0.5) * torch.linspace(0.5, 1, batch)[:, None, None, None]


def everything(model: LooCVQModel, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Results of all entries: decoding of the same latents and codes as long as these are the same."""
    latents = model.encode(x).latents
    decoded, forward = model.decode(latents), model(x)
    indices = model.encode_indices(x)
    return {
        "latents": latents,
        "raw": model.decode(latents, force_not_quantize=True).sample,
        "indices": indices,
        "decode_indices": model.decode_indices(indices).sample,
        **{f"decode {name}": value for name, value in decoded.items()},
        **{f"forward {name}": value for name, value in forward.items()},
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance if value.is_floating_point() else 0)


SLICES, TILES = 1e-5, 3e-5  # float32's rounding, summed in another order


@pytest.fixture(autouse=True)
def without_gradient():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kwargs", [{}, SPATIAL], ids=["group", "spatial"])
def test_slicing_changes_nothing_but_how_many_images_are_in_the_networks(kwargs):
    model, x = model_with(**kwargs), uneven_images(3, 16, 24)
    expected = everything(model, x)
    batches = set()
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda _, args: batches.add(len(args[0])))
    model.enable_slicing()
    assert_same(everything(model, x), expected, SLICES)
    assert batches == {1}
    model.disable_slicing()
    model(x)
    assert batches == {1, 3}


ARCHITECTURES = {
    "f = 4": {},
    "f = 2": {"down": "dd", "up": "uu"},
    # Few codevectors: among tens of thousands of segments none is to be so near a tie that rounding decides.
    "no tiles at f = 1": {"down": "d", "up": "u", "num_vq_embeddings": 8},
    "deeper": {"layers_per_block": 2},
    "attention at latent resolution": {"down": "dda", "up": "auu"},
    "attention above it": {"down": "dad", "up": "uau"},
    "attention everywhere": {"down": "aaa", "up": "aaa"},
    "without attention": {"mid_block_add_attention": False},
    "spatial": SPATIAL,
    "spatial with attention": {**SPATIAL, "down": "dad", "up": "uau"},
}


@pytest.mark.parametrize("kwargs", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_tiles_give_what_the_whole_image_gives(kwargs):
    model, x = model_with(**kwargs), uneven_images(2, 48, 40)
    expected = everything(model, x)
    model.enable_tiling(16)
    found = everything(model, x)
    assert_same(found, expected, TILES)
    if kwargs not in (ARCHITECTURES["no tiles at f = 1"], ARCHITECTURES["attention everywhere"]):
        assert not torch.equal(found["raw"], expected["raw"])  # it did run in tiles
    model.enable_slicing()
    assert_same(everything(model, x), expected, TILES)


@pytest.mark.parametrize(("height", "width", "tile"), [(16, 100, 16), (100, 8, 16), (60, 52, 12), (36, 36, 34)])
def test_tiles_need_not_divide_the_image(height, width, tile):
    model, x = model_with(), uneven_images(1, height, width)
    expected = everything(model, x)
    model.enable_tiling(tile)
    assert_same(everything(model, x), expected, TILES)


def test_in_bfloat16_tiles_are_as_near_to_float32_as_the_whole_image_is():
    x = uneven_images(1, 64, 64)
    latents = model_with().encode(x).latents
    exact = model_with().decode(latents).sample
    model = model_with().bfloat16()
    whole = model.decode(latents.bfloat16(), force_not_quantize=False).sample
    model.enable_tiling(32)
    tiled = model.decode(latents.bfloat16()).sample
    assert tiled.dtype == torch.bfloat16
    assert (tiled - exact).abs().mean() < 1.5 * (whole - exact).abs().mean()


def test_images_up_to_the_size_of_a_tile_are_not_cut():
    model, x = model_with(), uneven_images(1, 16, 16)
    assert not model.use_tiling
    assert model.tile_sample_min_size == 128
    expected = model(x).sample
    model.enable_tiling(16)
    assert torch.equal(model(x).sample, expected)
    model.enable_tiling()
    assert model.tile_sample_min_size == 16
    model.disable_tiling()
    wide = uneven_images(1, 16, 32)
    expected = model(wide).sample
    model.enable_tiling()
    assert not torch.equal(model(wide).sample, expected)


@pytest.mark.parametrize("size", [0, -16, 15])
def test_a_tile_has_a_positive_even_side(size):
    model = model_with()
    with pytest.raises(ValueError, match=f"positive even number, got {size}"):
        model.enable_tiling(size)
    assert not model.use_tiling


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that operators have made and that still live, and their peak."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.storages[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self.storages.values()))
        return result


@pytest.mark.parametrize("kwargs", [{}, SPATIAL], ids=["group", "spatial"])
def test_tiles_need_less_than_a_third_of_the_memory(kwargs):
    side = 256
    kwargs = {"latent_channels": 16, "block_out_channels": (32, 32, 32), **kwargs, "mid_block_add_attention": False}
    model, x = model_with(**kwargs), uneven_images(1, side, side)
    latents = torch.randn(1, 4, side // 4, side // 4)
    peaks = {}
    for tiling, (name, call) in itertools.product(
        (False, True), (("encode", lambda: model.encode(x)), ("decode", lambda: model.decode(latents)))
    ):
        model.enable_tiling(64) if tiling else model.disable_tiling()
        with LiveMemory() as memory:
            call()
        peaks[name, tiling] = memory.peak
    assert peaks["encode", True] < peaks["encode", False] / 3
    assert peaks["decode", True] < peaks["decode", False] / 3


def test_training_in_tiles_is_refused_since_they_carry_no_gradient():
    model, x = model_with(), uneven_images(1, 32, 32)
    model.enable_tiling(16)
    with torch.enable_grad():
        assert not model(x).sample.requires_grad
        model.train()
        with pytest.raises(RuntimeError, match="no gradient"):
            model(x)
        assert model(x[:, :, :16, :16]).sample.requires_grad
    assert model(x).sample.shape == x.shape


def test_what_offloads_whole_blocks_is_refused_instead_of_used_with_weights_elsewhere(tmp_path):
    model, x = model_with(), uneven_images(1, 32, 32)
    apply_group_offloading(
        model, onload_device="cpu", num_blocks_per_group=1, offload_type="block_level", offload_to_disk_path=tmp_path
    )
    model.enable_tiling(16)
    with pytest.raises(RuntimeError, match="leaf_level"):
        model(x)
    model.disable_tiling()
    assert model(x).sample.shape == x.shape


def test_a_model_with_other_networks_says_that_it_has_no_tiles():
    model = LooCSmallVQModel(hidden_channels=8, residual_channels=4, num_vq_embeddings=16, codevector_dim=4).eval()
    with pytest.raises(NotImplementedError, match="LooCSmallVQModel"):
        model.enable_tiling()
    x = uneven_images(2, 8, 8)
    expected = model(x).sample
    model.enable_slicing()
    torch.testing.assert_close(model(x).sample, expected, rtol=0, atol=1e-5)


def test_the_tiles_of_a_large_image_have_a_progress_bar(monkeypatch, capsys):
    monkeypatch.setattr("looc_ldm.models.tiling.tqdm", lambda *args, **settings: tqdm(*args, **settings | {"delay": 0}))
    model = model_with()
    model.enable_tiling()
    model.encode(uneven_images(1, 40, 600))
    assert "stage of 600x40" in capsys.readouterr().err


def test_a_trace_in_tiles_is_refused():
    model = tiny_autoencoder().requires_grad_(False)
    model.enable_tiling(8)
    with pytest.raises(RuntimeError, match=r"disable_tiling\(\)"):
        torch.jit.trace(lambda image: model(image).sample, (torch.rand(1, 3, 16, 16),))
