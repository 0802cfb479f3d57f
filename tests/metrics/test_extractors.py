"""Inception and VGG16 give what torch-fidelity's networks give, in float32, and say which ones they are."""

import hashlib
import json
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

from looc_ldm.metrics import InceptionFeatures
from looc_ldm.metrics.extractors import VGG16Features

LAYERS = ("64", "192", "768", "2048")


def noise(count: int = 2, channels: int = 3, size: tuple[int, int] = (24, 30)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, *size), dtype=torch.uint8, generator=generator)


def reference(weights: Path, layers: tuple[str, ...]) -> FeatureExtractorInceptionV3:
    return FeatureExtractorInceptionV3(
        "inception-v3-compat", [*layers], feature_extractor_weights_path=str(weights), verbose=False
    )


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("layer", ["64", "2048"])
def test_features_and_logits_are_those_of_torch_fidelity(layer, logits, untrained_inception):
    extractor = InceptionFeatures(layer, untrained_inception, logits)
    found = extractor.load("cpu")(noise())
    expected = reference(untrained_inception, (layer, "logits_unbiased"))(noise())
    assert torch.equal(found["features"], expected[0])
    assert found["features"].shape == (2, extractor.dim)
    assert extractor.name == layer
    assert set(found) == ({"features", "logits"} if logits else {"features"})
    if logits:
        assert torch.equal(found["logits"], expected[1])
        assert found["logits"].std(0).min() > 0


@pytest.mark.slow
def test_features_of_vgg16_are_those_of_torch_fidelity(tmp_path):
    torch.manual_seed(0)
    file = tmp_path / "vgg16.pth"
    torch.save(torchvision.models.vgg16().state_dict(), file)
    extractor = VGG16Features(file)
    found = extractor.load("cpu")(noise())["features"]
    network = FeatureExtractorVGG16("vgg16", ["fc2_relu"], feature_extractor_weights_path=str(file), verbose=False)
    assert torch.equal(found, network(noise())[0])
    assert found.shape == (2, extractor.dim)


def test_with_the_papers_resize_features_are_those_of_pytorch_fid(untrained_inception, monkeypatch):
    """pytorch-fid resizes from there to 299 with pixel centres at a half, and maps [0, 255] to [-1, 1]."""
    images = noise(size=(40, 300))
    resized = [
        np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((229, 229), Image.BILINEAR))
        for image in images
    ]
    batch = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
    batch = 2 * torch.nn.functional.interpolate(batch, (299, 299), mode="bilinear", align_corners=False) - 1

    found = {
        layer: InceptionFeatures(layer, untrained_inception, logits=layer in ("64", "2048"), pil_resize=229).load(
            "cpu"
        )(images)
        for layer in LAYERS
    }
    # torch-fidelity's network takes 8-bit images only: hand it the prepared ones where it would resize.
    monkeypatch.setattr(
        feature_extractor_inceptionv3,
        "interpolate_bilinear_2d_like_tensorflow1x",
        lambda x, size, align_corners: batch * 128 + 128,
    )
    *features, logits = reference(untrained_inception, (*LAYERS, "logits_unbiased"))(images)
    for layer, expected in zip(LAYERS, features, strict=True):
        torch.testing.assert_close(found[layer]["features"], expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    for layer in ("64", "2048"):
        torch.testing.assert_close(found[layer]["logits"], logits, rtol=1e-4, atol=1e-4 * logits.std().item())
    assert set(found["768"]) == {"features"}


@pytest.mark.parametrize("pil_resize", [None, 229])
def test_grey_images_count_as_rgb_and_autocast_changes_nothing(pil_resize, untrained_inception):
    features = InceptionFeatures("192", untrained_inception, pil_resize=pil_resize).load("cpu")
    grey = noise(channels=1)
    expected = features(grey.repeat(1, 3, 1, 1))["features"]
    assert torch.equal(features(grey)["features"], expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = features(grey)["features"]
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_images_and_layers_of_another_kind_and_missing_logits_are_refused(untrained_inception, tmp_path):
    with pytest.raises(ValueError, match="'64', '192', '768', '2048', got '512'"):
        InceptionFeatures("512")
    features = InceptionFeatures("64", untrained_inception).load("cpu")
    for images in (noise().float(), noise()[0], noise(channels=4)):
        with pytest.raises(ValueError, match=r"uint8 tensors of shape \(batch, 1 or 3, height, width\), got torch"):
            features(images)
    # Logits that the weights do not hold.
    state = torch.load(untrained_inception, weights_only=True)
    state["fc.weight"].fill_(torch.nan)
    torch.save(state, tmp_path / "no_logits.pth")
    InceptionFeatures("2048", tmp_path / "no_logits.pth").load("cpu")
    with pytest.raises(ValueError, match="does not hold the logits: they are not finite"):
        InceptionFeatures("2048", tmp_path / "no_logits.pth", logits=True).load("cpu")


def test_the_identity_tells_apart_whatever_gives_other_features(untrained_inception, tmp_path):
    plain = InceptionFeatures("64", untrained_inception)
    assert plain.identity()["sha256"] == hashlib.sha256(untrained_inception.read_bytes()).hexdigest()
    assert plain.identity()["weights"] == str(untrained_inception)
    others = [
        InceptionFeatures("192", untrained_inception),
        InceptionFeatures("64", untrained_inception, logits=True),
        InceptionFeatures("64", untrained_inception, pil_resize=229),
    ]
    identities = [json.dumps(extractor.identity()) for extractor in (plain, *others)]
    assert len(set(identities)) == 4


class Payload:
    """Unpickling one of these touches the file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("extractor", "title"), [(lambda file: InceptionFeatures("64", file), "Inception"), (VGG16Features, "VGG16")]
)
def test_files_of_other_networks_are_refused_and_not_executed(extractor, title, tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    torch.save({"features.0.weight": Payload(tmp_path / "touched")}, tmp_path / "payload.pth")
    (tmp_path / "text.pth").write_text("hello world, not a network")
    for name in ("other.pth", "payload.pth", "text.pth"):
        with pytest.raises(ValueError, match=f"{name} is not a state dict of torch-fidelity's {title}") as error:
            extractor(tmp_path / name).load("cpu")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "touched").exists()
    with pytest.raises(FileNotFoundError, match=rf"No {title} weights at .*nowhere\.pth"):
        extractor(tmp_path / "nowhere.pth").load("cpu")


def test_a_download_that_fails_is_one_line_that_says_to_give_a_path(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    for extractor in (InceptionFeatures(), VGG16Features()):
        for ask in (partial(extractor.load, "cpu"), extractor.identity):
            with pytest.raises(ConnectionError, match=r"no network.*give a path") as error:
                ask()
            assert "\n" not in str(error.value)
