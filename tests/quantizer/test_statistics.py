"""`codebook_statistics` counts what `encode_indices` chooses, by segment, and measures how far it is."""

import pytest
import torch

from looc_ldm.quantizer.loocq import INPUT_LAYOUTS, SEGMENT_LAYOUTS
from looc_ldm.quantizer.statistics import CodebookStatistics, codebook_statistics
from tiny import small_quantizer


@pytest.mark.parametrize("layout", SEGMENT_LAYOUTS)
@pytest.mark.parametrize("input_layout", INPUT_LAYOUTS)
@pytest.mark.parametrize("s", [1, 2])
def test_counts_are_those_of_a_slow_loop_over_segments(s, input_layout, layout):
    quantizer = small_quantizer(interpolation_factor=s, segment_layout=layout, input_layout=input_layout)
    shape = {"BCHW": (8, 3, 4), "BCL": (8, 5), "BLC": (5, 8)}[input_layout]
    maps = [torch.randn(batch, *shape) for batch in (2, 1)]
    found = codebook_statistics(quantizer, iter(maps))
    # 2 groups of 4 channels, each seen by s or s * s samples; or in "patch" every row of a position for itself.
    samples = s ** (len(input_layout) - 2)
    expected = torch.zeros(2 if layout == "channel" else 2 * samples, 32, dtype=torch.int64)
    for z in maps:
        for codes in quantizer.encode_indices(z).flatten(0, -2).tolist():
            for slot, code in enumerate(codes):
                expected[slot % 2 if layout == "channel" else slot, code] += 1
    assert torch.equal(found.counts, expected)
    assert found.counts.sum() == sum(z.numel() for z in maps) * samples // 4


@pytest.mark.parametrize(
    ("layout", "channels", "counts"),
    [("channel", [1] * 4 + [-1] * 4, [[36, 0], [0, 36]]), ("patch", [1, -1, 1], [[9, 0], [0, 9], [9, 0]])],
)
def test_a_segment_is_a_group_of_channels_or_the_patch_of_a_channel(layout, channels, counts):
    quantizer = small_quantizer(vq_embed_dim=len(channels), interpolation_factor=2, segment_layout=layout)
    with torch.no_grad():
        quantizer.embedding.weight[:2] = torch.tensor([[1.0], [-1.0]])
    z = torch.tensor(channels).float().view(1, -1, 1, 1).expand(-1, -1, 3, 3)
    assert codebook_statistics(quantizer, [z]).counts[:, :2].tolist() == counts


def test_what_is_said_of_hand_made_counts():
    # Two segments, five codevectors: 0 is used by both, 1 and 2 by one each, 3 and 4 by none.
    counts = torch.tensor([[2, 4, 0, 0, 0], [2, 0, 4, 0, 0]])
    found = CodebookStatistics(counts)
    assert found.use == pytest.approx(3 / 5)
    assert found.dead.tolist() == [3, 4]
    assert found.perplexity == pytest.approx(3)
    assert found.segment_use.tolist() == pytest.approx([2 / 5, 2 / 5])
    assert found.segments_per_codevector.tolist() == [2, 1, 1, 0, 0]


def test_perplexity_is_that_of_forward():
    quantizer, z = small_quantizer().eval(), torch.randn(2, 8, 5, 5)
    assert codebook_statistics(quantizer, [z]).perplexity == pytest.approx(quantizer(z)[2][0].item(), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_to_count_changes_nothing_in_the_quantizer(training):
    counted, other = small_quantizer().train(training), small_quantizer().train(training)
    z = torch.randn(2, 8, 4, 4)
    for quantizer in (counted, other):
        quantizer.revive()
        quantizer(z)
    codebook_statistics(counted, [3 * z, 5 * z.flip(0)])
    assert counted.training == training
    for quantizer in (counted, other):
        quantizer.revive()
    assert (counted.usage.sum() > 0) == training
    assert torch.equal(counted.codebook, other.codebook)
    assert torch.equal(counted.usage, other.usage)


def test_without_feature_maps_there_is_nothing_to_count():
    with pytest.raises(ValueError, match="no feature maps"):
        codebook_statistics(small_quantizer(), [])
    with pytest.raises(ValueError, match="batch, 8, height, width"):
        codebook_statistics(small_quantizer(), [torch.randn(2, 7, 4, 4)])
