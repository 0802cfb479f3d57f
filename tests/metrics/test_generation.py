"""FID and KID say which features they used, refuse what they cannot measure, and agree with the reference figure."""

import io
import tarfile
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from looc_ldm.metrics import InceptionFeatures, evaluate_generation, fid_and_kid

KEYS_AT_64 = {"protocol", "images_first", "images_second", "fid@64", "kid@64", "kid_std@64"}


def noise(count: int, channels: int = 3, seed: int = 0, high: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(high, (count, channels, 24, 24), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def photos(test_data: Path) -> list[torch.Tensor]:
    """Return every tenth of the sorted validation photos from the first on, then every tenth from the second on."""
    with tarfile.open(test_data / "imagenette128" / "val.tar") as tar:
        names = sorted(member.name for member in tar if member.isfile())
        files = [tar.extractfile(name).read() for name in names[0::10] + names[1::10]]
    return [torch.from_numpy(np.array(Image.open(io.BytesIO(f)).convert("RGB"))).permute(2, 0, 1) for f in files]


def test_two_halves_of_real_photos_have_the_reference_figure(photos, inception_weights):
    report = fid_and_kid(photos[:100], photos[100:], InceptionFeatures("768", inception_weights))
    assert report["fid@768"] == pytest.approx(0.998, abs=1e-3)
    assert report["images_first"] == report["images_second"] == 100


def test_the_layer_is_in_every_key_and_the_protocol_is_named(untrained_inception):
    report = fid_and_kid(noise(4), noise(5, seed=1), InceptionFeatures("64", untrained_inception))
    assert set(report) == KEYS_AT_64
    assert (report["protocol"], report["images_first"], report["images_second"]) == ("clean", 4, 5)
    assert "fid@192" in fid_and_kid(noise(2), noise(2), InceptionFeatures("192", untrained_inception))


def test_equal_sets_are_at_distance_zero_and_the_same_images_give_the_same_figures(untrained_inception):
    features = InceptionFeatures("64", untrained_inception)
    different = fid_and_kid(noise(8), noise(8, seed=1, high=128), features)["fid@64"]
    assert different > 0.01
    assert abs(fid_and_kid(noise(8), noise(8), features)["fid@64"]) < 1e-4 * different
    expected = fid_and_kid(noise(6), noise(9, seed=1), features)
    assert expected["kid_std@64"] > 0  # else no subset was drawn, and nothing could differ
    assert fid_and_kid((x for x in noise(6)), list(noise(9, seed=1)), features) == expected


def labelled(images: torch.Tensor, labels: list[int], size: int = 3):
    """Batches with their labels."""
    return zip(images.split(size), torch.tensor(labels).split(size), strict=True)


def test_many_figures_come_from_one_pass_over_batches(untrained_inception):
    networks = {"inception": InceptionFeatures("64", untrained_inception)}
    first, second, labels = noise(8), noise(8, seed=1), [0] * 4 + [1] * 4
    metrics = ("fid", "kid", "precision_recall", "class_fid")
    figures = evaluate_generation(
        iter(list(labelled(first, labels))), labelled(second, labels, 5), metrics, networks, {0: "cat", 1: "dog"}
    )
    assert figures["fid@64"] == pytest.approx(fid_and_kid(first, second, networks["inception"])["fid@64"])
    per_class = {
        name: fid_and_kid(first[chosen], second[chosen], networks["inception"])["fid@64"]
        for name, chosen in (("cat", slice(4)), ("dog", slice(4, 8)))
    }
    assert figures["class_fid"]["per_class"] == pytest.approx(per_class)
    assert figures["class_fid@64"] == pytest.approx(sum(per_class.values()) / 2)
    assert {"precision@64", "recall@64", "kid@64", "kid_std@64"} <= figures.keys()


def test_what_figures_need_is_asked_for(untrained_inception):
    networks = {"inception": InceptionFeatures("64", untrained_inception)}
    unlabelled = [(noise(4), None)]
    with pytest.raises(ValueError, match="class_fid needs labels with every batch of the first set"):
        evaluate_generation(unlabelled, unlabelled, ["class_fid"], networks)
    with pytest.raises(ValueError, match=r"fid, kid, .*cmmd, got 'fad'"):
        evaluate_generation(unlabelled, unlabelled, ["fad"], networks)
    with pytest.raises(ValueError, match="networks must hold 'clip'"):
        evaluate_generation(unlabelled, unlabelled, ["fid", "cmmd"], networks)
    with pytest.raises(ValueError, match="logits=True"):
        evaluate_generation(unlabelled, unlabelled, ["fid", "is"], networks)


def test_no_image_is_kept(untrained_inception):
    networks = {"inception": InceptionFeatures("64", untrained_inception)}
    alive: list[weakref.ref] = []

    def batches():
        for seed in range(4):
            images = noise(2, seed=seed)
            alive.append(weakref.ref(images))
            assert sum(reference() is not None for reference in alive) <= 2  # this one, and the one that was just seen
            yield images, None

    evaluate_generation(batches(), batches(), ("fid", "kid"), networks)
