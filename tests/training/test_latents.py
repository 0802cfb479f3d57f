"""Latents are what the encoder gives, encoded once, and stage 2's randomness belongs to positions of its stream."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from looc_ldm import LooCVQModel
from looc_ldm.errors import ConfigError
from looc_ldm.images import to_float
from looc_ldm.training.data import StreamBatches, load_image_sets, stream_loader
from looc_ldm.training.latents import LatentStream, cache_latents, latent_side, measure_scaling_factor

CLASS_DROPOUT = 0.1
HALF = 2e-3  # latents of up to 4 in size are stored in half precision


@pytest.fixture
def model(autoencoder_run) -> LooCVQModel:
    return LooCVQModel.from_pretrained(autoencoder_run / "model").eval()


@pytest.fixture(scope="module")
def images(small_data):
    return load_image_sets(small_data, channels=1)[0]


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True, mixed_precision="no")


@pytest.fixture
def cache(model, images, accelerator, tmp_path):
    return cache_latents(model, images, tmp_path / "latents", accelerator)


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


def test_cached_latents_are_the_encoders_output_of_each_image_and_of_its_mirror_image(cache, model, images):
    assert cache.latents.shape == (64, 4, 16, 16)
    for index in (0, 17, 63):
        for source, flip in ((cache.latents, False), (cache.flipped, True)):
            ours, theirs = torch.from_numpy(source[index].copy()), encoded(model, images, index, flip)
            torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=HALF)
    assert np.abs(cache.latents - cache.flipped).max() > 0.01


def test_labels_and_classes_go_with_the_latents(cache, images):
    assert cache.labels.tolist() == images.labels().tolist()
    assert cache.classes == images.classes


def test_without_flips_no_mirror_images_are_encoded(model, small_data, accelerator, tmp_path):
    images, _ = load_image_sets(replace(small_data, flip=False), channels=1)
    cache = cache_latents(model, images, tmp_path / "latents", accelerator)
    assert cache.flipped is None
    assert not (tmp_path / "latents" / "flipped.npy").exists()


def test_mean_and_standard_deviation_are_those_of_all_cached_latents(cache):
    everything = np.concatenate([cache.latents, cache.flipped]).astype(np.float64)
    assert cache.standard_deviation == pytest.approx(everything.std(), rel=1e-6)
    assert cache.channel_mean == pytest.approx(everything.mean((0, 2, 3)), rel=1e-3, abs=1e-5)
    assert cache.channel_std == pytest.approx(everything.std((0, 2, 3)), rel=1e-5)


def test_whitened_latents_have_zero_mean_and_unit_deviation_in_each_channel(cache, model):
    model.register_to_config(scaling_factor=1.0, latents_mean=cache.channel_mean, latents_std=cache.channel_std)
    stream = LatentStream(cache, model, seed=0)
    latents = torch.stack([stream[position][0] for position in range(64)])
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=0.1, rtol=0)


def test_the_scaling_factor_is_one_over_the_standard_deviation(model, images):
    pixels = torch.stack([to_float(images[i][0]) for i in range(10)])
    with torch.no_grad():
        expected = 1 / model.encode(pixels).latents.double().std(correction=0)
    assert measure_scaling_factor(model, pixels.split(4)) == pytest.approx(expected.item(), rel=1e-6)


def test_the_same_model_and_data_are_not_encoded_again(cache, model, images, accelerator, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("encoded again")

    monkeypatch.setattr(model, "encode", refuse)
    again = cache_latents(model, images, tmp_path / "latents", accelerator)
    assert np.array_equal(again.latents, cache.latents)


def test_latents_of_other_weights_are_refused_and_kept(cache, model, images, accelerator, tmp_path):
    old = cache.latents[3].copy()
    with torch.no_grad():
        model.quant_conv.bias.add_(1)
    with pytest.raises(ConfigError, match="latents of another autoencoder"):
        cache_latents(model, images, tmp_path / "latents", accelerator)
    assert np.array_equal(np.load(tmp_path / "latents" / "latents.npy")[3], old)


def test_another_codebook_leaves_the_latents_valid(cache, model, images, accelerator, tmp_path):
    description = (tmp_path / "latents" / "description.json").read_text()
    with torch.no_grad():
        model.quantize.embedding.weight.add_(1)
    cache_latents(model, images, tmp_path / "latents", accelerator)
    assert (tmp_path / "latents" / "description.json").read_text() == description


def test_latents_of_another_transform_are_refused(cache, model, small_data, accelerator, tmp_path):
    cropped, _ = load_image_sets(replace(small_data, fit="crop"), channels=1)
    with pytest.raises(ConfigError, match="another autoencoder, data set or transform"):
        cache_latents(model, cropped, tmp_path / "latents", accelerator)


def test_an_empty_folder_will_do(model, images, accelerator, tmp_path):
    (tmp_path / "empty").mkdir()
    assert len(cache_latents(model, images, tmp_path / "empty", accelerator)) == len(images)


def test_an_interrupted_encoding_leaves_nothing_that_looks_finished(
    model, small_data, accelerator, tmp_path, monkeypatch
):
    images, _ = load_image_sets(replace(small_data, validation_images=1, flip=False), channels=1)  # 79: two batches
    encode, calls = model.encode, []

    def interrupted(batch):
        calls.append(len(batch))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(batch)

    monkeypatch.setattr(model, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache_latents(model, images, tmp_path / "latents", accelerator)
    assert not (tmp_path / "latents").exists()
    cache = cache_latents(model, images, tmp_path / "latents", accelerator)
    assert calls == [64, 15, 64, 15]
    assert np.abs(cache.latents).max(axis=(1, 2, 3)).min() > 0  # no image was left out
    assert [file.name for file in tmp_path.iterdir()] == ["latents"]


def test_a_folder_of_something_else_is_not_overwritten(model, images, accelerator, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something else than cached latents"):
        cache_latents(model, images, tmp_path, accelerator)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_resolution_that_the_autoencoder_cannot_halve_is_refused(model, small_data):
    with pytest.raises(ConfigError, match=r"data\.resolution must be a multiple of 2, .* got 31"):
        latent_side(model, replace(small_data, resolution=31))


def test_a_cache_that_is_sent_to_another_process_is_its_folder(cache):
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).latents, cache.latents)


# The stream ------------------------------------------------------------------------------------------------------


def test_an_example_is_the_scaled_latent_of_an_image_or_of_its_mirror_image(cache, scaled_by):
    stream = LatentStream(cache, scaled_by(2.0), seed=0)
    mirrored = []
    for position in range(64):
        latents, label, noise, *_ = stream[position]
        index = stream.index_at(position)
        straight, flipped = (torch.from_numpy(2 * source[index]) for source in (cache.latents, cache.flipped))
        assert torch.equal(latents, straight) or torch.equal(latents, flipped)
        mirrored.append(not torch.equal(latents, straight))
        assert label == cache.labels[index]
        assert noise.shape == latents.shape
    assert 0.3 < np.mean(mirrored) < 0.7


def test_scaled_latents_have_unit_standard_deviation(cache, scaled_by):
    stream = LatentStream(cache, scaled_by(1 / cache.standard_deviation), seed=0)
    assert torch.stack([stream[p][0] for p in range(64)]).std().item() == pytest.approx(1, abs=0.05)


def test_all_that_is_random_belongs_to_the_position_not_to_batch_rank_or_worker(cache, scaled_by):
    stream = LatentStream(cache, scaled_by(1.0), seed=0)

    def examples(batch_size, rank=0, world_size=1, num_workers=0):
        batches = StreamBatches(0, 96, batch_size, 1, rank, world_size)
        loader = stream_loader(stream, batches, num_workers, pin_memory=False)
        rows = [row for batch in loader for row in zip(*batch, strict=True)]
        return dict(zip([p for batch in batches for p in batch], rows, strict=True))

    alone = examples(32)
    ranks = {**examples(8, 0, 2), **examples(8, 1, 2, num_workers=2)}
    assert sorted(ranks) == sorted(alone) == list(range(96))
    for position, parts in alone.items():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(ranks[position], parts, strict=True))


def test_noise_time_and_dropout_are_independent_draws_of_their_laws(cache, scaled_by):
    stream = LatentStream(cache, scaled_by(1.0), seed=0)
    _, _, noise, time, dropout = zip(*(stream[p] for p in range(2000)), strict=True)
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


def test_the_description_says_what_the_latents_are(cache, tmp_path, images):
    description = json.loads((tmp_path / "latents" / "description.json").read_text())
    assert description["classes"] == images.classes
    assert description["standard_deviation"] == cache.standard_deviation
