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

from looc_ldm.training.losses import (
    PatchDiscriminator,
    adaptive_adversarial_weight,
    hinge_discriminator_loss,
    load_lpips,
)
from looc_ldm.utils.errors import ConfigError
from tiny import launch


def test_hinge_loss_by_hand_is_zero_beyond_the_margin_and_one_where_nothing_is_told_apart():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    # relu(1 - real) = 0, 0.5, 2; relu(1 + fake) = 0, 1, 2
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 3 + 3 / 3))
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


def test_without_lpips_weights_the_error_names_the_file_and_the_way_without(monkeypatch):
    monkeypatch.setattr("lpips.LPIPS", lambda **settings: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ConfigError, match=r"no network.*--loss.lpips_weights FILE.*vgg16.*pth.*--loss.lpips_weight 0"):
        load_lpips("vgg", None)


def test_lpips_is_frozen_but_passes_the_gradient_to_the_image(test_data):
    lpips = load_lpips("alex", str(test_data / "metrics" / "alexnet_features_fp32.safetensors"))
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    lpips(image, torch.zeros(1, 3, 64, 64)).mean().backward()
    assert image.grad.abs().sum() > 0
    assert not lpips.training
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"loss.lpips_weights: .*No such file.*nothing\.pth"):
        load_lpips("alex", str(tmp_path / "nothing.pth"))


if __name__ == "__main__":
    processes = Accelerator()
    assert processes.num_processes == 2
    found = divided(processes.process_index, 2, processes)
    torch.save(found, Path(sys.argv[1]) / f"{processes.process_index}.pt")
    processes.end_training()
