"""Two ranks give the one-rank codebook. This file is also the script that each rank runs."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from looc_ldm import LooCQuantizer
from looc_ldm.quantizer import revival
from tiny import launch

DISTANCES = ("cosine", "euclidean")
RANDOM_ANCHORS = ("random", "probrandom")
STEPS = 20


def run_steps(
    rank: int, world_size: int, distance: str, anchor: str = "closest", **arguments
) -> dict[str, torch.Tensor]:
    """Revive after each of STEPS batches of 4, of which this rank sees its share.

    By gradient the codebook also descends the loss, averaged over ranks. Returns the last state and all losses.
    """
    torch.manual_seed(0)
    quantizer = LooCQuantizer(8, 64, 4, **{"interpolation_factor": 1, **arguments}, distance=distance, anchor=anchor)
    torch.manual_seed(rank)  # as in training: each rank draws anchors of its own
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    losses = []
    for step in range(STEPS):
        features = torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(step))
        loss = quantizer(features.chunk(world_size)[rank])[1]
        if quantizer.codebook_update == "gradient":
            optimizer.zero_grad()
            loss.backward()
            gradient = quantizer.embedding.weight.grad
            if world_size > 1 and dist.is_initialized():
                dist.all_reduce(gradient)
            gradient /= world_size
            optimizer.step()
        quantizer.revive()
        losses.append(loss.detach())
    return {**quantizer.state_dict(), "losses": torch.stack(losses)}


class Autoencoder(nn.Module):
    def __init__(self, codebook_update: str):
        super().__init__()
        self.encoder = nn.Conv2d(1, 8, 4, 4)
        self.quantize = LooCQuantizer(8, 32, 4, codebook_update=codebook_update)
        self.decoder = nn.ConvTranspose2d(8, 1, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quantized, loss, _ = self.quantize(self.encoder(x))
        return F.mse_loss(self.decoder(quantized), x) + loss


def train_autoencoder(rank: int, codebook_update: str, compiled: bool = False, **arguments) -> dict[str, torch.Tensor]:
    """Six steps of two forwards each under DistributedDataParallel."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(codebook_update)
    optimizer = torch.optim.SGD(autoencoder.parameters(), lr=0.1)  # Adam would enlarge differences of rounding
    model = DistributedDataParallel(autoencoder, **arguments)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    autoencoder.quantize.revive()
    generator = torch.Generator().manual_seed(rank)
    for _ in range(6):
        optimizer.zero_grad()
        with model.no_sync():
            forward(torch.randn(2, 1, 16, 16, generator=generator)).backward()
        forward(torch.randn(2, 1, 16, 16, generator=generator)).backward()
        optimizer.step()
        autoencoder.quantize.revive()
    return autoencoder.state_dict()


TRAININGS = {
    "averages": {"codebook_update": "ema"},
    "averages, buffers not broadcast": {"codebook_update": "ema", "broadcast_buffers": False},
    "averages, compiled": {"codebook_update": "ema", "compiled": True},
    "gradient": {"codebook_update": "gradient"},
    "gradient, buffers not broadcast": {"codebook_update": "gradient", "broadcast_buffers": False},
}
UPDATES = ("ema", "gradient")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Results of each of two gloo processes."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(__file__, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


STATE = ("embedding.weight", "usage")


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("distance", DISTANCES)
def test_ranks_do_not_drift_apart(two_ranks, distance, update):
    for name in STATE:
        assert torch.equal(two_ranks[0][distance, update][name], two_ranks[1][distance, update][name])


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("distance", DISTANCES)
def test_two_ranks_give_the_codebook_and_usage_of_one_rank_with_both_halves(two_ranks, distance, update):
    expected = run_steps(0, 1, distance, codebook_update=update)
    for name in STATE:
        torch.testing.assert_close(two_ranks[0][distance, update][name], expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_mean_of_the_ranks_losses_is_that_of_one_rank_with_both_halves_at_every_step(two_ranks, distance, update):
    expected = run_steps(0, 1, distance, codebook_update=update)["losses"]
    losses = torch.stack([rank[distance, update]["losses"] for rank in two_ranks])
    torch.testing.assert_close(losses.mean(0), expected, rtol=0, atol=1e-5)
    assert (losses[0] - losses[1]).abs().min() > 1e-5  # each saw its own half
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("distance", DISTANCES)
def test_one_half_alone_gives_another_codebook(two_ranks, distance):
    alone = run_steps(0, 2, distance)
    assert (two_ranks[0][distance, "ema"]["embedding.weight"] - alone["embedding.weight"]).abs().max() > 0.1


@pytest.mark.parametrize("training", TRAININGS)
def test_under_data_parallel_all_ranks_hold_one_codebook_and_one_usage(two_ranks, training):
    states = [rank[training] for rank in two_ranks]
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name
    assert states[0]["quantize.usage"].sum() == pytest.approx(1 - 0.99**6)


@pytest.mark.parametrize("training", TRAININGS)
def test_under_data_parallel_codebooks_drift_apart_where_nothing_is_reduced(two_ranks, training):
    first, second = (rank["not reduced", training] for rank in two_ranks)
    assert not torch.equal(first["quantize.embedding.weight"], second["quantize.embedding.weight"])
    assert not torch.equal(first["quantize.usage"], second["quantize.usage"])
    assert torch.equal(first["encoder.weight"], second["encoder.weight"])  # as data parallel itself does


def test_under_data_parallel_compiling_does_not_change_the_training(two_ranks):
    for name, expected in two_ranks[0]["averages"].items():
        torch.testing.assert_close(two_ranks[0]["averages, compiled"][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("anchor", RANDOM_ANCHORS)
def test_ranks_that_draw_their_own_anchors_do_not_drift_apart(two_ranks, anchor):
    codebooks = [rank[anchor]["embedding.weight"] for rank in two_ranks]
    assert torch.equal(*codebooks)
    assert (codebooks[0] - run_steps(0, 2, "cosine", anchor)["embedding.weight"]).abs().max() > 0.1


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {
        (distance, update): run_steps(rank, 2, distance, codebook_update=update)
        for distance in DISTANCES
        for update in UPDATES
    }
    layout = {"interpolation_factor": 2, "segment_layout": "patch"}
    results |= {anchor: run_steps(rank, 2, "cosine", anchor, **layout) for anchor in RANDOM_ANCHORS}
    results |= {name: train_autoencoder(rank, **arguments) for name, arguments in TRAININGS.items()}
    revival.reduce_over_ranks = lambda collected: collected
    results |= {("not reduced", name): train_autoencoder(rank, **arguments) for name, arguments in TRAININGS.items()}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
