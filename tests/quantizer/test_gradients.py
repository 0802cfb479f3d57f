"""Gradients at the choice of codevectors: the rotation trick. Straight through: see test_quantizer."""

import pytest
import torch
import torch.nn.functional as F

import tiny
from looc_ldm import LooCQuantizer, LooCSmallVQModel, LooCVQModel
from looc_ldm.quantizer.gradients import Rotation

LAYOUTS = [(1, "channel"), (2, "channel"), (2, "patch"), (3, "patch")]


def small_quantizer(s: int = 1, layout: str = "channel", **changes) -> LooCQuantizer:
    changes = {"gradient": "rotation", "distance": "euclidean", **changes}
    return tiny.small_quantizer(interpolation_factor=s, segment_layout=layout, **changes)


def turned(rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The rows times the constant matrices that turn and scale them onto what was chosen, written out."""
    a, b = F.normalize(rows.detach(), dim=-1), F.normalize(chosen, dim=-1)
    middle = F.normalize(a + b, dim=-1)
    identity = torch.eye(rows.shape[-1], dtype=rows.dtype)
    matrix = identity - 2 * middle[..., :, None] * middle[..., None, :] + 2 * b[..., :, None] * a[..., None, :]
    scale = chosen.norm(dim=-1, keepdim=True) / rows.detach().norm(dim=-1, keepdim=True)
    return scale * (matrix @ rows[..., None])[..., 0]


@pytest.mark.parametrize(("s", "layout"), LAYOUTS)
def test_the_gradient_is_that_of_turning_and_scaling_segments_onto_their_codevectors(s, layout):
    quantizer = small_quantizer(s, layout)
    z, upstream = torch.randn(2, 8, 3, 4, requires_grad=True), torch.randn(2, 8, 3, 4)
    quantized, _, (_, _, codes) = quantizer(z)
    (gradient,) = torch.autograd.grad(quantized, z, upstream)
    rows = quantizer._to_segments(z)
    moved = turned(rows, quantizer.codebook.detach()[codes])
    torch.testing.assert_close(moved, quantizer.codebook.detach()[codes], rtol=0, atol=1e-5)
    expected = quantizer._pool(moved).movedim(-1, 1)
    torch.testing.assert_close(quantized, expected, rtol=0, atol=1e-5)
    (expected_gradient,) = torch.autograd.grad(expected, z, upstream)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d", [2, 4, 16])
def test_segments_turn_by_any_angle_in_any_dimension(d):
    """Codevectors are given here: a distance would have chosen near ones."""
    torch.manual_seed(0)
    rows, chosen, upstream = torch.randn(3, 400, d).unbind()
    chosen[:100] = 0.05 * chosen[:100] - rows[:100]  # nearly opposite
    rows.requires_grad_()
    exact = rows.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(turned(exact, chosen.double()), exact, upstream.double())
    codes = torch.arange(400)
    same = Rotation.apply(rows, chosen, chosen - rows.detach(), codes)
    (gradient,) = torch.autograd.grad(same, rows, upstream)
    short = chosen.norm(dim=-1) / rows.detach().norm(dim=-1) < 32
    assert short.sum() > 350
    torch.testing.assert_close(gradient[short].double(), expected[short], rtol=1e-3, atol=2e-3)


def test_work_in_chunks_changes_nothing(monkeypatch):
    gradients = []
    for size in (2**17, 12):  # three segments
        monkeypatch.setattr("looc_ldm.quantizer.gradients.ROTATION_CHUNK_ELEMENTS", size)
        z = torch.randn(2, 8, 3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        gradients.append(torch.autograd.grad(small_quantizer(2)(z)[0].square().sum(), z)[0])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arguments", [{}, {"gradient": "straight-through"}])
def test_gradients_turn_by_default_and_models_hand_on_what_they_are_told(arguments):
    models = LooCVQModel(**arguments), LooCSmallVQModel(1, 1, **arguments)
    for quantizer in (LooCQuantizer(8, 32, 4, **arguments), *(model.quantize for model in models)):
        assert quantizer.gradient == arguments.get("gradient", "rotation")


def test_a_segment_that_is_its_codevector_passes_the_gradient_straight_through():
    quantizer = small_quantizer()
    codes = torch.randint(32, (2, 3, 4, 2))
    z = quantizer.decode_indices(codes).detach().requires_grad_()
    upstream = torch.randn(2, 8, 3, 4)
    (gradient,) = torch.autograd.grad(quantizer(z)[0], z, upstream)
    torch.testing.assert_close(gradient, upstream, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [0.0, 1e-20, 1e-6, 3e-3, 0.1])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_no_gradient_grows_more_than_32_times_and_a_segment_next_to_zero_passes_it_straight_through(distance, length):
    quantizer = small_quantizer(distance=distance)
    directions = (
        torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(1)) if length else torch.zeros(1, 8, 4, 4)
    )
    z = (length * directions).requires_grad_()
    upstream = torch.randn(1, 8, 4, 4)
    (gradient,) = torch.autograd.grad(quantizer(z)[0], z, upstream)
    if length < 1e-5:
        assert torch.equal(gradient, upstream)
    before, after = (values.movedim(1, -1).reshape(-1, 4).norm(dim=-1) for values in (upstream, gradient))
    assert (after <= 32.01 * before).all()


def test_single_channels_have_no_direction_to_turn():
    quantizer = LooCQuantizer(8, 32, 1, interpolation_factor=1, distance="euclidean")
    z, upstream = torch.randn(2, 8, 3, 4, requires_grad=True), torch.randn(2, 8, 3, 4)
    (gradient,) = torch.autograd.grad(quantizer(z)[0], z, upstream)
    assert torch.equal(gradient, upstream)


@pytest.mark.parametrize("training", [False, True])
def test_only_the_gradient_differs_from_the_straight_through_estimate(training):
    z = torch.randn(2, 8, 5, 5)
    outputs = [
        small_quantizer(2, gradient=gradient).train(training)(z) for gradient in ("rotation", "straight-through")
    ]
    for first, second in zip(outputs[0][:2], outputs[1][:2], strict=True):
        assert torch.equal(first, second)
    assert torch.equal(outputs[0][2][2], outputs[1][2][2])


def test_a_second_derivative_is_refused():
    z = torch.randn(2, 8, 4, 4, requires_grad=True)
    loss = small_quantizer()(z)[1].square()
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()
