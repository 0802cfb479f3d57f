"""One pass over the images finds what can be counted by hand, in memory that does not grow with their number."""

from functools import partial

import pytest
import torch
import torch.nn as nn

from looc_ldm import LooCSmallVQModel, LooCVQModel
from looc_ldm.analysis import collect as module
from looc_ldm.analysis.collect import Findings, collect
from looc_ldm.images.pixels import to_float, to_uint8
from looc_ldm.metrics import psnr
from tiny import noise, tiny_autoencoder

# f = 2, grey, four segments of two channels.
model_with = partial(tiny_autoencoder, channels=1, vq_embed_dim=8, num_vq_embeddings=32)


def found_in(model: LooCVQModel, images: torch.Tensor, batch_size: int = 4, **kwargs) -> Findings:
    return collect(model, to_float(images).split(batch_size), len(images), **kwargs)


# The codebook ---------------------------------------------------------------------------------------------------------


def test_use_by_segment_is_what_the_quantizer_was_constructed_for():
    model = model_with(distance="euclidean")
    chosen = [3, 3, 5, 9]  # by each segment, everywhere
    with torch.no_grad():
        model.quant_conv.weight.zero_()
        model.quant_conv.bias.copy_(model.quantize.codebook[chosen].flatten())
    findings = found_in(model, noise(3))
    counts = torch.zeros(4, 32, dtype=torch.int64)
    counts[range(4), chosen] = 3 * 8 * 8
    assert torch.equal(findings.statistics.counts, counts)
    assert findings.statistics.segment_use.tolist() == [1 / 32] * 4
    sharing = {3: 2, 5: 1, 9: 1}
    assert findings.statistics.segments_per_codevector.tolist() == [sharing.get(code, 0) for code in range(32)]
    assert findings.entropy == pytest.approx(1.5)  # shares of 1/2, 1/4 and 1/4
    assert findings.entropy_by_segment == pytest.approx(0)  # who knows the segment knows the code


def test_what_images_cost_under_an_entropy_coder_is_the_entropy_in_the_mean():
    findings = found_in(model_with(), noise(9))
    bits = findings.bits_per_pixel_each(findings.sample.indices)
    assert len(bits) == 9
    assert bits.std() > 0
    assert bits.mean().item() == pytest.approx(findings.bits_per_pixel_entropy)
    assert findings.bits_per_pixel_entropy < findings.bits_per_pixel == 8 * 8 * 4 * 5 / 16**2


# Errors ---------------------------------------------------------------------------------------------------------------


def grey_model() -> LooCVQModel:
    """Decodes everything to grey."""
    model = model_with()
    nn.init.zeros_(model.decoder.conv_out.weight)
    nn.init.zeros_(model.decoder.conv_out.bias)
    return model


def test_a_model_that_errs_in_one_corner_has_its_errors_there():
    images = torch.zeros(4, 1, 16, 16)  # grey
    images[:, :, :3, 12:] = 1  # white, in half of the images
    images[2:, :, :3, 12:] = 0
    findings = collect(grey_model(), images.split(3), 4)
    expected = torch.zeros(16, 16, dtype=torch.float64)
    expected[:3, 12:] = 0.5 / 2  # grey is 0.5 from white
    torch.testing.assert_close(findings.error_map, expected)
    assert findings.l1 == pytest.approx(0.25 * 12 / 256)


def test_errors_and_rates_are_of_the_images_without_their_padding():
    images = torch.zeros(2, 1, 16, 16)
    images[:, :, 0] = 1  # in the padding
    images[:, :, 2, 3] = 1  # the upper left corner of 12x10
    findings = collect(grey_model(), [images], 2, content_size=(12, 10))
    assert findings.error_map.shape == (12, 10)
    assert findings.error_map[0, 0] == 0.5
    assert findings.error_map.sum() == 0.5
    assert findings.bits_per_pixel == 8 * 8 * 4 * 5 / 120
    assert findings.content(findings.sample.originals).shape == (2, 1, 12, 10)


def test_psnr_and_reconstructions_are_the_models():
    model, images = model_with(), noise(5)
    with torch.no_grad():
        decoded = model(to_float(images)).sample
    each = psnr((to_float(images) + 1) / 2, (decoded.clamp(-1, 1) + 1) / 2)
    findings = found_in(model, images)
    assert findings.psnr == pytest.approx(each.mean().item())
    assert findings.sample.psnr.tolist() == pytest.approx(each.tolist())
    assert torch.equal(findings.sample.originals, images)
    assert (findings.sample.reconstructions.int() - to_uint8(decoded).int()).abs().max() <= 1


# The pass -------------------------------------------------------------------------------------------------------------


def test_batches_do_not_matter_and_the_small_model_is_analyzed_as_well():
    small = LooCSmallVQModel(in_channels=1, out_channels=1, hidden_channels=8, codevector_dim=4, num_vq_embeddings=8)
    assert found_in(small.eval(), noise(2)).downsampling_factor == 4
    model, images = model_with(), noise(7)
    one, other = found_in(model, images, batch_size=1), found_in(model, images, batch_size=7)
    assert torch.equal(one.statistics.counts, other.statistics.counts)
    assert torch.equal(one.sample.indices, other.sample.indices)
    torch.testing.assert_close(one.error_map, other.error_map, rtol=1e-5, atol=1e-6)


def test_what_is_kept_is_a_sample_whose_size_does_not_grow_with_the_data(monkeypatch):
    monkeypatch.setattr(module, "MOST_SAMPLED", 3)
    monkeypatch.setattr(module, "MOST_VECTORS", 6)
    model, images = model_with(), noise(24)
    findings = found_in(model, images)
    assert findings.statistics.counts.sum() == 24 * findings.codes_per_image  # over all images
    assert len(findings.sample.originals) == 3
    assert findings.sample.vectors.shape == (6, 2)
    numbers = [next(i for i in range(24) if torch.equal(images[i], kept)) for kept in findings.sample.originals]
    assert numbers == sorted(numbers)
    again, other = found_in(model, images), found_in(model, images, seed=1)
    assert torch.equal(findings.sample.originals, again.sample.originals)
    assert torch.equal(findings.sample.vectors, again.sample.vectors)
    assert not torch.equal(findings.sample.originals, other.sample.originals)


def test_images_that_are_missing_or_of_several_sizes_are_refused():
    model = model_with()
    with pytest.raises(ValueError, match="no images to analyze"):
        collect(model, [], 0)
    with pytest.raises(ValueError, match="should be 3 images, got 2"):
        collect(model, [torch.zeros(2, 1, 16, 16)], 3)
    with pytest.raises(ValueError, match=r"one size, got \(16, 16\) and \(8, 8\)"):
        collect(model, [torch.zeros(2, 1, 16, 16), torch.zeros(1, 1, 8, 8)], 3)
