"""Revival of codevectors (the CVQ-VAE update): what moves, by how much, and when."""

from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tiny
from looc_ldm import LooCQuantizer

small_quantizer = partial(tiny.small_quantizer, interpolation_factor=1, codebook_update="gradient")


def codebook_of(quantizer: LooCQuantizer) -> torch.Tensor:
    return quantizer.embedding.weight.detach().clone()


@pytest.mark.parametrize(
    ("usage_times_k", "weight"), [(0, 0.9990), (1e-4, 0.904), (1e-3, 0.368), (3e-3, 0.050), (1e-2, 0.0000)]
)
def test_a_codevector_moves_towards_its_anchor_the_more_the_less_it_is_used(usage_times_k, weight):
    quantizer = small_quantizer(vq_embed_dim=2, codevector_dim=2, distance="euclidean", usage_decay=0.99)
    quantizer.revive()
    anchor = torch.tensor([1.0, 1.0])  # the only feature, so everybody's anchor
    with torch.no_grad():
        quantizer.embedding.weight.uniform_(-0.5, 0.5)
        quantizer.embedding.weight[0] = anchor  # takes all features: the others get nothing of this batch
    quantizer.usage.fill_(usage_times_k / quantizer.num_codevectors / 0.99)
    before = codebook_of(quantizer)
    quantizer(anchor.view(1, 2, 1, 1).expand(1, 2, 4, 4))
    quantizer.revive()
    moved = (codebook_of(quantizer) - before)[1:] / (anchor - before)[1:]
    torch.testing.assert_close(moved, torch.full_like(moved, weight), rtol=0, atol=5e-4)
    if usage_times_k == 1e-2:
        assert moved.abs().max() < 5e-5


def test_usage_is_the_moving_average_of_the_share_of_segments():
    quantizer = small_quantizer(usage_decay=0.9)
    expected = torch.zeros(32)
    for _ in range(3):
        _, _, (_, _, indices) = quantizer(torch.randn(2, 8, 4, 4))
        quantizer.revive()
        share = torch.bincount(indices.flatten(), minlength=32) / indices.numel()
        expected = 0.9 * expected + 0.1 * share
    torch.testing.assert_close(quantizer.usage, expected)
    assert quantizer.usage.sum() == pytest.approx(1 - 0.9**3)


@pytest.mark.parametrize("anchor", ["closest", "random", "probrandom"])
def test_an_unused_codevector_becomes_a_feature_of_the_batch(anchor):
    quantizer = small_quantizer(anchor=anchor)
    z = torch.randn(2, 8, 4, 4)
    _, _, (_, _, indices) = quantizer(z)
    quantizer.revive()
    segments = z.permute(0, 2, 3, 1).reshape(-1, 4)
    distance = torch.cdist(quantizer.codebook, segments).amin(dim=1)
    unused = torch.bincount(indices.flatten(), minlength=32) == 0
    assert unused.any()
    assert distance[unused].max() < 0.01
    assert distance[~unused].min() > 0.01


def test_without_anchors_the_codebook_stays_and_usage_is_still_counted():
    quantizer = small_quantizer(anchor="none")
    before = codebook_of(quantizer)
    for _ in range(3):
        quantizer(torch.randn(2, 8, 4, 4))
        quantizer.revive()
    assert torch.equal(codebook_of(quantizer), before)
    assert quantizer.usage.sum() > 0


@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_two_forwards_then_revive_is_one_forward_of_both_batches(distance, codebook_update):
    first, second = torch.randn(2, 2, 8, 4, 4)
    arguments = {"distance": distance, "codebook_update": codebook_update}
    accumulated, at_once = small_quantizer(**arguments), small_quantizer(**arguments)
    for quantizer in (accumulated, at_once):
        quantizer.revive()  # from here on its owner revives
    for step in range(3):
        accumulated(first + step)
        accumulated(second - step)
        accumulated.revive()
        at_once(torch.cat([first + step, second - step]))
        at_once.revive()
    torch.testing.assert_close(accumulated.usage, at_once.usage, rtol=0, atol=1e-6)
    torch.testing.assert_close(accumulated.codebook, at_once.codebook, rtol=0, atol=1e-6)


def test_a_quantizer_nobody_revives_revives_at_its_next_training_forward():
    alone, owned = small_quantizer(), small_quantizer()
    batches = torch.randn(3, 2, 8, 4, 4)
    for z in batches:
        alone(z)
    for z in batches[:2]:
        owned(z)
        owned.revive()
    assert owned.usage.sum() > 0
    assert torch.equal(alone.usage, owned.usage)
    assert torch.equal(alone.codebook, owned.codebook)


def test_a_quantizer_its_owner_revives_does_not_change_in_forward():
    quantizer = small_quantizer()
    quantizer.owner_revives = True
    before = codebook_of(quantizer)
    for _ in range(3):
        quantizer(torch.randn(2, 8, 4, 4))
    assert torch.equal(codebook_of(quantizer), before)
    assert quantizer.usage.sum() == 0


def test_revival_between_forward_and_backward_leaves_the_gradients_alone():
    z = torch.randn(2, 8, 4, 4, requires_grad=True)
    gradients = []
    for revive_first in (False, True):
        quantizer = small_quantizer()
        quantized, loss, _ = quantizer(z)
        if revive_first:
            quantizer.revive()
        total = quantized.square().sum() + loss
        gradients.append(torch.autograd.grad(total, [z, quantizer.embedding.weight]))
    for before, after in zip(*gradients, strict=True):
        assert torch.equal(before, after)


class PublishedQuantizer(nn.Module):
    """The published order of operations, written out with full matrices: cosine, closest, revival inside forward."""

    def __init__(self, codebook: torch.Tensor, s: int):
        super().__init__()
        self.codebook = nn.Parameter(codebook.clone())
        self.usage = torch.zeros(len(codebook))
        self.s = s

    def forward(self, z):
        k, d = self.codebook.shape
        if self.s > 1:
            z = F.interpolate(z, scale_factor=self.s, mode="bilinear")
            z = F.pixel_unshuffle(z, self.s)
        z = z.permute(0, 2, 3, 1)
        rows = z.reshape(-1, d)
        directions = rows.detach() / rows.detach().norm(dim=1, keepdim=True)
        cosine = directions @ (self.codebook.detach() / self.codebook.detach().norm(dim=1, keepdim=True)).T
        one_hot = F.one_hot(cosine.argmax(dim=1), k).float()
        chosen = one_hot @ self.codebook
        loss = 0.25 * ((chosen.detach() - rows) ** 2).mean() + ((chosen - rows.detach()) ** 2).mean()
        chosen = rows + (chosen - rows).detach()
        with torch.no_grad():
            self.usage = 0.99 * self.usage + 0.01 * one_hot.mean(0)
            alpha = torch.exp(-10 * k * self.usage / 0.01 - 1e-3)[:, None]
            anchors = rows.detach()[cosine.argmax(dim=0)]
            self.codebook.data = (1 - alpha) * self.codebook.data + alpha * anchors
        z_q = chosen.reshape(z.shape).permute(0, 3, 1, 2)
        if self.s > 1:
            z_q = F.avg_pool2d(F.pixel_shuffle(z_q, self.s), self.s)
        return z_q, loss


def losses_of_ten_steps(quantizer: nn.Module) -> torch.Tensor:
    """Adam on a linear autoencoder of random features, from the same weights and batches each time."""
    torch.manual_seed(1)
    encoder, decoder = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)
    optimizer = torch.optim.Adam([*encoder.parameters(), *quantizer.parameters(), *decoder.parameters()], lr=1e-3)
    losses = []
    for _ in range(10):
        x = torch.randn(4, 6, 5, 5)
        z_q, loss, *_ = quantizer(encoder(x))
        if isinstance(quantizer, LooCQuantizer):
            quantizer.revive()
        loss = loss + F.mse_loss(decoder(z_q), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("s", [1, 2, 3])
def test_training_follows_the_published_rule_to_six_digits(s):
    published = {"distance": "cosine", "anchor": "closest", "gradient": "straight-through"}
    quantizer = small_quantizer(interpolation_factor=s, segment_layout="patch", **published)
    published = PublishedQuantizer(codebook_of(quantizer), s)
    losses, expected = losses_of_ten_steps(quantizer), losses_of_ten_steps(published)
    torch.testing.assert_close(losses, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(quantizer.usage, published.usage)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("training", [False, True])
def test_values_that_are_not_finite_are_refused(value, training):
    quantizer = small_quantizer().train(training)
    z = torch.randn(2, 8, 4, 4)
    z[1, 3, 2, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantizer(z)
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantizer.encode_indices(z)


@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
@pytest.mark.parametrize(
    ("anchor", "distance", "value"),
    [
        ("closest", "cosine", torch.nan),
        ("random", "euclidean", torch.inf),
        ("probrandom", "euclidean", torch.nan),
        ("none", "cosine", torch.inf),
    ],
)
def test_where_training_does_not_wait_for_the_device_a_bad_step_changes_nothing_and_is_told_later(
    anchor, distance, value, codebook_update
):
    torch.compiler.reset()
    quantizer = small_quantizer(distance=distance, anchor=anchor, codebook_update=codebook_update)
    quantizer.revive()
    forward = torch.compile(quantizer, backend="eager")  # does not look at values either
    good = torch.randn(2, 8, 4, 4)
    bad = good.clone()
    bad[0, 0, 0, 0] = value
    forward(good)
    quantizer.revive()
    quantizer.check_finite()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    forward(good + 1)
    forward(bad)  # in the same optimizer step
    quantizer.revive()
    tiny.assert_equal_tensors(quantizer.state_dict(), before)
    forward(good)
    quantizer.revive()
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantizer.check_finite()
    quantizer.check_finite()  # told once
    assert quantizer.usage.sum() > before["usage"].sum()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("gradient", ["straight-through", "rotation"])
def test_an_owner_that_watches_gradients_is_not_interrupted_and_sees_them_not_finite(value, gradient):
    quantizer = small_quantizer(gradient=gradient)
    quantizer.owner_revives = True
    z = torch.randn(2, 8, 4, 4)
    z[1, 3, 2, 1] = value
    z.requires_grad_()
    quantized, loss, _ = quantizer(z)
    (quantized.square().mean() + loss).backward()
    assert not loss.isfinite()
    assert not z.grad.isfinite().all()
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantizer.eval()(z)


def test_what_was_applied_or_discarded_is_not_applied_again():
    quantizer = small_quantizer()
    quantizer(torch.randn(2, 8, 4, 4))
    quantizer.revive()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer.revive()
    quantizer(torch.randn(2, 8, 4, 4))
    quantizer.discard()  # from a step that was skipped
    quantizer.revive()
    tiny.assert_equal_tensors(quantizer.state_dict(), before)


@pytest.mark.parametrize(
    ("anchor", "codebook_update", "owner_revives"),
    [("closest", "ema", True), ("probrandom", "ema", False), ("probrandom", "gradient", True)],
)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient_and_counts_no_batch_twice(
    reentrant, anchor, codebook_update, owner_revives
):
    results = []
    for checkpointed in (False, True):
        quantizer = small_quantizer(anchor=anchor, codebook_update=codebook_update, interpolation_factor=2)
        if owner_revives:
            quantizer.revive()

        def quantize(z, quantizer=quantizer):
            quantized, loss, _ = quantizer(z)
            return quantized.square().sum() + loss

        everything = []
        for step in range(4):
            torch.manual_seed(step)
            z = torch.randn(2, 8, 3, 3).requires_grad_()
            loss = checkpoint(quantize, z, use_reentrant=reentrant) if checkpointed else quantize(z)
            quantizer.zero_grad()
            loss.backward()
            if codebook_update == "gradient":
                everything.append(quantizer.embedding.weight.grad.clone())
            if owner_revives and step % 2:
                quantizer.revive()
            everything += [loss.detach(), z.grad, codebook_of(quantizer), quantizer.usage.clone()]
        results.append(everything)
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-6, atol=1e-6)
    assert plain.sum() > 0


def test_weights_that_are_loaded_in_between_cost_no_batch():
    loaded, expected = small_quantizer(), small_quantizer()
    loaded(torch.randn(2, 8, 3, 3, requires_grad=True))
    loaded.load_state_dict(expected.state_dict())
    z = torch.randn(2, 8, 3, 3)
    for quantizer in (loaded, expected):
        checkpoint(lambda z, of=quantizer: of(z)[0].sum(), z.clone().requires_grad_(), use_reentrant=True).backward()
        quantizer.revive()
    assert torch.equal(codebook_of(loaded), codebook_of(expected))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_codebook_that_changes_under_activation_checkpointing_is_refused(reentrant):
    quantizer = small_quantizer()
    quantizer.revive()
    z = torch.randn(2, 8, 3, 3, requires_grad=True)
    quantizer(z)[0].square().sum().backward()  # things that a reentrant forward cannot collect before backward
    loss = checkpoint(lambda z: quantizer(z)[0].square().sum(), z, use_reentrant=reentrant)
    quantizer.revive()
    with pytest.raises(RuntimeError, match=r"call revive\(\) after backward"):
        loss.backward()
