"""Two processes give the features and moments of one. This file is also the script that each process runs."""

import math
import sys
from pathlib import Path

import pytest
import torch

from looc_ldm.metrics.collect import FeatureCollector, Features
from tiny import launch

DIM, CLASSES = 6, 4
COUNTS = (1, 2, 7, 8, 3001)  # 1: the second process has none; 3001: more than are sent at a time


def whole(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    features = torch.randn(count, DIM, generator=generator) * torch.logspace(0, -2, DIM) + 100
    return {"features": features, "logits": torch.randn(count, CLASSES, generator=generator)}


def collect(count: int, rank: int = 0, world_size: int = 1, accelerator=None, keep_vectors=True) -> Features:
    """Collect every `world_size`-th row from `rank` on, in batches of 3, without logits if vectors are not kept."""
    outputs = whole(count)
    if not keep_vectors:
        del outputs["logits"]
    collector = FeatureCollector(keep_vectors)
    mine = torch.arange(rank, count, world_size)
    for part in mine.split(3) if len(mine) else ():
        collector.update({name: tensor[part] for name, tensor in outputs.items()}, part)
    return collector.collect(accelerator)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Return the results of each of two gloo processes."""
    folder = tmp_path_factory.mktemp("processes")
    launch(__file__, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_moments_of(features: Features, count: int) -> None:
    vectors = whole(count)["features"].double()
    assert features.moments.count == count
    torch.testing.assert_close(features.moments.mean, vectors.mean(0), rtol=1e-12, atol=0)
    if count > 1:
        torch.testing.assert_close(
            features.moments.covariance, vectors.T.cov(), rtol=0, atol=1e-12 * vectors.var(0).max()
        )


@pytest.mark.parametrize("count", COUNTS)
def test_rows_and_logits_are_in_order_on_the_main_process_and_nowhere_else(two_processes, count):
    main, other = (process[count, True] for process in two_processes)
    for features in (collect(count), main):
        assert torch.equal(features.vectors, whole(count)["features"])
        assert torch.equal(features.logits, whole(count)["logits"])
    assert other.vectors is other.logits is None


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("keep_vectors", [True, False])
def test_every_process_has_the_moments_of_all(two_processes, count, keep_vectors):
    for features in (
        collect(count, keep_vectors=keep_vectors),
        *(process[count, keep_vectors] for process in two_processes),
    ):
        assert_moments_of(features, count)
        assert keep_vectors or features.vectors is features.logits is None


def test_no_images_are_refused_on_every_process(two_processes):
    assert [process["no images"] for process in two_processes] == ["there are no images to collect features of."] * 2
    with pytest.raises(ValueError, match="no images"):
        FeatureCollector(keep_vectors=True).collect()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("count", [4, 40])
def test_features_that_are_not_finite_are_refused(value, count):
    collector = FeatureCollector(keep_vectors=False)
    features = whole(count)["features"]
    features[3, 3] = value
    collector.update({"features": features}, torch.arange(count))
    with pytest.raises(ValueError, match="not finite"):
        collector.collect()


def main(folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    results = {(count, keep): collect(count, rank, 2, accelerator, keep) for count in COUNTS for keep in (True, False)}
    try:
        FeatureCollector(keep_vectors=True).collect(accelerator)
    except ValueError as error:
        results["no images"] = str(error)
    torch.save(results, folder / f"{rank}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
