"""Memorization: copies of training images count, new images do not, and training images are no held-out ones."""

import pytest
import torch

from looc_ldm.metrics import InceptionFeatures, evaluate_generation, memorization
from looc_ldm.metrics.memorization import PERCENTILE

TRAINING, HELD_OUT = 600, 400


def features(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def training() -> torch.Tensor:
    return features(TRAINING, 0)


@pytest.fixture
def held_out() -> torch.Tensor:
    return features(HELD_OUT, 1)


def test_copies_have_a_share_of_1_and_new_samples_that_of_the_held_out_images(training, held_out):
    copies = training[:100] + 1e-3
    found = memorization(copies, held_out, training)
    assert found.copies == 1
    assert torch.equal(found.nearest, torch.arange(100))
    assert found.distances.numpy() == pytest.approx(1e-3 * 16**0.5, rel=1e-3)
    assert found.copies_held_out == pytest.approx(PERCENTILE / 100, abs=1 / HELD_OUT)
    assert memorization(features(1000, 2), held_out, training).copies == pytest.approx(PERCENTILE / 100, abs=0.01)
    mixed = torch.cat([copies, features(100, 3)])
    assert memorization(mixed, held_out, training).copies == pytest.approx(0.5, abs=0.02)


def test_held_out_images_that_are_training_images_are_left_out(training, held_out):
    expected = memorization(held_out, held_out, training)
    assert expected.duplicates == 0
    # The same image stored once more: its features differ a little.
    with_duplicates = torch.cat([held_out, training[:40] + 1e-4])
    found = memorization(held_out, with_duplicates, training)
    assert found.duplicates == 40
    assert (found.threshold, found.copies, found.copies_held_out) == (
        expected.threshold,
        expected.copies,
        expected.copies_held_out,
    )
    with pytest.raises(ValueError, match="all 40 held-out images are training images"):
        memorization(held_out, training[:40], training)


def test_sets_without_images_are_refused(training, held_out):
    for sets in ((training[:0], held_out, training), (held_out, held_out[:0], training), (held_out, held_out, ())):
        with pytest.raises(ValueError, match=r"memorization needs .*, got none"):
            memorization(*sets)


def test_images_are_compared_in_one_call(untrained_inception):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (24, 3, 24, 24), dtype=torch.uint8, generator=generator)
    known, held_out, new = images.split(8)
    networks = {"inception": InceptionFeatures("64", untrained_inception)}
    samples = torch.cat([known[:4].flip(0), new])
    arguments = ([(samples, None)], [(held_out, None)], ["memorization"], networks)
    figures = evaluate_generation(*arguments, training=[(known, None)])
    assert figures["copies@64"] >= 4 / 12
    detail = figures["memorization"]
    pairs = {(pair["sample"], pair["training_image"]) for pair in detail["closest"][:4]}
    assert pairs == {(0, 3), (1, 2), (2, 1), (3, 0)}
    assert len(detail["closest"]) == 12
    assert detail["closest"][0]["distance"] < 1e-3 * detail["threshold"]
    assert (detail["training_images"], detail["held_out_images"], detail["duplicates"]) == (8, 8, 0)
    with pytest.raises(ValueError, match="needs the model's training images"):
        evaluate_generation(*arguments)
