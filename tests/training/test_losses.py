"""The terms of the autoencoder's loss, against values worked out by hand and the reference LPIPS.

This file is also the script that each of two processes runs.
"""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from accelerate import Accelerator
from safetensors.torch import save_file

from looc_ldm.training.losses import (
    PatchDiscriminator,
    adaptive_adversarial_weight,
    hinge_discriminator_loss,
    load_lpips,
)
from looc_ldm.utils.errors import ConfigError
from tiny import import_file, launch

WEIGHTS = {"vgg": "vgg16_features_fp16.safetensors", "alex": "alexnet_features_fp32.safetensors"}


def test_hinge_loss_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    # relu(1 - real) = 0, 0.5, 2; relu(1 + fake) = 0, 1, 2
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 3 + 3 / 3))


def test_hinge_loss_is_zero_beyond_the_margin_and_one_where_nothing_is_told_apart():
    assert hinge_discriminator_loss(torch.tensor([1.5]), torch.tensor([-1.5])).item() == 0
    assert hinge_discriminator_loss(torch.zeros(3), torch.zeros(3)).item() == 1


@torch.no_grad()
def test_a_logit_does_not_depend_on_the_other_images_of_its_batch():
    discriminator = PatchDiscriminator(3, channels=8).train()
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(discriminator(images)[1:2], discriminator(images[1:2]), rtol=0, atol=1e-6)


def test_a_logit_sees_a_patch_of_70_pixels():
    discriminator = PatchDiscriminator(1, channels=4)
    for i, layer in enumerate(discriminator.layers):
        if isinstance(layer, nn.GroupNorm):  # its statistics are over the whole image
            discriminator.layers[i] = nn.Identity()
    image = torch.rand(1, 1, 192, 192, requires_grad=True)
    logits = discriminator(image)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows, columns = torch.nonzero(image.grad[0, 0], as_tuple=True)
    assert rows.max() - rows.min() + 1 == 70
    assert columns.max() - columns.min() + 1 == 70


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms():
    last_layer = nn.Parameter(torch.tensor([1.0, 2.0]))
    reconstruction_loss = (last_layer * torch.tensor([3.0, 4.0])).sum()  # gradient (3, 4), norm 5
    generator_loss = (last_layer * torch.tensor([0.0, 2.0])).sum()  # norm 2
    weight = adaptive_adversarial_weight(reconstruction_loss, generator_loss, last_layer)
    assert weight.item() == pytest.approx(5 / 2, rel=1e-3)
    assert not weight.requires_grad
    (reconstruction_loss + weight * generator_loss).backward()  # the graph is still there
    torch.testing.assert_close(last_layer.grad, torch.tensor([3.0, 4.0 + 2 * weight.item()]))


def test_the_adaptive_weight_is_at_most_ten_thousand():
    last_layer = nn.Parameter(torch.ones(1))
    weight = adaptive_adversarial_weight(last_layer.sum() * 1e9, last_layer.sum() * 1e-9, last_layer)
    assert weight.item() == 1e4


# Precision ------------------------------------------------------------------------------------------------------------


def test_the_patchgan_computes_in_float32_under_autocast():
    discriminator = PatchDiscriminator(3, channels=8)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    expected = discriminator(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.Conv2d(3, 1, 1)(images).dtype == torch.bfloat16  # as autocast does to other networks
        logits = discriminator(images)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)
    assert discriminator(images.bfloat16()).dtype == torch.float32


def test_lpips_computes_in_float32_under_autocast_unless_it_is_a_loss(test_data):
    lpips = load_lpips("alex", str(test_data / "metrics" / WEIGHTS["alex"]))
    images = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    expected = lpips(*images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lpips(*images), expected)
        fast = lpips(*images, autocast=True)
    assert not torch.equal(fast, expected)
    assert torch.allclose(fast, expected, rtol=0.03)
    assert lpips(*images.bfloat16()).dtype == torch.float32


# Two processes --------------------------------------------------------------------------------------------------------


def divided(process: int, processes: int, accelerator: Accelerator) -> torch.Tensor:
    """The weight that a process with its share of the batch finds."""
    inputs = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0)).chunk(processes, dim=1)[process]
    last_layer = nn.Parameter(torch.arange(5.0))
    reconstruction_loss, generator_loss = (inputs[0] @ last_layer).square().mean(), (inputs[1] @ last_layer).mean()
    reduce = partial(accelerator.reduce, reduction="mean")
    return adaptive_adversarial_weight(reconstruction_loss, generator_loss, last_layer, reduce)


def test_two_processes_have_the_weight_of_one(tmp_path):
    launch(__file__, tmp_path)
    alone = Accelerator(cpu=True)
    expected = divided(0, 1, alone)
    for process in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{process}.pt"), expected)
    # A mean of ratios is another number.
    apart = [divided(process, 2, alone) for process in range(2)]
    assert sum(apart) / 2 != pytest.approx(expected.item(), rel=0.01)


# LPIPS ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", WEIGHTS)
def test_lpips_with_local_weights_is_the_reference(network, test_data):
    reference = import_file(test_data / "metrics" / "metric_weights.py").lpips_network(network)
    ours = load_lpips(network, str(test_data / "metrics" / WEIGHTS[network]))
    images = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours(*images), reference(*images), rtol=0, atol=1e-7)
    assert ours(*images).min() > 0.01


def test_without_lpips_weights_the_error_names_the_file_and_the_way_without(monkeypatch):
    monkeypatch.setattr("lpips.LPIPS", lambda **settings: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ConfigError, match=r"no network.*--loss.lpips_weights FILE.*vgg16.*pth.*--loss.lpips_weight 0"):
        load_lpips("vgg", None)


def test_lpips_is_frozen_but_passes_the_gradient_to_the_image(test_data):
    lpips = load_lpips("alex", str(test_data / "metrics" / WEIGHTS["alex"]))
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    lpips(image, torch.zeros(1, 3, 64, 64)).mean().backward()
    assert image.grad.abs().sum() > 0
    assert not lpips.training
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_given_weights_download_nothing(test_data, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    load_lpips("vgg", str(test_data / "metrics" / WEIGHTS["vgg"]))


def test_the_weights_of_another_network_are_refused(test_data):
    with pytest.raises(ConfigError, match=r"does not hold features\.0\.weight of this network"):
        load_lpips("vgg", str(test_data / "metrics" / WEIGHTS["alex"]))


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    save_file({"something": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"other\.safetensors' does not hold features\.0\.weight"):
        load_lpips("alex", str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("name", ["text.safetensors", "text.pth"])
def test_a_file_that_holds_no_weights_is_refused_in_one_line(tmp_path, name):
    (tmp_path / name).write_text("not weights, but longer than a header\n" * 5)
    with pytest.raises(ConfigError, match="is not a file of weights") as caught:
        load_lpips("alex", str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"loss.lpips_weights: .*No such file.*nothing\.pth"):
        load_lpips("alex", str(tmp_path / "nothing.pth"))


if __name__ == "__main__":
    processes = Accelerator()
    assert processes.num_processes == 2
    found = divided(processes.process_index, 2, processes)
    torch.save(found, Path(sys.argv[1]) / f"{processes.process_index}.pt")
    processes.end_training()
