"""The averaged model: what it averages, over how many images, and what it takes from the live one."""

import pytest
import torch
import torch.nn as nn

from looc_ldm import LooCVQModel
from looc_ldm.training.ema import EMA
from tiny import assert_equal_tensors

LATE = 10**9  # images seen, so many that the half-life has reached its full length


def one_weight(value: float) -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


@pytest.fixture
def live() -> LooCVQModel:
    return LooCVQModel(block_out_channels=(32,), vq_embed_dim=4, codevector_dim=2, num_vq_embeddings=8)


@pytest.mark.parametrize("batch_size", [1, 10, 100])
def test_after_its_half_life_an_old_weight_counts_half_whatever_the_batch_size(batch_size):
    ema = EMA(one_weight(0.0), halflife_images=1000)
    for images in range(batch_size, 1001, batch_size):
        ema.update(one_weight(1.0), LATE + images, batch_size)
    assert ema.model.weight.item() == pytest.approx(0.5, abs=1e-4)


def test_early_on_the_half_life_is_five_percent_of_the_images_seen():
    ema = EMA(one_weight(0.0), halflife_images=10**6)
    ema.update(one_weight(1.0), images_seen=2000, batch_size=100)
    assert ema.model.weight.item() == pytest.approx(0.5, abs=1e-6)


def test_codebook_and_usage_are_the_live_ones_and_weights_are_between(live):
    ema = EMA(live, halflife_images=100)
    before = live.encoder.conv_in.weight.detach().clone()
    with torch.no_grad():
        live.encoder.conv_in.weight.add_(1)
        live.quantize.embedding.weight.add_(1)
        live.quantize.usage.add_(1)
    ema.update(live, LATE, batch_size=100)
    torch.testing.assert_close(ema.model.encoder.conv_in.weight, before + 0.5)
    assert torch.equal(ema.model.quantize.codebook, live.quantize.codebook)
    assert torch.equal(ema.model.quantize.usage, live.quantize.usage)


def test_the_average_does_not_train_and_leaves_the_live_model_alone(live):
    trained = [parameter.requires_grad for parameter in live.parameters()]
    assert any(trained)
    ema = EMA(live, halflife_images=100)
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert [parameter.requires_grad for parameter in live.parameters()] == trained


def test_a_saved_average_reloads_equal(live, tmp_path):
    ema = EMA(live, halflife_images=100)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.add_(1)
        live.quantize.usage.add_(7)
    ema.update(live, LATE, batch_size=50)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    reloaded = EMA(live, halflife_images=100)
    reloaded.load_state_dict(torch.load(tmp_path / "ema.pt"))
    assert_equal_tensors(reloaded.model.state_dict(), ema.model.state_dict())
