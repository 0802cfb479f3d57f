"""Every quantizer of the comparison keeps to one interface, says truly what its codes cost, and can learn."""

import math
from pathlib import Path

import pytest
import torch

from looc_ldm import LooCSmallVQModel
from looc_ldm.baselines import (
    FactorizedQuantizer,
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    ProductQuantizer,
    ResidualFiniteScalarQuantizer,
    ResidualQuantizer,
    StochasticQuantizer,
    gaussian_likelihood,
)
from tiny import import_file

# Only the benchmark of the paper's tables has HQA.
HQA = import_file(Path(__file__).resolve().parents[2] / "benchmarks" / "hierarchical.py")
N_Q = 16
MAKERS = {
    "PQ": lambda: ProductQuantizer(N_Q, 8, 4),
    "RQ": lambda: ResidualQuantizer(N_Q, 32, depth=3),
    "factorized": lambda: FactorizedQuantizer(N_Q, 64, 4),
    "FSQ": lambda: FiniteScalarQuantizer(N_Q, (5, 5, 5), codes_per_position=2),
    "LFQ": lambda: LookupFreeQuantizer(N_Q, 6, codes_per_position=2),
    "HQA": lambda: HQA.AssignedQuantizer(N_Q, 32),
    "SQ": lambda: StochasticQuantizer(N_Q, 32),
    "residual FSQ": lambda: ResidualFiniteScalarQuantizer(N_Q, (5, 5, 5), depth=2),
}

# Objectives of the quantizers whose loss is a divergence in nats per image.
OBJECTIVES = {StochasticQuantizer: gaussian_likelihood, HQA.AssignedQuantizer: HQA.summed_squared_error}


@pytest.fixture(params=MAKERS)
def quantizer(request):
    torch.manual_seed(0)
    return MAKERS[request.param]()


def feature_map(batch: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, N_Q, 5, 6, generator=torch.Generator().manual_seed(seed))


def test_codes_decode_to_what_forward_returns(quantizer):
    quantizer.eval()
    quantized, loss, (perplexity, _, indices) = quantizer(feature_map())
    assert quantized.shape == (4, N_Q, 5, 6)
    assert indices.shape == (4, 5, 6, quantizer.codes_per_position)
    assert (loss.ndim, loss.dtype, indices.dtype) == (0, torch.float32, torch.int64)
    torch.testing.assert_close(quantizer.decode_indices(indices), quantized, atol=1e-5, rtol=0)
    assert torch.equal(quantizer.encode_indices(feature_map()), indices)
    assert 1 <= perplexity <= max(quantizer.code_sizes)


def test_the_rate_is_what_the_codes_take(quantizer):
    indices = quantizer.encode_indices(feature_map(64))
    for slot, size in enumerate(quantizer.code_sizes):
        assert 0 <= indices[..., slot].min() <= indices[..., slot].max() < size
    assert quantizer.bits_per_position == pytest.approx(sum(map(math.log2, quantizer.code_sizes)))
    counts = quantizer.code_counts(indices)
    for book, count in enumerate(counts):
        own = indices[..., [slot for slot, of in enumerate(quantizer.codebooks) if of == book]]
        assert torch.equal(count, torch.bincount(own.flatten(), minlength=len(count)))
    assert sum(int(count.sum()) for count in counts) == indices.numel()


def test_gradients_reach_the_features_and_the_dtype_is_kept(quantizer):
    z = feature_map().bfloat16().requires_grad_()
    quantized, loss, _ = quantizer(z)
    assert quantized.dtype == torch.bfloat16
    (quantized.float().square().mean() + loss).backward()
    assert z.grad.abs().sum() > 0


def test_it_learns_to_tell_a_few_features_apart(quantizer):
    """Eight clusters, encoded by a linear layer and decoded by two: hardly any of their variance is lost."""
    torch.manual_seed(0)
    centres = torch.randn(8, N_Q) * 2
    encoder = torch.nn.Conv2d(N_Q, N_Q, 1)  # codes of few dimensions need more than a linear decoder
    decoder = torch.nn.Sequential(torch.nn.Conv2d(N_Q, 64, 1), torch.nn.ReLU(), torch.nn.Conv2d(64, N_Q, 1))
    model = torch.nn.ModuleList([encoder, quantizer, decoder])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(400):
        x = centres[torch.randint(8, (8, 4, 4))].movedim(-1, 1)
        quantized, loss, _ = quantizer(encoder(x))
        decoded = decoder(quantized)
        error = (decoded - x).square().mean()
        optimizer.zero_grad()
        objective = OBJECTIVES.get(type(quantizer), lambda x, decoded: (decoded - x).square().mean())
        (loss + objective(x, decoded)).backward()
        optimizer.step()
        quantizer.revive()
    assert error < 0.1 * centres.var()


def test_it_takes_the_place_of_looc_in_a_model(quantizer):
    model = LooCSmallVQModel(in_channels=1, out_channels=1, hidden_channels=N_Q, sample_size=16)
    model.quantize = quantizer
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    output = model(x)
    assert output.sample.shape == x.shape
    model.eval()
    torch.testing.assert_close(model.decode_indices(model.encode_indices(x)).sample, model(x).sample)


def test_encoding_moves_no_average(quantizer):
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.train()
    quantizer.encode_indices(feature_map(seed=3))
    assert quantizer.training
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResidualQuantizer(8, 64, 0), "depth must be a positive whole number, got 0"),
        (lambda: LookupFreeQuantizer(8, 8, -1), "codes_per_position must be a positive whole number, got -1"),
        (lambda: FactorizedQuantizer(8, 1, 4), "at least 2 values, got 1"),
        (lambda: ProductQuantizer(8, 16, 4, input_layout="BLC"), "takes feature maps, .*, not 'BLC'"),
    ],
)
def test_a_wrong_setting_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_product_quantization_is_independent_quantizers_whose_losses_are_added():
    torch.manual_seed(0)
    product = ProductQuantizer(8, 16, 4, distance="euclidean").eval()
    z = torch.randn(2, 8, 3, 3)
    quantized, loss, _ = product(z)
    parts = [segment(z[:, 4 * i : 4 * i + 4]) for i, segment in enumerate(product.segments)]
    assert torch.equal(quantized, torch.cat([part[0] for part in parts], dim=1))
    assert loss.item() == pytest.approx(sum(part[1].item() for part in parts))
    assert product.codebook_scalars == 2 * 16 * 4
    with pytest.raises(ValueError, match="codevector_dim=3 does not divide vq_embed_dim=8"):
        ProductQuantizer(8, 16, 3)


def test_residual_codes_share_one_codebook_and_each_refines_the_sum():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(8, 64, depth=3, kmeans_init=True)
    z = torch.randn(16, 8, 4, 4)
    for _ in range(30):
        quantizer(z)
    quantizer.eval()
    assert quantizer.codebook_scalars == 64 * 8
    errors = [
        (quantizer.inner.get_codes_from_indices(quantizer(z)[2][2].flatten(1, 2))[: depth + 1].sum(0).transpose(1, 2)
         .reshape(z.shape) - z).square().mean().item()
        for depth in range(3)
    ]  # fmt: skip
    assert errors[0] > errors[1] > errors[2]


def test_wrong_shapes_are_refused(quantizer):
    with pytest.raises(ValueError, match=r"z must have the shape \(batch, 16, H, W\), got \(2, 8, 4, 4\)"):
        quantizer(torch.randn(2, 8, 4, 4))
    with pytest.raises(ValueError, match="indices must have the shape"):
        quantizer.decode_indices(torch.zeros(2, 4, 4, 99, dtype=torch.int64))


def test_stochastic_codes_are_drawn_by_distance_and_become_certain():
    torch.manual_seed(0)
    quantizer = StochasticQuantizer(2, 2)
    quantizer.embedding.weight.data = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    z = torch.tensor([0.2, 0.0]).view(1, 2, 1, 1).expand(4000, -1, -1, -1)
    quantizer.steps += 2_000_000  # at a low temperature a draw is one codevector
    share = quantizer(z)[0][:, 0].mean().item()
    assert share == pytest.approx(1 / (1 + math.exp((0.64 - 0.04) / 2)), abs=0.03)
    quantizer.log_variance.data.fill_(-10)
    assert (quantizer(z)[0] == 0).all()
    assert quantizer.eval()(z)[2][2].unique().tolist() == [0]


def test_temperature_falls_with_steps():
    quantizer = StochasticQuantizer(2, 2, annealing=0.1)
    assert quantizer.temperature == 1
    quantizer.revive()
    assert quantizer.temperature.item() == pytest.approx(math.exp(-0.1))


def test_the_codevector_drawn_least_moves_beside_the_one_drawn_most():
    """After 20 batches, and one at a time (Williams et al. 2020)."""
    torch.manual_seed(0)
    quantizer = HQA.AssignedQuantizer(4, 8)
    with torch.no_grad():
        quantizer.embedding.weight[4:] += 100  # far from everything
    for _ in range(20):
        quantizer(torch.randn(2, 4, 3, 3))
    assert quantizer.embedding.weight[4:].min() > 90
    most = quantizer.embedding.weight[quantizer.drawn.argmax()].clone()
    quantizer(torch.randn(2, 4, 3, 3))
    weight = quantizer.embedding.weight
    assert (weight[4:].amax(1) < 90).sum() == 1
    assert (weight - most).norm(dim=1).sort().values[1] < 0.1


def test_the_temperature_of_assignments_falls_to_nearly_nothing_by_the_end_of_training():
    quantizer = HQA.AssignedQuantizer(2, 2, initial_temperature=0.5, anneal_batches=10)
    assert quantizer.temperature.item() == pytest.approx(0.5)
    for _ in range(5):
        quantizer(torch.randn(1, 2, 2, 2))
    assert quantizer.temperature.item() == pytest.approx((0.5 + 0.001) / 2)
    for _ in range(10):
        quantizer(torch.randn(1, 2, 2, 2))
    assert quantizer.temperature.item() == pytest.approx(0.001, rel=1e-3)


def test_residual_quantization_has_one_straight_through_estimate_however_deep():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(8, 32, depth=4)
    z = torch.randn(2, 8, 4, 4, requires_grad=True)
    quantizer(z)[0].sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))


def test_residual_codes_that_nobody_uses_start_anew():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(8, 64, depth=2)
    z = torch.randn(64, 8, 4, 4)
    for _ in range(300):
        quantizer(z)
    counts = quantizer.code_counts(quantizer.encode_indices(z))[0]
    assert (counts > 0).float().mean() > 0.95


def test_factorized_codes_are_chosen_by_cosine_in_the_projection():
    torch.manual_seed(0)
    quantizer = FactorizedQuantizer(8, 16, 2)
    z = torch.randn(3, 8, 4, 4)
    indices = quantizer(z)[2][2][..., 0]
    projected = quantizer.project_in(z.movedim(1, -1))
    cosines = torch.nn.functional.cosine_similarity(projected[..., None, :], quantizer.embedding.weight, dim=-1)
    assert torch.equal(indices, cosines.argmax(-1))
    with torch.no_grad():
        quantizer.embedding.weight *= 3  # lengths mean nothing
    torch.testing.assert_close(quantizer(z)[0], quantizer.decode_indices(indices[..., None]))


def hierarchy() -> torch.nn.Module:
    torch.manual_seed(0)
    return HQA.HierarchicalVQModel(1, 1, hidden_channels=32, sample_size=16, num_vq_embeddings=16, vq_embed_dim=8)


def test_a_hierarchy_stores_its_upper_codes_only():
    model = hierarchy().eval()
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    indices = model.encode_indices(x)
    assert indices.shape == (2, 4, 4, 1)
    assert model.bits_per_image(16, 16) == 4 * 4 * 4  # positions, log2 16
    torch.testing.assert_close(model.decode_indices(indices).sample, model(x).sample)


def test_no_gradient_passes_from_the_upper_level_to_the_lower():
    model = hierarchy().train()
    x = torch.rand(8, 1, 16, 16) * 2 - 1
    output = model(x)
    _, lower_loss, _ = model.lower_quantize.eval()(model.lower_encoder(x))
    expected = torch.autograd.grad(lower_loss, list(model.lower_encoder.parameters()))
    output.commit_loss.backward()
    for parameter, gradient in zip(model.lower_encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(parameter.grad is None for parameter in model.lower_decoder.parameters())
    assert model.encoder[0].weight.grad.abs().sum() > 0


def test_a_hierarchy_learns():
    """Its upper codes alone carry which of four images it was."""
    model = hierarchy().train()
    images = torch.nn.functional.interpolate(torch.randn(4, 1, 4, 4).clamp(-1, 1), size=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        x = images[torch.randint(4, (16,))]
        output = model(x)
        optimizer.zero_grad()
        (HQA.summed_squared_error(x, output.sample) + output.commit_loss).backward()
        optimizer.step()
    with torch.no_grad():
        reconstructed = model.eval()(images).sample
    assert (reconstructed - images).square().mean() < 0.2 * images.var()


def test_a_model_whose_config_describes_another_quantizer_is_not_saved(tmp_path):
    """Loading would make a `LooCQuantizer` of its weights."""
    model = LooCSmallVQModel(in_channels=1, out_channels=1, hidden_channels=8, vq_embed_dim=8)
    model.save_pretrained(tmp_path / "own")
    for make in (lambda: StochasticQuantizer(8, 16), lambda: ProductQuantizer(8, 16, 4)):
        model.quantize = make()
        with pytest.raises(ValueError, match=r"describes a LooCQuantizer, not the \w+ that was assigned"):
            model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
