"""Codevectors follow the segments that choose them: as their moving average, or by gradient."""

import io
from functools import partial

import pyarrow.parquet
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import tiny
from looc_ldm import LooCQuantizer
from looc_ldm.images.open import BUNDLED
from looc_ldm.images.pixels import to_float

small_quantizer = partial(tiny.small_quantizer, num_codevectors=64, interpolation_factor=1, anchor="none")


def segments_of(z: torch.Tensor) -> torch.Tensor:
    return z.permute(0, 2, 3, 1).reshape(-1, 4).double()


def sums_by_code(z: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(K,): how many segments chose each codevector; (K, d): their sum."""
    chosen = F.one_hot(indices.flatten(), 64).double()
    return chosen.sum(0), chosen.T @ segments_of(z)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_codevectors_are_the_average_of_all_their_segments_weighted_by_age(decay, distance):
    quantizer = small_quantizer(distance=distance, usage_decay=decay)
    before = quantizer.codebook.clone()
    usage, mean = torch.zeros(64, dtype=torch.float64), torch.zeros(64, 4, dtype=torch.float64)  # N_k, m_k
    for step in range(8):
        z = torch.randn(1 + step % 2, 8, 3, 3) + step / 4  # drifts
        _, _, (_, _, indices) = quantizer(z)
        quantizer.revive()
        count, total = sums_by_code(z, indices)
        usage = decay * usage + (1 - decay) * count / count.sum()
        mean = decay * mean + (1 - decay) * total / count.sum()
        used = usage > 0
        torch.testing.assert_close(quantizer.usage.double(), usage, rtol=1e-6, atol=0)
        torch.testing.assert_close(quantizer.codebook[used].double(), mean[used] / usage[used, None])
        assert torch.equal(quantizer.codebook[~used], before[~used])
    assert 0 < used.sum() < 64


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_revival_comes_after_the_average(distance):
    quantizer = small_quantizer(distance=distance, anchor="closest", usage_decay=0.9)
    usage = torch.zeros(64, dtype=torch.float64)
    for _ in range(5):
        z, codebook = torch.randn(2, 8, 3, 3), quantizer.codebook.double()
        _, _, (_, _, indices) = quantizer(z)
        quantizer.revive()
        count, total = sums_by_code(z, indices)
        share = count / count.sum()
        moving = 0.9 * usage[:, None] * codebook + 0.1 * total / count.sum()
        usage = 0.9 * usage + 0.1 * share
        average = torch.where(usage[:, None] > 0, moving / usage.clamp_min(1e-30)[:, None], codebook)
        if distance == "cosine":
            similarity = F.normalize(segments_of(z), dim=1) @ F.normalize(codebook, dim=1).T
        else:
            similarity = -torch.cdist(segments_of(z), codebook)
        anchors = segments_of(z)[similarity.argmax(0)]  # the codevectors' before any of this
        alpha = torch.exp(-10 * 64 * usage / 0.1 - 1e-3)[:, None]
        expected = (1 - alpha) * average + alpha * anchors
        torch.testing.assert_close(quantizer.codebook.double(), expected, rtol=0, atol=1e-5)


def test_averaged_codevectors_get_no_gradient_so_that_an_optimizer_leaves_them_alone():
    quantizer, z = small_quantizer(), torch.randn(2, 8, 4, 4, requires_grad=True)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=0.1, weight_decay=1.0)
    before = quantizer.codebook.clone()
    quantized, loss, _ = quantizer(z)
    (quantized.sum() + loss).backward()
    optimizer.step()
    assert quantizer.embedding.weight.grad is None
    assert torch.equal(quantizer.codebook, before)
    assert z.grad.abs().min() > 0


def garments(count: int) -> torch.Tensor:
    """(count, 1, 28, 28) images in [-1, 1]."""
    rows = pyarrow.parquet.read_table(BUNDLED / "fashion_mnist" / "train.parquet", columns=["image"])
    encoded = [row["bytes"] for row in rows["image"][:count].to_pylist()]
    return to_float(torch.stack([pil_to_tensor(Image.open(io.BytesIO(image))) for image in encoded]))


def losses_of_the_start(codebook_update: str, gradient: str, steps: int = 60) -> torch.Tensor:
    """The losses of a small autoencoder's first steps on Fashion-MNIST, trained as the paper's."""
    torch.manual_seed(0)
    rule = {"codebook_update": codebook_update, "gradient": gradient}
    quantizer = LooCQuantizer(128, 256, 4, interpolation_factor=1, **rule)
    encoder = nn.Sequential(
        *(nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(), nn.Conv2d(64, 128, 1)),
    )
    decoder = nn.Sequential(
        *(nn.Conv2d(128, 64, 3, 1, 1), nn.ReLU(), nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU()),
        nn.ConvTranspose2d(32, 1, 4, 2, 1),
    )
    parameters = [*encoder.parameters(), *decoder.parameters(), *quantizer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-4)
    losses = []
    for x in garments(32 * steps).split(32):
        quantized, loss, _ = quantizer(encoder(x))
        loss = loss + F.mse_loss(decoder(quantized), x) / 0.1246
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        quantizer.revive()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
@pytest.mark.parametrize("gradient", ["rotation", "straight-through"])
def test_the_loss_climbs_at_the_start_by_the_published_rule_only(codebook_update, gradient):
    losses = losses_of_the_start(codebook_update, gradient)
    climbs = (codebook_update, gradient) == ("gradient", "straight-through")
    assert losses.isfinite().all()
    if climbs:
        assert losses.max() > 2 * losses[0]
    else:
        assert losses.max() < 1.5 * losses[0]
