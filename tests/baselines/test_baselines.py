"""Every quantizer of the comparison keeps to one interface, says truly what its codes cost, and can learn."""

import math

import pytest
import torch

from looc_ldm import LooCQuantizer, LooCSmallVQModel
from looc_ldm.baselines import (
    BinarySphericalQuantizer,
    FactorizedQuantizer,
    FiniteScalarQuantizer,
    GroupSphericalQuantizer,
    LookupFreeQuantizer,
    ProductQuantizer,
    ResidualFiniteScalarQuantizer,
    ResidualQuantizer,
    ResidualSimVQQuantizer,
    StochasticQuantizer,
    gaussian_likelihood,
)

N_Q = 16
MAKERS = {
    "PQ": lambda: ProductQuantizer(N_Q, 8, 4),
    "RQ": lambda: ResidualQuantizer(N_Q, 32, depth=3),
    "factorized": lambda: FactorizedQuantizer(N_Q, 64, 4),
    "FSQ": lambda: FiniteScalarQuantizer(N_Q, (5, 5, 5), codes_per_position=2),
    "LFQ": lambda: LookupFreeQuantizer(N_Q, 6, codes_per_position=2),
    "SQ": lambda: StochasticQuantizer(N_Q, 32),
    "BSQ": lambda: BinarySphericalQuantizer(N_Q, 6, codes_per_position=2),
    "GSQ": lambda: GroupSphericalQuantizer(N_Q, 32, 4),
    "SimVQ": lambda: ResidualSimVQQuantizer(N_Q, 32, depth=2),
    "residual FSQ": lambda: ResidualFiniteScalarQuantizer(N_Q, (5, 5, 5), depth=2),
}


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
        # The loss of SQ-VAE is a divergence in nats per image.
        objective = gaussian_likelihood(x, decoded) if isinstance(quantizer, StochasticQuantizer) else error
        (loss + objective).backward()
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
        (
            lambda: ProductQuantizer(8, 16, 4, input_layout="BLC"),
            "input_layout .* must be 'BCHW', got 'BLC'",
        ),
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
    quantizer = StochasticQuantizer(2, 2, annealing=0.1)
    assert quantizer.temperature == 1
    quantizer.revive()
    assert quantizer.temperature.item() == pytest.approx(math.exp(-0.1))


def test_residual_quantization_has_one_straight_through_estimate_and_uses_its_codebook():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(8, 32, depth=4)
    z = torch.randn(2, 8, 4, 4, requires_grad=True)
    quantizer(z)[0].sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))
    # Codevectors that nobody uses start anew.
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


def test_a_model_whose_config_describes_another_quantizer_is_not_saved(tmp_path):
    """Loading would make a `LooCQuantizer` of its weights."""
    model = LooCSmallVQModel(in_channels=1, out_channels=1, hidden_channels=8, vq_embed_dim=8)
    model.save_pretrained(tmp_path / "own")
    for make in (lambda: StochasticQuantizer(8, 16), lambda: ProductQuantizer(8, 16, 4)):
        model.quantize = make()
        with pytest.raises(
            ValueError, match=r"this model has a \w+, but a saved LooC(Small)?VQModel always loads with a LooCQuantizer"
        ):
            model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_gsq_is_looc_with_cosine_distance_on_a_unit_sphere():
    gsq = GroupSphericalQuantizer(N_Q, 32, 4).eval()
    looc = LooCQuantizer(N_Q, 32, 4, interpolation_factor=1, distance="cosine").eval()
    looc.embedding.weight.data.copy_(gsq.embedding.weight)
    assert torch.equal(gsq.encode_indices(feature_map()), looc.encode_indices(feature_map()))
    quantized = gsq(feature_map())[0].unflatten(1, (-1, 4))
    torch.testing.assert_close(quantized.norm(dim=2), torch.ones(4, 4, 5, 6))
