"""Two processes give the features and moments of one. This file is also the script that each process runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from looc_ldm.metrics.collect import FeatureCollector, Features
from looc_ldm.metrics.moments import FeatureMoments

DIM, CLASSES = 6, 4
COUNTS = (1, 2, 7, 8, 3001)  # 1: the second process has none; 3001: more than travel at a time
SOME_REDUCE = {"few": (3, 2), "many": (50, 9), "none on the second": (50, 0), "few and many": (2, 90)}


def whole(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    features = torch.randn(count, DIM, generator=generator) * torch.logspace(0, -2, DIM) + 100
    logits = torch.randn(count, CLASSES, generator=generator)
    return {"features": features, "logits": logits}


def collect(count: int, rank: int = 0, world_size: int = 1, accelerator=None, keep_rows=True, both=True) -> Features:
    """Of every `world_size`-th row from `rank` on, in batches of 3."""
    outputs = whole(count)
    collector = FeatureCollector(keep_rows)
    mine = torch.arange(rank, count, world_size)
    for part in mine.split(3) if len(mine) else ():
        batch = {name: tensor[part] for name, tensor in outputs.items() if both or name == "features"}
        collector.update(batch, part if both else None)
    return collector.collect(accelerator)


def reduced(counts: tuple[int, int], rank: int, accelerator) -> FeatureMoments:
    rows = whole(sum(counts))["features"]
    moments = FeatureMoments.from_rows(rows.split(counts)[rank])
    moments.reduce(accelerator)
    return moments


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two gloo processes ends with."""
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
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_equal(first: FeatureMoments, second: FeatureMoments, tolerance: float = 1e-12) -> None:
    assert first.count == second.count
    torch.testing.assert_close(first.mean, second.mean, rtol=tolerance, atol=0)
    if second.count > 1:
        scale = float(second.covariance.abs().max())
        torch.testing.assert_close(first.covariance, second.covariance, rtol=0, atol=tolerance * scale)


def test_one_process_has_everything_in_order():
    for count in COUNTS:
        outputs, features = whole(count), collect(count)
        assert features.count == count
        assert torch.equal(features.rows, outputs["features"])
        assert torch.equal(features.logits, outputs["logits"])
        assert_equal(features.moments, FeatureMoments.from_rows(outputs["features"]))


@pytest.mark.parametrize("count", COUNTS)
def test_the_main_process_of_two_has_all_rows_in_order_and_the_other_none(two_processes, count):
    expected, features, other = collect(count), two_processes[0][count], two_processes[1][count]
    for name in ("rows", "logits"):
        assert torch.equal(getattr(features, name), getattr(expected, name)), name
        assert getattr(other, name) is None
    assert features.count == other.count == count


@pytest.mark.parametrize("count", COUNTS)
def test_both_processes_have_the_moments_of_all(two_processes, count):
    for process in two_processes:
        assert_equal(process[count].moments, collect(count).moments)
        assert_equal(process[count, "moments only"].moments, collect(count).moments)
    assert torch.equal(*(process[count].moments.mean for process in two_processes))


@pytest.mark.parametrize("count", COUNTS)
def test_rows_that_nobody_needs_are_not_kept(two_processes, count):
    for features in (
        collect(count, keep_rows=False, both=False),
        *(process[count, "moments only"] for process in two_processes),
    ):
        assert features.rows is features.logits is None
        assert features.count == count


@pytest.mark.parametrize("case", SOME_REDUCE)
def test_moments_are_reduced_whatever_the_shares(two_processes, case):
    expected = FeatureMoments.from_rows(whole(sum(SOME_REDUCE[case]))["features"])
    for process in two_processes:
        assert_equal(process[case], expected)


def test_both_processes_refuse_what_does_not_fit(two_processes):
    for process in two_processes:
        assert process["no images"] == "there are no images to collect features of."
        assert "of different kinds" in process["different"]


def test_moments_only_take_no_memory_for_each_image(largest_tensor):
    outputs = whole(3000)
    collector = FeatureCollector(keep_rows=False)
    with largest_tensor() as largest:
        for part in outputs["features"].split(3):
            collector.update({"features": part})
        features = collector.collect()
    assert features.count == 3000
    assert largest.elements <= 2 * DIM * DIM


def test_the_caller_may_use_its_tensors_again():
    outputs, places = whole(8), torch.arange(8)
    expected = outputs["logits"].flip(0)
    collector = FeatureCollector(keep_rows=True)
    collector.update(outputs, places.flip(0))
    for tensor in (*outputs.values(), places):
        tensor.zero_()
    features = collector.collect()
    assert torch.equal(features.logits, expected)
    assert features.rows.abs().min() > 0
    assert features.moments.mean.min() > 0


def test_batches_of_different_kinds_are_refused():
    outputs, places = whole(8), torch.arange(8)
    collector = FeatureCollector(keep_rows=True)
    collector.update(outputs, places)
    with pytest.raises(ValueError, match="logits must come with all"):
        collector.update({"features": outputs["features"]}, places)
    with pytest.raises(ValueError, match="places must come with all"):
        collector.update(outputs)
    with pytest.raises(ValueError, match="places must be as many as the features, 8, got 7"):
        collector.update(outputs, places[1:])
    with pytest.raises(ValueError, match=r"\(B, D\)"):
        collector.update({"features": outputs["features"][0]})
    with pytest.raises(ValueError, match="no images"):
        FeatureCollector(keep_rows=True).collect()


def main(folder: Path) -> None:
    import torch.distributed as dist
    from accelerate import Accelerator

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    results = {count: collect(count, rank, 2, accelerator) for count in COUNTS}
    results |= {(count, "moments only"): collect(count, rank, 2, accelerator, False, False) for count in COUNTS}
    results |= {case: reduced(counts, rank, accelerator) for case, counts in SOME_REDUCE.items()}
    different = FeatureCollector(keep_rows=True)
    different.update({"features": torch.zeros(2, 3 + rank)})
    for name, collector in (("no images", FeatureCollector(keep_rows=True)), ("different", different)):
        try:
            collector.collect(accelerator)
        except ValueError as error:
            results[name] = str(error)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
