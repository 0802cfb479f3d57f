"""Two processes give the features and moments of one. This file is also the script that each process runs."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from looc_ldm.metrics.collect import FeatureCollector, Features

DIM, CLASSES = 6, 4
COUNTS = (1, 2, 7, 8, 3001)  # 1: the second process has none; 3001: more than are sent at a time


def whole(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    features = torch.randn(count, DIM, generator=generator) * torch.logspace(0, -2, DIM) + 100
    return {"features": features, "logits": torch.randn(count, CLASSES, generator=generator)}


def collect(count: int, rank: int = 0, world_size: int = 1, accelerator=None, keep_rows=True) -> Features:
    """Collect every `world_size`-th row from `rank` on, in batches of 3, without logits if rows are not kept."""
    outputs = whole(count)
    if not keep_rows:
        del outputs["logits"]
    collector = FeatureCollector(keep_rows)
    mine = torch.arange(rank, count, world_size)
    for part in mine.split(3) if len(mine) else ():
        collector.update({name: tensor[part] for name, tensor in outputs.items()}, part)
    return collector.collect(accelerator)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Return what each of two gloo processes ends with."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    command = [sys.executable, __file__, str(folder)]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=600) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_moments_of(features: Features, count: int) -> None:
    rows = whole(count)["features"].double()
    assert features.moments.count == count
    torch.testing.assert_close(features.moments.mean, rows.mean(0), rtol=1e-12, atol=0)
    if count > 1:
        torch.testing.assert_close(features.moments.covariance, rows.T.cov(), rtol=0, atol=1e-12 * rows.var(0).max())


@pytest.mark.parametrize("count", COUNTS)
def test_rows_and_logits_are_in_order_on_the_main_process_and_nowhere_else(two_processes, count):
    main, other = (process[count, True] for process in two_processes)
    for features in (collect(count), main):
        assert torch.equal(features.rows, whole(count)["features"])
        assert torch.equal(features.logits, whole(count)["logits"])
    assert other.rows is other.logits is None


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("keep_rows", [True, False])
def test_every_process_has_the_moments_of_all(two_processes, count, keep_rows):
    for features in (collect(count, keep_rows=keep_rows), *(process[count, keep_rows] for process in two_processes)):
        assert_moments_of(features, count)
        assert keep_rows or features.rows is features.logits is None


def test_no_images_are_refused_on_every_process(two_processes):
    assert [process["no images"] for process in two_processes] == ["there are no images to collect features of."] * 2
    with pytest.raises(ValueError, match="no images"):
        FeatureCollector(keep_rows=True).collect()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("count", [4, 40])
def test_features_that_are_not_finite_are_refused(value, count):
    collector = FeatureCollector(keep_rows=False)
    features = whole(count)["features"]
    features[3, 3] = value
    collector.update({"features": features}, torch.arange(count))
    with pytest.raises(ValueError, match="not finite"):
        collector.collect()


def main(folder: Path) -> None:
    import torch.distributed as dist
    from accelerate import Accelerator

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    results = {(count, keep): collect(count, rank, 2, accelerator, keep) for count in COUNTS for keep in (True, False)}
    try:
        FeatureCollector(keep_rows=True).collect(accelerator)
    except ValueError as error:
        results["no images"] = str(error)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
