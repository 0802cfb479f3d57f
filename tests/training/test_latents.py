"""Latents are what the encoder gives, encoded once, and stage 2's randomness belongs to positions of its stream."""

import json
import os
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from looc_ldm import LooCVQModel
from looc_ldm.images.config import DataConfig
from looc_ldm.images.image_set import Report
from looc_ldm.images.pixels import to_float
from looc_ldm.training.data import ImageStream, OnlineLatentStream, StreamBatches, load_image_sets, stream_loader
from looc_ldm.training.latent_encoding import divide
from looc_ldm.training.latents import (
    LatentCache,
    LatentStream,
    cache_latents,
    measure_scaling_factor,
)
from looc_ldm.utils.errors import ConfigError

CLASS_DROPOUT = 0.1
HALF = 2e-3  # latents of up to 4 in size are stored in half precision
SHARD_BYTES = 10 * 2 * 2 * 4 * 16 * 16  # ten images and their mirror images


@pytest.fixture
def cache(model, images, accelerator, tmp_path) -> LatentCache:
    """In seven shards, the last with four images."""
    return cache_latents(model, images, tmp_path / "latents", accelerator, shard_bytes=SHARD_BYTES)


@pytest.fixture
def scaled_by(model):
    """The model with another scaling factor."""

    def make(factor: float) -> LooCVQModel:
        model.register_to_config(scaling_factor=factor)
        return model

    return make


@torch.no_grad()
def encoded(model, images, index: int, flip: bool = False) -> torch.Tensor:
    image = to_float(images[index][0])
    return model.encode((image.flip(-1) if flip else image)[None]).latents[0]


def everything(cache: LatentCache) -> torch.Tensor:
    """Latents of all images, then of all mirrored images, `(2 n, c, h, w)` in float64."""
    return torch.stack([cache.read(i, flip)[0] for flip in (False, True) for i in range(len(cache))]).double()


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# Cached latents ---------------------------------------------------------------------------------------------------


def test_cached_latents_are_the_encoders_output_of_each_image_and_of_its_mirror_image(cache, model, images):
    assert (len(cache), cache.shape) == (64, (4, 16, 16))
    for index in (0, 9, 10, 17, 63):
        for flip in (False, True):
            latents, _ = cache.read(index, flip)
            torch.testing.assert_close(latents.float(), encoded(model, images, index, flip), rtol=0, atol=HALF)
    straight, flipped = everything(cache).chunk(2)
    assert (straight - flipped).abs().max() > 0.01


def test_labels_classes_and_places_in_the_data_set_go_with_the_latents(cache, images):
    assert [cache.read(index)[1] for index in range(64)] == images.labels().tolist()
    indices = [i for shard in sorted(cache.folder.glob("latents-*")) for i in load_file(shard)["indices"].tolist()]
    assert indices == list(range(64))
    assert json.loads((cache.folder / "description.json").read_text())["classes"] == images.classes


def test_shards_hold_the_tensors_that_they_are_documented_to_hold(cache):
    assert names(cache.folder) == ["description.json", *(f"latents-{i:05d}-of-00007.safetensors" for i in range(7))]
    last = load_file(cache.folder / "latents-00006-of-00007.safetensors")
    kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in last.items()}
    rows, latents = ((4,), torch.int64), ((4, 4, 16, 16), torch.float16)
    assert kinds == {"indices": rows, "labels": rows, "latents": latents, "flipped": latents}


@pytest.mark.parametrize(("images", "shards", "largest"), [(64, 1, 64), (70_000, 65, 1093), (1_281_167, 157, 8192)])
def test_shards_have_at_most_64_mib_and_those_of_small_data_sets_are_smaller(images, shards, largest):
    spans = [span for _, span in divide(Path("latents"), images, image_bytes=2 * 4 * 32 * 32)]
    assert len(spans) == shards
    assert [i for span in spans for i in span] == list(range(images))
    assert max(map(len, spans)) == largest <= 64 * 2**20 / (2 * 4 * 32 * 32)


def test_without_flips_no_mirror_images_are_encoded(model, small_data, accelerator, tmp_path):
    images, _ = load_image_sets(replace(small_data, flip=False), channels=1)
    cache = cache_latents(model, images, tmp_path, accelerator)
    assert not cache.flipped
    assert "flipped" not in load_file(tmp_path / "latents-00000-of-00001.safetensors")


def test_an_encoder_whose_output_is_channels_last_is_cached_all_the_same(model, images, accelerator, tmp_path):
    """safetensors refuses tensors that are not contiguous."""
    encode = model._encode
    model._encode = lambda x: encode(x).contiguous(memory_format=torch.channels_last)
    cache = cache_latents(model, images, tmp_path, accelerator)
    torch.testing.assert_close(cache.read(5, False)[0].float(), encoded(model, images, 5), atol=1e-2, rtol=0)


def test_mean_and_standard_deviation_are_those_of_all_cached_latents(cache):
    latents, moments = everything(cache), cache.moments
    assert moments.standard_deviation == pytest.approx(latents.std(correction=0).item(), rel=1e-9)
    assert moments.channel_mean == pytest.approx(latents.mean((0, 2, 3)).tolist(), rel=1e-9)
    assert moments.channel_std == pytest.approx(latents.std((0, 2, 3), correction=0).tolist(), rel=1e-9)
    assert moments.count == 2 * 64 * 16 * 16


def test_the_scaling_factor_is_one_over_the_standard_deviation(model, images):
    pixels = torch.stack([to_float(images[i][0]) for i in range(10)])
    with torch.no_grad():
        expected = 1 / model.encode(pixels).latents.double().std(correction=0)
    assert measure_scaling_factor(model, pixels.split(4)) == pytest.approx(expected.item(), rel=1e-6)


# Latents that are read again, and stale ones ----------------------------------------------------------------------


@pytest.fixture
def own_data(garments, tmp_path) -> DataConfig:
    """All 80 garments in a folder of the test's own."""
    for file in garments.rglob("*.png"):
        copied = tmp_path / "own" / file.relative_to(garments)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(file.read_bytes())
    return DataConfig(path=str(tmp_path / "own"), validation_images=1, resolution=32, fit="pad", num_workers=0)


def test_the_same_model_and_data_are_not_encoded_again(cache, model, images, accelerator, monkeypatch):
    def refuse(*args):
        raise AssertionError("encoded again")

    monkeypatch.setattr(model, "encode", refuse)
    again = cache_latents(model, images, cache.folder, accelerator)
    assert torch.equal(everything(again), everything(cache))


def test_other_weights_of_the_encoder_are_refused_and_the_latents_kept(cache, model, images, accelerator):
    before = everything(cache)
    with torch.no_grad():
        model.quant_conv.bias.add_(1)
    with pytest.raises(ConfigError, match=r"holds latents of a different autoencoder \(encoder weights\); delete it"):
        cache_latents(model, images, cache.folder, accelerator)
    assert torch.equal(everything(LatentCache(cache.folder)), before)


@pytest.mark.parametrize(("setting", "value"), [("act_fn", "relu"), ("norm_num_groups", 1)])
def test_settings_of_the_encoder_that_leave_its_weights_as_they_are_make_another_one(
    cache, model, images, accelerator, setting, value
):
    assert model.config[setting] != value
    model.register_to_config(**{setting: value})
    with pytest.raises(ConfigError, match=rf"a different autoencoder \({setting}: \w+ -> {value}\)"):
        cache_latents(model, images, cache.folder, accelerator)


def test_another_codebook_leaves_the_latents_valid(cache, model, images, accelerator):
    description = (cache.folder / "description.json").stat().st_mtime_ns
    with torch.no_grad():
        model.quantize.embedding.weight.add_(1)
    model.register_to_config(scaling_factor=3.0)
    cache_latents(model, images, cache.folder, accelerator)
    assert (cache.folder / "description.json").stat().st_mtime_ns == description


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fit": "crop"}, r"a different transform \(fit: pad -> crop\)"),
        ({"flip": False}, r"a different transform \(flip: True -> False\)"),
        ({"resolution": 64}, r"a different transform \(resolution: 32 -> 64\)"),
        ({"validation_images": 15}, r"a different data set \(labels, number of images: 64 -> 65, stored images\)"),
    ],
)
def test_latents_of_another_transform_or_data_are_refused_and_the_message_says_what_differs(
    cache, model, small_data, accelerator, changes, message
):
    images, _ = load_image_sets(replace(small_data, **changes), channels=1)
    with pytest.raises(ConfigError, match=f"holds latents of {message}; delete it"):
        cache_latents(model, images, cache.folder, accelerator)


@pytest.mark.parametrize("changed", ["stored images", "names of classes"])
def test_a_data_set_with_other_pixels_or_another_name_for_a_class_is_another_one(
    changed, own_data, model, accelerator, tmp_path
):
    images, _ = load_image_sets(own_data, channels=1)
    cache_latents(model, images, tmp_path / "latents", accelerator)
    one, other = sorted(Path(own_data.path).rglob("*.png"))[10:12]
    if changed == "stored images":
        one.write_bytes(other.read_bytes())
    else:
        one.parent.rename(f"{one.parent}s")
    images, _ = load_image_sets(own_data, channels=1)
    with pytest.raises(ConfigError, match=rf"a different data set \({changed}\)"):
        cache_latents(model, images, tmp_path / "latents", accelerator)


def test_a_data_set_that_was_moved_is_the_same(own_data, model, accelerator, tmp_path):
    cache_latents(model, load_image_sets(own_data, channels=1)[0], tmp_path / "latents", accelerator)
    Path(own_data.path).rename(tmp_path / "moved")
    moved, _ = load_image_sets(replace(own_data, path=str(tmp_path / "moved"), num_workers=1), channels=1)
    assert len(cache_latents(model, moved, tmp_path / "latents", accelerator)) == 79


def test_images_in_parquet_files_have_a_fingerprint_too(garments, model, accelerator, tmp_path):
    stored = [file.read_bytes() for file in sorted(garments.rglob("*.png"))[:12]]
    features = datasets.Features({"image": datasets.Image()})

    def images_of(name: str, contents: list[bytes]):
        (tmp_path / name).mkdir()
        rows = {"image": [{"bytes": content, "path": None} for content in contents]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / name / "train.parquet")
        data = DataConfig(path=str(tmp_path / name), validation_images=1, resolution=32, fit="pad", num_workers=0)
        return load_image_sets(data, channels=1)[0]

    cache_latents(model, images_of("one", stored), tmp_path / "latents", accelerator)
    cache_latents(model, images_of("same", stored), tmp_path / "latents", accelerator)
    with pytest.raises(ConfigError, match=r"a different data set \(stored images\)"):
        cache_latents(
            model, images_of("other", [*stored[:5], stored[0], *stored[6:]]), tmp_path / "latents", accelerator
        )


def test_a_shard_that_was_lost_or_cut_off_is_an_error_that_names_it(cache, model, images, accelerator):
    shard = cache.folder / "latents-00004-of-00007.safetensors"
    for damage in (lambda: os.truncate(shard, 1000), shard.unlink):
        damage()
        with pytest.raises(ConfigError, match=r"latents-00004-of-00007.safetensors' is missing or cut off"):
            cache_latents(model, images, cache.folder, accelerator)


def test_a_damaged_shard_is_an_error_that_names_it(cache, model, images, accelerator):
    shard = cache.folder / "latents-00004-of-00007.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))
    message = r"latents-00004-of-00007.safetensors' is damaged"
    with pytest.raises(ConfigError, match=message):
        everything(cache)
    (cache.folder / "description.json").unlink()
    with pytest.raises(ConfigError, match=message):
        cache_latents(model, images, cache.folder, accelerator)


# The stream -------------------------------------------------------------------------------------------------------


def test_an_example_is_the_scaled_latent_of_an_image_or_of_its_mirror_image(cache, scaled_by):
    stream = LatentStream(cache, scaled_by(2.0), seed=0)
    mirrored = []
    for position in range(64):
        latents, label, noise, _, _, report = stream[position]
        index = stream.index_at(position)
        straight, flipped = (2 * cache.read(index, flip)[0].float() for flip in (False, True))
        assert torch.equal(latents, straight) or torch.equal(latents, flipped)
        mirrored.append(not torch.equal(latents, straight))
        assert label == cache.read(index)[1]
        assert noise.shape == latents.shape
        assert report == Report()
    assert 0.3 < np.mean(mirrored) < 0.7


def test_all_that_is_random_belongs_to_the_position_not_to_batch_rank_or_worker(cache, scaled_by):
    stream = LatentStream(cache, scaled_by(1.0), seed=0)

    def examples(batch_size, rank=0, world_size=1, num_workers=0):
        batches = StreamBatches(0, 96, batch_size, 1, rank, world_size)
        loader = stream_loader(stream, batches, num_workers, pin_memory=False)
        rows = [row for *tensors, _ in loader for row in zip(*tensors, strict=True)]
        return dict(zip([p for batch in batches for p in batch], rows, strict=True))

    alone = examples(32)
    ranks = {**examples(8, 0, 2), **examples(8, 1, 2, num_workers=2)}
    assert sorted(ranks) == sorted(alone) == list(range(96))
    for position, parts in alone.items():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(ranks[position], parts, strict=True))


def test_noise_time_and_dropout_are_independent_draws_of_their_laws(cache, scaled_by):
    stream = LatentStream(cache, scaled_by(1.0), seed=0)
    _, _, noise, time, dropout, _ = zip(*(stream[p] for p in range(2000)), strict=True)
    noise = torch.stack(noise)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert np.quantile(time, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.05)
    assert np.mean(np.array(dropout) < CLASS_DROPOUT) == pytest.approx(CLASS_DROPOUT, abs=0.02)
    assert abs(np.corrcoef(time, dropout)[0, 1]) < 0.1


def test_an_image_gets_new_noise_in_each_epoch_and_with_each_seed(cache, scaled_by):
    stream, other = LatentStream(cache, scaled_by(1.0), seed=0), LatentStream(cache, scaled_by(1.0), seed=1)
    first = stream.index_at(0)
    again = next(p for p in range(64, 128) if stream.index_at(p) == first)
    assert not torch.equal(stream[0][2], stream[again][2])
    assert not torch.equal(stream[0][2], other[0][2])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_encoded_in_the_loop_are_the_same_training_as_cached_latents(cache, scaled_by, images, num_workers):
    model = scaled_by(1.0)
    batches = StreamBatches(64, 128, 16, 1, 0, 1)
    online = OnlineLatentStream(ImageStream(images, seed=3), cache.shape, seed=3)
    ours = stream_loader(online, batches, num_workers, pin_memory=False)
    theirs = stream_loader(LatentStream(cache, model, seed=3), batches, num_workers, pin_memory=False)
    for (pixels, *draws, report), (latents, *cached_draws, cached_report) in zip(ours, theirs, strict=True):
        assert len(draws) == 4  # labels, noise, time, dropout
        assert all(torch.equal(one, other) for one, other in zip(draws, cached_draws, strict=True))
        assert report == cached_report == Report()
        with torch.no_grad():
            torch.testing.assert_close(model.encode(to_float(pixels)).latents, latents, rtol=0, atol=HALF)


def test_reports_of_the_images_come_through_where_they_are_encoded_in_the_loop():
    class Told(torch.utils.data.Dataset):
        def __getitems__(self, positions):
            return [(torch.zeros(1, 8, 8), 0, Report([f"{p}.png"], (0, 0, 0, p))) for p in positions]

    loader = stream_loader(OnlineLatentStream(Told(), (4, 2, 2), 0), StreamBatches(0, 4, 4, 1, 0, 1), 0, False)
    (*tensors, report) = next(iter(loader))
    assert [tuple(tensor.shape) for tensor in tensors] == [(4, 1, 8, 8), (4,), (4, 4, 2, 2), (4,), (4,)]
    assert report == Report(["0.png", "1.png", "2.png", "3.png"], (0, 0, 0, 3))
