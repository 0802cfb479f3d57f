"""DINOv2 and CLIP give the published features: the right token of images prepared as Pillow and their authors do."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import BitImageProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

from looc_ldm.metrics.extractors import CLIPFeatures, DINOv2Features

IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
KINDS = {"dinov2": DINOv2Features, "clip": CLIPFeatures}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny networks with random weights, saved as transformers saves them."""
    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    dinov2 = Dinov2Model(Dinov2Config(hidden_size=32, image_size=70, patch_size=14, **layers))
    text = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 50, "max_position_embeddings": 8}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"hidden_size": 32, "intermediate_size": 64, "image_size": 48, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text | layers, vision_config=vision | layers, projection_dim=24))
    for name, network in (("dinov2", dinov2), ("clip", clip)):
        network.save_pretrained(root / name)
    return {name: root / name for name in KINDS}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Set HF_HUB_OFFLINE=1 and an empty cache for the client, which reads both when it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def noise(*size: int, channels: int = 3) -> torch.Tensor:
    """The hardest images to resize alike: filters overshoot everywhere."""
    return torch.randint(256, (2, channels, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def processed(processor, images: torch.Tensor) -> torch.Tensor:
    return processor(images=list(images.permute(0, 2, 3, 1).numpy()), return_tensors="pt").pixel_values


def with_positions(network: Dinov2Model, factor: float) -> Dinov2Model:
    """With position embeddings for 224 pixels, 16x16 patches, resized by a factor."""
    (stored,) = network.embeddings.position_embeddings.data
    grid = stored[1:].T.reshape(1, 32, 5, 5)
    resized = torch.nn.functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    positions = torch.cat([stored[None, :1], resized.reshape(1, 32, 256).mT], dim=1)
    network.embeddings.position_embeddings = torch.nn.Parameter(positions)
    return network


@pytest.mark.parametrize("size", [(60, 80), (300, 260), (224, 224)], ids=str)
def test_dinov2_is_the_class_token_of_images_as_its_processor_prepares_them(folders, size):
    network = with_positions(Dinov2Model.from_pretrained(folders["dinov2"]).eval(), (16 + 0.1) / 5)
    published = BitImageProcessor(size={"height": 224, "width": 224}, do_center_crop=False, **IMAGENET)
    with torch.no_grad():
        expected = network(pixel_values=processed(published, noise(*size))).last_hidden_state[:, 0]
    features = DINOv2Features(folders["dinov2"]).load("cpu")(noise(*size))["features"]
    assert (features.shape, features.dtype) == ((2, 32), torch.float32)
    # Ten times closer than what rounding and clipping to 8 bits once instead of twice makes of noise.
    torch.testing.assert_close(features, expected, rtol=0, atol=3e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.05


def test_positions_of_dinov2_are_not_interpolated_as_transformers_does(folders):
    """But as its makers do: they multiply coordinates by a factor that is off by a tenth of a patch."""
    images, processor = noise(224, 224), BitImageProcessor(do_resize=False, do_center_crop=False, **IMAGENET)
    network = Dinov2Model.from_pretrained(folders["dinov2"]).eval()
    with torch.no_grad():
        other = network(pixel_values=processed(processor, images)).last_hidden_state[:, 0]
        exact = with_positions(network, (16 + 0.1) / 5)(pixel_values=processed(processor, images))
    found = DINOv2Features(folders["dinov2"]).load("cpu")(images)["features"]
    torch.testing.assert_close(found, exact.last_hidden_state[:, 0], rtol=0, atol=1e-5)
    assert (found - other).abs().max() > 1e-4


@pytest.mark.parametrize("size", [(60, 80), (30, 26), (48, 48)], ids=str)
def test_clip_is_the_projected_embedding_of_length_one(folders, size):
    network = CLIPModel.from_pretrained(folders["clip"]).eval()
    published = CLIPImageProcessor(size={"height": 48, "width": 48}, do_center_crop=False)
    with torch.no_grad():
        expected = network(
            pixel_values=processed(published, noise(*size)), input_ids=torch.tensor([[0, 2, 1]] * 2)
        ).image_embeds
    features = CLIPFeatures(folders["clip"]).load("cpu")(noise(*size))["features"]
    assert (features.shape, features.dtype) == ((2, 24), torch.float32)
    assert features.norm(dim=1).tolist() == pytest.approx([1, 1])
    torch.testing.assert_close(features, expected, rtol=0, atol=3e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_grey_image_counts_as_its_rgb_copy_and_all_is_float32(folders, kind, tmp_path):
    features = KINDS[kind](folders[kind]).load("cpu")
    grey = noise(40, 50, channels=1)
    expected = features(grey.repeat(1, 3, 1, 1))["features"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features(grey)["features"], expected)
    # Weights that are stored in half precision compute in float32.
    model = {"dinov2": Dinov2Model, "clip": CLIPModel}[kind].from_pretrained(folders[kind])
    model.bfloat16().save_pretrained(tmp_path / kind)
    both = (tmp_path / kind, folders[kind])
    features, exact = (KINDS[kind](folder).load("cpu")(noise(48, 48))["features"] for folder in both)
    assert features.dtype == torch.float32
    assert not torch.equal(features, exact)
    assert not torch.equal(features, features.bfloat16().float())
    torch.testing.assert_close(features, exact, rtol=0.1, atol=0.1)


def test_name_dimension_and_identity_are_the_models(folders, tmp_path):
    for kind, dim in (("dinov2", 32), ("clip", 24)):
        features = KINDS[kind](folders[kind])
        features.load("cpu")
        assert (features.name, features.dim) == (kind, dim)
    copy, other_config, other_weights = (
        shutil.copytree(folders["clip"], tmp_path / name) for name in ("clip-tiny", "config", "weights")
    )
    config = json.loads((other_config / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "tanh"  # which the weights do not show
    (other_config / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    CLIPModel(CLIPConfig.from_pretrained(other_weights)).save_pretrained(other_weights)

    assert (DINOv2Features().name, CLIPFeatures().name) == ("dinov2-large", "clip-vit-large-patch14-336")
    identity = CLIPFeatures(folders["clip"]).identity()
    assert json.dumps(identity)
    assert CLIPFeatures(copy).name == "clip-tiny"
    assert CLIPFeatures(copy).identity() == identity | {"weights": str(copy)}
    for folder, changed in ((other_config, "config_sha256"), (other_weights, "sha256")):
        found = CLIPFeatures(folder).identity()
        assert {key for key in identity if found[key] != identity[key]} == {"weights", changed}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_not_such_a_model_is_refused_in_one_line(folders, kind, tmp_path):
    other = next(name for name in KINDS if name != kind)
    pickled = shutil.copytree(folders[kind], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    damaged = shutil.copytree(folders[kind], tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"not tensors")
    (tmp_path / "empty").mkdir()
    for folder, reason in {
        folders[other]: f"is not a {kind} model: its config.json must have model_type '{kind}', got '{other}'",
        tmp_path / "empty": f"is not a {kind} model: its config.json must have",
        pickled: f"cannot be loaded as a {kind} model; .*safetensors",
        damaged: f"cannot be loaded as a {kind} model",
    }.items():
        with pytest.raises(ValueError, match=reason) as error:
            KINDS[kind](folder).load("cpu")
        assert "\n" not in str(error.value)
        assert str(folder) in str(error.value)


def test_weights_that_are_missing_are_not_made_up(folders, tmp_path):
    """transformers fills them at random, and only warns."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["dinov2"], tmp_path / "incomplete")
    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"incomplete' does not hold layernorm\.weight of a dinov2 model"):
        DINOv2Features(folder).load("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_cannot_be_found_or_downloaded_is_one_line_that_says_what_to_give(offline, kind):
    for model in (f"somebody/{kind}-offline", "./nowhere", "networks/of/mine"):
        features = KINDS[kind](model)
        for ask in (partial(features.load, "cpu"), features.identity, lambda features=features: features.dim):
            with pytest.raises(ValueError, match=r"give a hub id, or a folder with config\.json") as error:
                ask()
            assert repr(model) in str(error.value)
            assert "\n" not in str(error.value)
