"""The codebook learns if and only if the quantizer is in train mode and its weight requires a gradient."""

import pytest
import torch
import torch.nn as nn

from tiny import assert_equal_tensors, small_quantizer

UPDATES = ("ema", "gradient")


def features(step: int) -> torch.Tensor:
    return torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(step))


def train(quantizer, parameters, steps: int = 3) -> bool:
    """Take optimizer steps and revive. Return whether codebook or usage have moved."""
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for step in range(steps):
        quantized, loss, _ = quantizer(features(step).requires_grad_())
        optimizer.zero_grad()
        (quantized.square().sum() + loss).backward()
        optimizer.step()
        quantizer.revive()
    return any(not torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def as_peft_does(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.requires_grad = False


# Functions of the quantizer and of a foreign module around it.
FROZEN = {
    "eval": lambda quantizer, around: quantizer.eval(),
    "eval of the module around": lambda quantizer, around: around.eval(),
    "quantizer": lambda quantizer, around: quantizer.requires_grad_(False),
    "embedding": lambda quantizer, around: quantizer.embedding.requires_grad_(False),
    "module around": lambda quantizer, around: around.requires_grad_(False),
    "adapters": lambda quantizer, around: as_peft_does(around),
    "all but the module before it": lambda quantizer, around: (
        around.requires_grad_(False),
        around[0].requires_grad_(True),
    ),
}
LEARNING = {
    "as it is": lambda quantizer, around: None,
    "frozen and back": lambda quantizer, around: quantizer.requires_grad_(False).requires_grad_(True),
    "eval and back": lambda quantizer, around: around.eval().train(),
    "alone in a frozen module": lambda quantizer, around: (
        around.requires_grad_(False),
        quantizer.requires_grad_(True),
    ),
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("way", [*FROZEN, *LEARNING])
def test_codebook_and_usage_move_unless_they_are_frozen(way, update):
    quantizer = small_quantizer(codebook_update=update)
    around = nn.Sequential(nn.Conv2d(8, 8, 1), quantizer)
    parameters = [*quantizer.parameters()]
    {**FROZEN, **LEARNING}[way](quantizer, around)
    assert train(quantizer, parameters) == (way in LEARNING)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("way", ["eval", "quantizer"])
def test_collected_segments_are_dropped_by_a_revive_after_freezing(way, update):
    quantizer = small_quantizer(codebook_update=update)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(features(0))
    around = nn.Sequential(quantizer)
    FROZEN[way](quantizer, around)
    quantizer.revive()
    around.train().requires_grad_(True)
    quantizer.revive()
    assert_equal_tensors(quantizer.state_dict(), before)


@pytest.mark.parametrize("update", UPDATES)
def test_a_frozen_quantizer_still_gives_the_encoder_its_gradient(update):
    gradients = []
    for frozen in (False, True):
        z = features(1).requires_grad_()
        quantizer = small_quantizer(codebook_update=update).requires_grad_(not frozen)
        quantized, loss, _ = quantizer(z)
        (quantized.square().sum() + loss).backward()
        gradients.append(z.grad)
    assert torch.equal(*gradients)


def test_a_training_forward_without_gradients_changes_nothing():
    quantizer = small_quantizer()
    before = quantizer.codebook.clone()
    with torch.no_grad():
        first = quantizer(features(0))[0]
        assert torch.equal(quantizer(features(0))[0], first)
    quantizer.revive()
    assert torch.equal(quantizer.codebook, before)
    assert quantizer.usage.sum() == 0
    assert train(quantizer, quantizer.parameters())
