"""What changes the codebook, and what freezes it."""

import pytest
import torch

from tiny import small_quantizer, tiny_autoencoder

UPDATES = ("ema", "gradient")


def train(module, parameters, steps: int = 20, width: int = 8, height: int = 4) -> None:
    """Take optimizer steps on random input, and revive."""
    quantizer = getattr(module, "quantize", module)
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for step in range(steps):
        x = torch.randn(4, width, height, height, generator=torch.Generator().manual_seed(step)).requires_grad_()
        result = module(x)
        quantized, loss = (result[0], result[1]) if isinstance(result, tuple) else (result.sample, result.commit_loss)
        optimizer.zero_grad()
        (quantized.square().sum() + loss).backward()
        optimizer.step()
        quantizer.revive()


def moved(quantizer, before: dict) -> bool:
    return any(not torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def state_of(quantizer) -> dict:
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def leave(quantizer):
    return quantizer


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    ("freeze", "freezes"),
    [
        (leave, False),
        (lambda quantizer: quantizer.eval(), True),
        (lambda quantizer: quantizer.requires_grad_(False), True),
        (lambda quantizer: quantizer.requires_grad_(False).requires_grad_(True), False),
        (lambda quantizer: quantizer.eval().train(), False),
    ],
    ids=["as it is", "eval", "frozen", "frozen and back", "eval and back"],
)
def test_eval_and_requires_grad_false_freeze_codebook_and_usage(update, freeze, freezes):
    quantizer = small_quantizer(codebook_update=update)
    parameters = [*quantizer.parameters()]
    freeze(quantizer)
    before = state_of(quantizer)
    train(quantizer, parameters)
    assert moved(quantizer, before) != freezes


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("by_parameter", [False, True])
def test_a_model_of_which_no_parameter_requires_a_gradient_keeps_its_codebook(update, by_parameter):
    model = tiny_autoencoder(codebook_update=update).train()
    if by_parameter:  # as peft does
        for parameter in model.parameters():
            parameter.requires_grad = False
    else:
        model.requires_grad_(False)
    before = state_of(model.quantize)
    train(model, [*model.parameters()], width=3, height=16)
    assert not moved(model.quantize, before)
    model.encoder.requires_grad_(True)
    train(model, [*model.encoder.parameters()], width=3, height=16)
    assert moved(model.quantize, before) == (update == "ema")  # a codebook by gradient has its own switch


@pytest.mark.parametrize("update", UPDATES)
def test_the_quantizer_of_a_frozen_model_is_frozen_also_where_it_is_called_by_itself(update):
    model = tiny_autoencoder(codebook_update=update).train().requires_grad_(False)
    before = state_of(model.quantize)
    x = torch.randn(2, 3, 16, 16).requires_grad_()
    model.quantize(model.encode(x).latents)
    model.quantize.revive()
    assert not moved(model.quantize, before)


@pytest.mark.parametrize("update", UPDATES)
def test_a_frozen_quantizer_still_gives_the_encoder_its_gradient(update):
    free, frozen = small_quantizer(codebook_update=update), small_quantizer(codebook_update=update)
    frozen.requires_grad_(False)
    gradients = []
    for quantizer in (free, frozen):
        z = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        quantized, loss, _ = quantizer(z)
        (quantized.square().sum() + loss).backward()
        gradients.append(z.grad)
    assert torch.equal(*gradients)


def test_a_training_forward_without_gradients_changes_nothing():
    quantizer = small_quantizer()
    before = state_of(quantizer)
    z = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        first = quantizer(z)[0]
        assert torch.equal(quantizer(z)[0], first)
    quantizer.revive()
    assert not moved(quantizer, before)
    quantizer(z)
    quantizer.revive()
    assert moved(quantizer, before)
