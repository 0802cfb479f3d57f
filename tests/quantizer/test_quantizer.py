"""Interpolate, quantize, pool: `LooCQuantizer` against closed forms, slow references and other people's quantizers."""

import random
import re
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import VectorQuantizer

import tiny
from looc_ldm import LooCQuantizer
from looc_ldm.quantizer.loocq import INPUT_LAYOUTS, SEGMENT_LAYOUTS

small_quantizer = partial(tiny.small_quantizer, codebook_update="gradient")


def blur(z: torch.Tensor, a: float) -> torch.Tensor:
    """[a, 1 - 2a, a] along each axis, borders replicated: what upsampling and pooling alone do (LooC, section 3.3)."""
    taps = torch.tensor([a, 1 - 2 * a, a], dtype=z.dtype)
    if z.ndim == 3:
        return F.conv1d(F.pad(z, (1, 1), mode="replicate"), taps.expand(z.shape[1], 1, 3), groups=z.shape[1])
    kernel = torch.outer(taps, taps).expand(z.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(z, (1, 1, 1, 1), mode="replicate"), kernel, groups=z.shape[1])


BLURS = [(1, 0.0), (2, 1 / 8), (3, 1 / 9), (4, 1 / 8), (5, 0.12)]


def exact_quantizer(z: torch.Tensor, s: int) -> LooCQuantizer:
    """A quantizer whose codebook holds every vector of the interpolated map of `z`."""
    mode, layout = ("bilinear", "BCHW") if z.ndim == 4 else ("linear", "BCL")
    vectors = F.interpolate(z, scale_factor=s, mode=mode).movedim(1, -1).reshape(-1, z.shape[1])
    arguments = {"distance": "euclidean", "anchor": "none", "input_layout": layout}
    quantizer = LooCQuantizer(z.shape[1], len(vectors), z.shape[1], s, **arguments)
    quantizer.embedding.weight.data.copy_(vectors)
    return quantizer


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 7)])
@pytest.mark.parametrize(("s", "a"), BLURS)
def test_exact_quantization_leaves_the_blur_of_interpolate_and_pool(s, a, shape, training):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantized, loss, _ = exact_quantizer(z, s).train(training)(z)
    torch.testing.assert_close(quantized, blur(z, a), rtol=0, atol=1e-6)
    assert loss < 1e-12


@pytest.mark.parametrize("layout", SEGMENT_LAYOUTS)
@pytest.mark.parametrize(("s", "a"), BLURS)
def test_the_straight_through_gradient_is_the_transposed_blur(s, a, layout):
    z = torch.randn(2, 8, 4, 5, requires_grad=True)
    upstream = torch.randn(2, 8, 4, 5)
    quantizer = small_quantizer(interpolation_factor=s, segment_layout=layout, gradient="straight-through")
    (gradient,) = torch.autograd.grad(quantizer(z)[0], z, upstream)
    (transposed,) = torch.autograd.grad(blur(z, a), z, upstream)
    torch.testing.assert_close(gradient, transposed, rtol=0, atol=1e-5)


def sources(size: int, s: int, i: int) -> list[tuple[int, float]]:
    """Sources of sample `i` of `size * s` bilinear samples: two (position, weight)."""
    x = min(max((i + 0.5) / s - 0.5, 0), size - 1)
    low = min(int(x), size - 2)
    return [(low, low + 1 - x), (low + 1, x - low)]


def slow_quantize(z, codebook, s: int, layout: str, distance: str):
    """The method for one image or sequence, one number at a time, in float64. Returns (n_q, H, W) and (H, W, C)."""
    if z.ndim == 2:
        quantized, indices = slow_quantize_map(z[:, None], codebook, (1, s), layout, distance)
        return quantized[:, 0], indices[0]
    return slow_quantize_map(z, codebook, (s, s), layout, distance)


def slow_quantize_map(z, codebook, scales: tuple[int, int], layout: str, distance: str):
    codebook = codebook.double()
    channels, height, width = z.shape
    numbers, d = z.double().tolist(), codebook.shape[1]
    quantized, indices = torch.zeros_like(z, dtype=torch.float64), []
    for y in range(height):
        for x in range(width):
            values = {}  # (channel, dy, dx) -> interpolated value
            for dy in range(scales[0]):
                for dx in range(scales[1]):
                    for c in range(channels):
                        values[c, dy, dx] = sum(
                            wy * wx * numbers[c][py][px]
                            for py, wy in sources(height, scales[0], y * scales[0] + dy)
                            for px, wx in sources(width, scales[1], x * scales[1] + dx)
                        )
            if layout == "channel":
                order = sorted(values, key=lambda place: (place[1], place[2], place[0]))
            else:
                order = sorted(values)
            for start in range(0, len(order), d):
                segment = torch.tensor([values[place] for place in order[start : start + d]], dtype=torch.float64)
                if distance == "cosine":
                    index = F.cosine_similarity(codebook, segment[None]).argmax()
                else:
                    index = (codebook - segment).square().sum(1).argmin()
                indices.append(index)
                for place, value in zip(order[start : start + d], codebook[index], strict=True):
                    quantized[place[0], y, x] += value / (scales[0] * scales[1])  # average pooling
    return quantized, torch.stack(indices).view(height, width, -1)


def random_cases(input_layout: str, layout: str, distance: str, count: int):
    """(quantizer, feature map (B, n_q, H, W) or (B, n_q, L)) of random sizes and dtypes."""
    choose = random.Random(f"{input_layout} {layout} {distance}")
    axes = len(input_layout) - 2
    for _ in range(count):
        s, channels = choose.randint(1, 4), choose.randint(2, 8)
        divided = channels * (s**axes if layout == "patch" else 1)
        d = choose.choice([d for d in range(1 + (distance == "cosine"), divided + 1) if divided % d == 0])
        quantizer = small_quantizer(
            vq_embed_dim=channels,
            num_codevectors=choose.randint(2, 40),
            codevector_dim=d,
            interpolation_factor=s,
            segment_layout=layout,
            distance=distance,
            input_layout=input_layout,
        )
        shape = [choose.randint(1, 2), channels, *(choose.randint(1, 4) for _ in range(axes))]
        dtype = choose.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
        yield quantizer, torch.randn(shape).to(dtype)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("layout", SEGMENT_LAYOUTS)
@pytest.mark.parametrize("input_layout", INPUT_LAYOUTS)
def test_output_and_codes_are_those_of_a_slow_loop(input_layout, layout, distance):
    for quantizer, features in random_cases(input_layout, layout, distance, 6):
        z = features.transpose(1, 2) if input_layout == "BLC" else features
        quantized, _, (_, _, indices) = quantizer.eval()(z)
        assert (quantized.shape, quantized.dtype) == (z.shape, z.dtype)
        assert torch.equal(quantizer.encode_indices(z), indices)
        assert torch.equal(quantizer.decode_indices(indices).to(z.dtype), quantized)
        assert indices.shape[-1] == quantizer.codes_per_position
        with torch.no_grad():
            assert torch.equal(quantizer(z)[0], quantized)
        if input_layout == "BLC":
            quantized = quantized.transpose(1, 2)
        for one, found, codes in zip(features.float(), quantized, indices, strict=True):
            s = quantizer.interpolation_factor
            expected, expected_codes = slow_quantize(one, quantizer.codebook.detach(), s, layout, distance)
            assert torch.equal(codes, expected_codes), (quantizer, z.shape)
            rounding = torch.finfo(z.dtype).eps
            torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=1e-6)


def test_one_segment_without_interpolation_is_the_vector_quantizer_of_diffusers():
    ours = small_quantizer(codevector_dim=8, interpolation_factor=1, distance="euclidean", anchor="none")
    theirs = VectorQuantizer(32, 8, beta=0.25, legacy=False, sane_index_shape=True)
    theirs.embedding.load_state_dict(ours.embedding.state_dict())
    z = torch.randn(2, 8, 4, 4)
    quantized, loss, (_, _, indices) = ours(z)
    expected, expected_loss, (_, _, expected_indices) = theirs(z)
    assert torch.equal(indices[..., 0], expected_indices)
    torch.testing.assert_close(quantized, expected)
    torch.testing.assert_close(loss, expected_loss)


def test_many_segments_without_interpolation_are_the_heads_of_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch")
    ours = small_quantizer(interpolation_factor=1, distance="euclidean").eval()
    theirs = library.VectorQuantize(
        dim=8, codebook_dim=4, codebook_size=32, heads=2, separate_codebook_per_head=False, accept_image_fmap=True
    ).eval()
    theirs._codebook.embed.copy_(ours.codebook.detach()[None])
    z = torch.randn(2, 8, 4, 4)
    quantized, _, (_, _, indices) = ours(z)
    expected, expected_indices, _ = theirs(z)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(quantized, expected)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_beta_weighs_the_commitment_term_only(distance):
    z = torch.randn(2, 8, 4, 4)
    to_z, to_codebook = [], []
    for beta in (0.25, 1.0):
        quantizer, features = small_quantizer(commitment_weight=beta, distance=distance), z.clone().requires_grad_()
        gradients = torch.autograd.grad(quantizer(features)[1], [features, quantizer.embedding.weight])
        to_z.append(gradients[0])
        to_codebook.append(gradients[1])
    torch.testing.assert_close(to_z[1], 4 * to_z[0])
    torch.testing.assert_close(to_codebook[1], to_codebook[0])
    assert to_codebook[0].abs().max() > 0


@pytest.mark.parametrize("training", [False, True])
def test_both_loss_terms_are_means_over_the_interpolated_map(training):
    quantizer = small_quantizer(interpolation_factor=2, commitment_weight=0.5).train(training)
    z = torch.randn(2, 8, 4, 4)
    _, loss, (_, _, indices) = quantizer(z)
    enlarged = F.interpolate(z, scale_factor=2, mode="bilinear")
    chosen = quantizer.codebook[indices].view(2, 4, 4, 2, 2, 8)  # (B, H, W, dy, dx, n_q)
    chosen = chosen.permute(0, 5, 1, 3, 2, 4).reshape(2, 8, 8, 8)
    torch.testing.assert_close(loss, 1.5 * (chosen - enlarged).square().mean())


def test_perplexity_counts_the_codes_in_even_use():
    quantizer = small_quantizer(vq_embed_dim=4, interpolation_factor=1, distance="euclidean").eval()
    for used in (1, 5, 32):
        z = quantizer.codebook.detach()[:used].T.reshape(1, 4, 1, used)
        perplexity = quantizer(z)[2][0]
        assert perplexity.item() == pytest.approx(used, rel=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", SEGMENT_LAYOUTS)
@pytest.mark.parametrize("s", [1, 2])
def test_the_axes_of_a_sequence_may_come_in_either_order(s, layout, training):
    def quantize(input_layout: str, z: torch.Tensor):
        arguments = {"interpolation_factor": s, "segment_layout": layout, "codebook_update": "ema"}
        quantizer = small_quantizer(input_layout=input_layout, **arguments).train(training)
        z = z.clone().requires_grad_()
        quantized, loss, (perplexity, _, indices) = quantizer(z)
        (gradient,) = torch.autograd.grad(quantized.square().sum() + loss, z)
        quantizer.revive()
        return quantized, gradient, loss, perplexity, indices, quantizer.codebook, quantizer.usage

    z = torch.randn(2, 8, 5)
    *maps, loss, perplexity, indices, codebook, usage = quantize("BCL", z)
    *others, loss_of_blc, _, _, codebook_of_blc, _ = quantize("BLC", z.transpose(1, 2))
    for one, other in zip(maps, others, strict=True):
        assert torch.equal(other.transpose(1, 2), one)
    assert torch.equal(loss_of_blc, loss)
    assert torch.equal(codebook_of_blc, codebook)
    if s == 1:  # then a sequence is a map of height 1
        *others, loss_of_map, perplexity_of_map, codes, codebook_of_map, usage_of_map = quantize("BCHW", z[:, :, None])
        for one, other in zip([*maps, indices], [*others, codes], strict=True):
            assert torch.equal(other.squeeze(2 if other.is_floating_point() else 1), one)
        for one, other in ((loss_of_map, loss), (perplexity_of_map, perplexity), (codebook_of_map, codebook)):
            assert torch.equal(one, other)
        assert torch.equal(usage_of_map, usage)


@pytest.mark.parametrize(
    ("layout", "s", "d"),
    [("channel", 2, 4), ("channel", 3, 8), ("patch", 2, 4), ("patch", 2, 8), ("patch", 2, 2), ("patch", 4, 8)],
)
def test_decoding_makes_nothing_of_the_interpolated_size(layout, s, d, largest_tensor):
    quantizer = small_quantizer(interpolation_factor=s, segment_layout=layout, codevector_dim=d)
    indices = torch.randint(32, (2, 16, 16, quantizer.codes_per_position))
    with largest_tensor() as largest, torch.no_grad():
        quantized = quantizer.decode_indices(indices)
    assert largest.elements <= max(quantized.numel(), indices.numel()) < quantized.numel() * s**2


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
@pytest.mark.parametrize("training", [False, True])
def test_no_tensor_is_larger_than_the_interpolated_map(training, codebook_update, distance, largest_tensor):
    arguments = {"codebook_update": codebook_update, "distance": distance, "num_codevectors": 4096}
    quantizer = small_quantizer(**arguments).train(training)
    z = torch.randn(2, 8, 32, 32, requires_grad=training)
    with largest_tensor() as largest, torch.set_grad_enabled(training):
        quantized, loss, _ = quantizer(z)
        if training:
            (quantized.sum() + loss).backward()
            quantizer.revive()
    assert largest.elements == 4 * z.numel()


@pytest.mark.parametrize("layout", SEGMENT_LAYOUTS)
@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
def test_backward_needs_one_tensor_of_the_interpolated_size_and_the_codes(codebook_update, layout):
    quantizer = small_quantizer(codebook_update=codebook_update, segment_layout=layout)
    z = torch.randn(2, 8, 32, 32, requires_grad=True)
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        *_, (_, _, indices) = quantizer(z)
    needed = 4 * z.numel() * 4 + indices.numel() * 8
    assert needed <= sum(kept.values()) <= needed + 1024


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_codebook_and_usage_stay_float32_and_the_output_follows_the_input(dtype):
    quantizer = small_quantizer()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    assert before.keys() == {"embedding.weight", "usage"}
    around = nn.Sequential(nn.Conv2d(8, 8, 1), quantizer).to(dtype)
    for name, tensor in quantizer.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])
    assert around[0].weight.dtype == dtype
    z = torch.randn(2, 8, 4, 4, dtype=dtype, requires_grad=True)
    quantized, loss, _ = quantizer(z)
    (quantized.sum() + loss).backward()
    assert (quantized.dtype, loss.dtype, z.grad.dtype) == (dtype, torch.float32, dtype)
    assert quantizer.embedding.weight.grad.dtype == torch.float32
    quantizer.half()
    assert quantizer.embedding.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_autocast_changes_no_code(distance):
    quantizer = small_quantizer(num_codevectors=256, distance=distance, anchor="none")
    z = torch.randn(4, 8, 8, 8)
    expected, expected_loss, (_, _, expected_indices) = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        quantized, loss, (_, _, indices) = quantizer(z)
        assert torch.equal(quantizer.encode_indices(z), expected_indices)
        assert torch.equal(quantizer.eval().decode_indices(indices), quantizer(z)[0])
    assert torch.equal(indices, expected_indices)
    assert torch.equal(quantized, expected)
    assert torch.equal(loss, expected_loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vq_embed_dim": 0}, "vq_embed_dim .* 0"),
        ({"num_codevectors": -3}, "num_codevectors .* -3"),
        ({"num_codevectors": 1}, "num_codevectors .* 1"),
        ({"codevector_dim": 4.0}, r"codevector_dim .* 4\.0"),
        ({"interpolation_factor": 1.5}, r"interpolation_factor .* 1\.5"),
        ({"interpolation_factor": "2"}, "interpolation_factor .* '2'"),
        ({"segment_layout": "pixel"}, "segment_layout .* channel, patch.* 'pixel'"),
        ({"distance": "l2"}, "distance .* cosine, euclidean.* 'l2'"),
        ({"anchor": "nearest"}, "anchor .* closest, random, probrandom, none.* 'nearest'"),
        ({"usage_decay": 1.0}, r"usage_decay .* 1\.0"),
        ({"commitment_weight": -0.1}, r"commitment_weight .* -0\.1"),
        ({"codebook_update": "mean"}, "codebook_update .* ema, gradient.* 'mean'"),
        ({"input_layout": "LBC"}, "input_layout .* BCHW, BCL, BLC.* 'LBC'"),
        ({"codevector_dim": 1, "distance": "cosine"}, "codevector_dim=1 .*euclidean"),
        ({"codevector_dim": 3}, "codevector_dim=3 does not divide vq_embed_dim = 8"),
        ({"codevector_dim": 16}, "codevector_dim=16 does not divide vq_embed_dim = 8"),
        ({"codevector_dim": 5, "segment_layout": "patch"}, r"codevector_dim=5 .* interpolation_factor\*\*2 = 32"),
        (
            {"codevector_dim": 32, "segment_layout": "patch", "input_layout": "BCL"},
            r"codevector_dim=32 .* interpolation_factor\*\*1 = 16",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name_and_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        LooCQuantizer(**{"vq_embed_dim": 8, "num_codevectors": 32, "codevector_dim": 4, **arguments})


SHAPES_REFUSED = [
    ("BCHW", (2, 7, 4, 4), "batch, 8, height, width"),
    ("BCHW", (8, 4, 4), "batch, 8, height, width"),
    ("BCHW", (2, 4, 4, 8), "batch, 8, height, width"),
    ("BCL", (2, 4, 8), "batch, 8, length"),
    ("BCL", (2, 8, 4, 4), "batch, 8, length"),
    ("BLC", (2, 8, 4), "batch, length, 8"),
    ("BLC", (2, 4), "batch, length, 8"),
]


@pytest.mark.parametrize(("input_layout", "shape", "expected"), SHAPES_REFUSED)
def test_a_feature_map_of_another_shape_is_refused(input_layout, shape, expected):
    quantizer = small_quantizer(input_layout=input_layout)
    for quantize in (quantizer, quantizer.encode_indices, quantizer.search):
        with pytest.raises(ValueError, match=re.escape(f"({expected}), got torch.float32 of {shape}")):
            quantize(torch.randn(shape))


@pytest.mark.parametrize("training", [False, True])
def test_a_feature_map_of_nothing_or_of_whole_numbers_is_refused(training):
    quantizer = small_quantizer().train(training)
    for shape in ((0, 8, 4, 4), (2, 8, 0, 4)):
        with pytest.raises(ValueError, match=re.escape(f"not be empty, got the shape {shape}")):
            quantizer(torch.randn(shape))
    with pytest.raises(ValueError, match=r"floating point .* got torch\.int64"):
        quantizer(torch.zeros(2, 8, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("input_layout", "shape"),
    [("BCHW", (2, 4, 4, 7)), ("BCHW", (2, 4, 4)), ("BCHW", (2, 4, 4, 2, 4)), ("BCL", (2, 4, 8)), ("BLC", (2, 4, 4, 4))],
)
def test_codes_of_another_shape_are_refused(input_layout, shape):
    expected = "(batch, height, width, 8)" if input_layout == "BCHW" else "(batch, length, 4)"
    with pytest.raises(ValueError, match=re.escape(f"{expected}, got {shape}")):
        small_quantizer(input_layout=input_layout).decode_indices(torch.zeros(shape, dtype=torch.int64))


def test_codes_are_decoded_from_any_integer_type_and_others_refused():
    quantizer = small_quantizer()
    codes = quantizer.encode_indices(torch.randn(2, 8, 3, 3))
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(quantizer.decode_indices(codes.to(dtype)), quantizer.decode_indices(codes))
    for wrong, message in (
        (codes.float(), r"indices must be integers, got torch\.float32"),
        (codes - 32, r"indices must be in \[0, 32\), got values from -"),
        (codes + 32, r"indices must be in \[0, 32\), got values from \d+ to \d+"),
    ):
        with pytest.raises(ValueError, match=message):
            quantizer.decode_indices(wrong)
