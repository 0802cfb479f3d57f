"""CVQ-VAE's contrastive term against its formula written out with full matrices (paper.md, section 5)."""

import pytest
import torch
import torch.nn.functional as F

from looc_ldm import LooCQuantizer, contrastive
from looc_ldm.contrastive import contrastive_loss
from looc_ldm.search import DISTANCES


def by_definition(vectors: torch.Tensor, codebook: torch.Tensor, distance: str) -> torch.Tensor:
    """One codevector after the other, in float64, differentiable."""
    vectors, codebook = vectors.double(), codebook.double()
    if distance == "cosine":
        similarity = F.cosine_similarity(codebook[:, None], vectors[None], dim=-1)
    else:
        similarity = -(codebook[:, None] - vectors[None]).square().sum(-1)
    n, k = len(vectors), len(codebook)
    losses = []
    for row in similarity.sort(dim=1).values:
        positive, negatives = row[-max(1, n // k) :].mean(), row[: n // 2]
        logits = torch.cat([positive[None], negatives]) / 0.07
        losses.append(F.cross_entropy(logits[None], torch.tensor([0])))
    return torch.stack(losses).mean()


def close_together(count: int, distance: str) -> torch.Tensor:
    """(count, 4) vectors whose similarities do not differ by much more than 0.07: else the loss is all but 0."""
    return torch.randn(count, 4) + 2 if distance == "cosine" else 0.2 * torch.randn(count, 4)


@pytest.mark.parametrize("elements", [2**22, 700, 1])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("n", "k"), [(200, 16), (201, 7), (9, 40), (1, 3)])
def test_loss_and_gradient_are_those_of_the_formula_in_blocks_of_any_size(n, k, distance, elements, monkeypatch):
    monkeypatch.setattr(contrastive, "CHUNK_ELEMENTS", elements)
    torch.manual_seed(0)
    vectors, codebook = close_together(n, distance), close_together(k, distance).requires_grad_()
    loss = contrastive_loss(vectors, codebook, distance)
    expected = by_definition(vectors, codebook, distance)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert loss > 0.1 or n == 1  # no negatives
    (gradient,) = torch.autograd.grad(3 * loss, codebook)
    (expected_gradient,) = torch.autograd.grad(3 * expected, codebook)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_quantizer_adds_the_weighted_term_in_training_and_only_to_the_codebook(distance):
    torch.manual_seed(0)
    initial = close_together(16, distance)
    z = close_together(64, distance).view(2, 4, 4, 8).permute(0, 3, 1, 2)
    results = {}
    for weight in (0.0, 0.5):
        arguments = {"distance": distance, "codebook_update": "gradient", "contrastive_weight": weight}
        quantizer = LooCQuantizer(8, 16, 4, interpolation_factor=1, **arguments)
        quantizer.load_state_dict({"embedding.weight": initial})
        features = z.clone().requires_grad_()
        loss = quantizer(features)[1]
        results[weight] = loss, *torch.autograd.grad(loss, [features, quantizer.embedding.weight])
        results[weight, "eval"] = quantizer.eval()(z)[1]
    codebook = quantizer.codebook.detach().clone().requires_grad_()
    term = 0.5 * by_definition(z.permute(0, 2, 3, 1).reshape(-1, 4), codebook, distance)
    (gradient,) = torch.autograd.grad(term, codebook)
    torch.testing.assert_close((results[0.5][0] - results[0.0][0]).double(), term, rtol=1e-5, atol=1e-5)
    assert torch.equal(results[0.5][1], results[0.0][1])
    torch.testing.assert_close(results[0.5][2] - results[0.0][2], gradient, rtol=1e-4, atol=1e-5)
    assert torch.equal(results[0.5, "eval"], results[0.0, "eval"])


@pytest.mark.parametrize("distance", DISTANCES)
def test_descending_the_term_draws_each_codevector_to_its_closest_features(distance):
    torch.manual_seed(0)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(50, 0) + 0.05 * torch.randn(100, 2)
    codebook = torch.tensor([[0.7, 0.6], [0.6, 0.7]], requires_grad=True)
    for _ in range(50):
        (gradient,) = torch.autograd.grad(contrastive_loss(vectors, codebook, distance), codebook)
        codebook = (codebook - 0.02 * gradient).detach().requires_grad_()
    directions = F.normalize(codebook.detach(), dim=1)
    assert directions[[0, 1], [0, 1]].min() > 0.88  # 0.76 at the start
