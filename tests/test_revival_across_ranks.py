"""Two ranks give the one-rank codebook. This file is also the script that each rank runs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from looc_ldm import LooCQuantizer

DISTANCES = ("cosine", "euclidean")
RANDOM_ANCHORS = ("random", "probrandom")
STEPS = 50


def run_steps(
    rank: int, world_size: int, distance: str, anchor: str = "closest", **arguments
) -> dict[str, torch.Tensor]:
    """Revive after each of STEPS batches of 4, of which this rank sees its share."""
    torch.manual_seed(0)
    quantizer = LooCQuantizer(8, 64, 4, **{"interpolation_factor": 1, **arguments}, distance=distance, anchor=anchor)
    torch.manual_seed(rank)  # as in training: each rank draws anchors of its own
    for step in range(STEPS):
        features = torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(step))
        quantizer(features.chunk(world_size)[rank])
        quantizer.revive()
    return quantizer.state_dict()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two gloo processes ends with, by distance."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in range(2)]
    assert [process.wait(timeout=60) for process in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("distance", DISTANCES)
def test_ranks_do_not_drift_apart(two_ranks, distance):
    for name, tensor in two_ranks[0][distance].items():
        assert torch.equal(tensor, two_ranks[1][distance][name])


@pytest.mark.parametrize("distance", DISTANCES)
def test_two_ranks_give_the_codebook_and_usage_of_one_rank_with_both_halves(two_ranks, distance):
    for name, expected in run_steps(0, 1, distance).items():
        torch.testing.assert_close(two_ranks[0][distance][name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_one_half_alone_gives_another_codebook(two_ranks, distance):
    alone = run_steps(0, 2, distance)
    assert (two_ranks[0][distance]["embedding.weight"] - alone["embedding.weight"]).abs().max() > 0.1


@pytest.mark.parametrize("anchor", RANDOM_ANCHORS)
def test_ranks_that_draw_their_own_anchors_do_not_drift_apart(two_ranks, anchor):
    codebooks = [rank[anchor]["embedding.weight"] for rank in two_ranks]
    assert torch.equal(*codebooks)
    assert (codebooks[0] - run_steps(0, 2, "cosine", anchor)["embedding.weight"]).abs().max() > 0.1


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {distance: run_steps(rank, 2, distance) for distance in DISTANCES}
    layout = {"interpolation_factor": 2, "segment_layout": "patch"}
    results |= {anchor: run_steps(rank, 2, "cosine", anchor, **layout) for anchor in RANDOM_ANCHORS}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
