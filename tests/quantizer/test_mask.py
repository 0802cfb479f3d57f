"""Padded sequences: positions that a mask leaves out have no part in anything."""

import pytest
import torch

from tiny import assert_equal_tensors, small_quantizer


def padded(layout: str, lengths=(5, 2, 9), padding: float = 0.0):
    """Return sequences as a batch, their mask, and all positions that count as one sequence."""
    generator = torch.Generator().manual_seed(3)
    z = torch.full((len(lengths), max(lengths), 8), padding)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    z[mask] = torch.randn(sum(lengths), 8, generator=generator)
    alone = z[mask][None]
    if layout == "BCL":
        return z.transpose(1, 2).contiguous(), mask, alone.transpose(1, 2).contiguous()
    return z, mask, alone


def by_position(z: torch.Tensor, layout: str) -> torch.Tensor:
    return z.transpose(1, 2) if layout == "BCL" else z


@pytest.mark.parametrize("layout", ["BCL", "BLC"])
@pytest.mark.parametrize("padding", [0.0, 7.0, float("nan")])
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_masked_batch_trains_as_its_positions_alone_do(layout, padding, update):
    z, mask, alone = padded(layout, padding=padding)
    settings = {"interpolation_factor": 1, "input_layout": layout, "codebook_update": update}
    masked, plain = small_quantizer(**settings), small_quantizer(**settings)
    z.requires_grad_()
    alone.requires_grad_()
    quantized, loss, (perplexity, _, indices) = masked(z, mask=mask)
    expected, expected_loss, (expected_perplexity, _, expected_indices) = plain(alone)
    assert quantized.shape == z.shape
    assert torch.equal(by_position(quantized, layout)[mask], by_position(expected, layout)[0])
    assert torch.equal(indices[mask], expected_indices[0])
    assert (loss, perplexity) == (expected_loss, expected_perplexity)
    assert (by_position(quantized, layout)[~mask] == 0).all()
    assert (indices[~mask] == -1).all()
    for result, total in ((quantized, loss), (expected, expected_loss)):
        (result.square().sum() + total).backward()
    assert torch.equal(by_position(z.grad, layout)[mask], by_position(alone.grad, layout)[0])
    assert (by_position(z.grad, layout)[~mask] == 0).all()
    for quantizer in (masked, plain):
        quantizer.revive()
    assert_equal_tensors(masked.state_dict(), plain.state_dict())


@pytest.mark.parametrize("layout", ["BCL", "BLC"])
def test_masked_indices_decode_to_the_quantized_sequence(layout):
    z, mask, _ = padded(layout)
    quantizer = small_quantizer(interpolation_factor=1, input_layout=layout).eval()
    indices = quantizer.encode_indices(z, mask=mask)
    quantized, _, (_, _, forward_indices) = quantizer(z, mask=mask)
    assert torch.equal(indices, forward_indices)
    assert torch.equal(quantizer.decode_indices(indices), quantized)
    assert quantizer.code_counts(indices)[0].sum() == mask.sum() * quantizer.codes_per_position


@pytest.mark.parametrize("layout", ["BCL", "BLC"])
@pytest.mark.parametrize("training", [False, True])
def test_a_mask_passes_compile_in_one_graph_and_export(training, layout):
    torch.compiler.reset()
    z, mask, _ = padded(layout)
    settings = {"interpolation_factor": 1, "input_layout": layout}
    quantizer, other = (small_quantizer(**settings).train(training) for _ in range(2))
    expected, expected_loss, (_, _, indices) = other(z, mask)
    forwards = [torch.compile(quantizer, fullgraph=True, backend="aot_eager")]
    if not training:
        shorter = (z[:, :, :3], mask[:, :3]) if layout == "BCL" else (z[:, :3], mask[:, :3])
        forwards.append(torch.export.export(quantizer, (z, mask)).module())
        assert torch.equal(torch.compile(quantizer, fullgraph=True, backend="eager")(*shorter)[0], other(*shorter)[0])
    for forward in forwards:
        found, loss, (_, _, found_indices) = forward(z, mask)
        assert torch.equal(found_indices, indices)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(loss, expected_loss)


def test_ninety_percent_of_padding_does_not_hide_what_is_used():
    quantizer = small_quantizer(interpolation_factor=1, input_layout="BLC").eval()
    z, mask = torch.zeros(4, 1000, 8), torch.zeros(4, 1000, dtype=torch.bool)
    mask[:, :100] = True
    z[mask] = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    loss, perplexity = (quantizer(z, mask=mask)[1], quantizer(z, mask=mask)[2][0])
    alone = quantizer(z[:, :100])
    assert (loss, perplexity) == (alone[1], alone[2][0])
    assert quantizer(z)[2][0] < 0.5 * perplexity


@pytest.mark.parametrize(
    ("changes", "mask", "message"),
    [
        ({}, torch.ones(2, 4, dtype=torch.bool), "interpolation_factor=2"),
        ({"input_layout": "BCHW", "interpolation_factor": 1}, torch.ones(2, 4, dtype=torch.bool), "BCHW"),
        ({"interpolation_factor": 1}, torch.ones(2, 4), r"mask must be bool of the shape \(2, 4\), got torch.float32"),
        ({"interpolation_factor": 1}, torch.ones(2, 5, dtype=torch.bool), r"got torch.bool of \(2, 5\)"),
        ({"interpolation_factor": 1}, torch.zeros(2, 4, dtype=torch.bool), "True for at least one position"),
    ],
)
def test_masks_that_mean_nothing_are_refused(changes, mask, message):
    quantizer = small_quantizer(**{"input_layout": "BLC"} | changes)
    z = torch.randn(2, 8, 4, 4) if quantizer.input_layout == "BCHW" else torch.randn(2, 4, 8)
    for call in (quantizer, quantizer.encode_indices):
        with pytest.raises(ValueError, match=message):
            call(z, mask=mask)


def test_without_a_mask_an_index_of_minus_one_is_refused_where_interpolation_or_maps_are():
    for changes in ({"input_layout": "BLC"}, {"interpolation_factor": 1}):
        quantizer = small_quantizer(**changes)
        shape = (1, 3, quantizer.codes_per_position) if quantizer.spatial_axes == 1 else (1, 3, 3, 2)
        with pytest.raises(ValueError, match="from -1 to -1"):
            quantizer.decode_indices(torch.full(shape, -1))
