"""State of a quantizer: its state dicts, the state dicts of diffusers' quantizer, copies and pickles."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn
from diffusers.models.autoencoders.vae import VectorQuantizer

from looc_ldm import LooCQuantizer
from tiny import assert_equal_tensors, small_quantizer


def pickled(quantizer: LooCQuantizer) -> LooCQuantizer:
    return pickle.loads(pickle.dumps(quantizer))


def train(quantizer: LooCQuantizer, steps: range, owner_revives: bool) -> None:
    for step in steps:
        z = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(step)).requires_grad_()
        quantized, loss, _ = quantizer(z)
        (quantized.sum() + loss).backward()
        if owner_revives and step % 2:
            quantizer.revive()


@pytest.mark.parametrize("owner_revives", [True, False])
@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_made_between_forward_and_revive_goes_on_as_the_original_does(copied, codebook_update, owner_revives):
    original = small_quantizer(codebook_update=codebook_update)
    if owner_revives:
        original.revive()
    train(original, range(3), owner_revives)  # two forwards after the last revive
    clone = copied(original)
    before = original.codebook.clone()
    train(clone, range(3, 6), owner_revives)
    assert torch.equal(original.codebook, before)
    train(original, range(3, 6), owner_revives)
    assert not torch.equal(original.codebook, before)
    assert torch.equal(clone.codebook, original.codebook)
    assert torch.equal(clone.usage, original.usage)


@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
def test_loading_forgets_the_batch_before_it(codebook_update):
    quantizer, state = small_quantizer(codebook_update=codebook_update), small_quantizer().state_dict()
    quantizer.revive()
    quantizer(torch.randn(2, 8, 3, 3))
    quantizer.load_state_dict(state)
    quantizer.revive()
    assert_equal_tensors(quantizer.state_dict(), state)


class Model(nn.Module):
    def __init__(self, quantize: nn.Module):
        super().__init__()
        self.quantize = quantize


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_a_codebook_of_diffusers_loads_strictly_and_is_not_revived_away(distance, nested):
    theirs = VectorQuantizer(32, 4, beta=0.25)
    nn.init.normal_(theirs.embedding.weight)
    state = Model(theirs).state_dict() if nested else theirs.state_dict()
    names = set(state)
    ours = small_quantizer(distance=distance, codebook_update="gradient")
    report = (Model(ours) if nested else ours).load_state_dict(state)
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    assert set(state) == names  # the caller's own
    assert torch.equal(ours.codebook, theirs.embedding.weight)
    ours(torch.ones(1, 8, 2, 2))  # one codevector is enough for this
    ours.revive()
    assert torch.equal(ours.codebook, theirs.embedding.weight)
    # Without usage they would be.
    fresh = small_quantizer(distance=distance, codebook_update="gradient")
    fresh.load_state_dict({"embedding.weight": theirs.embedding.weight, "usage": torch.zeros(32)})
    fresh(torch.ones(1, 8, 2, 2))
    fresh.revive()
    assert (fresh.codebook - theirs.embedding.weight).abs().amax(1).median() > 0.1


@pytest.mark.parametrize("with_usage", [False, True])
def test_a_codebook_of_another_size_is_refused_with_both_sizes(with_usage):
    state = small_quantizer(num_codevectors=16).state_dict()
    if not with_usage:
        del state["usage"]
    with pytest.raises(RuntimeError, match=r"(?s)embedding.weight.*\[16, 4\].*\[32, 4\]"):
        small_quantizer().load_state_dict(state)
