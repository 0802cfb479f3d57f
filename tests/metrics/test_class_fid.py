"""The FID of classes is the FID of each, and says which it could not measure."""

import pytest
import torch

from looc_ldm.metrics.class_fid import class_averaged_fid
from looc_ldm.metrics.frechet import FeatureMoments, frechet_distance

DIM = 8
COUNTS = {0: (40, 30), 1: (2, 30), 2: (1, 30), 3: (20, 0), 5: (DIM, DIM), 7: (30, DIM - 1)}


@pytest.fixture
def sides() -> list[torch.Tensor]:
    """Features and labels of each side, shuffled."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for side in range(2):
        labels = torch.cat([torch.full((counts[side],), label) for label, counts in COUNTS.items()])
        labels = labels[torch.randperm(len(labels), generator=generator)]
        vectors = torch.randn(len(labels), DIM, generator=generator) + labels[:, None] + 0.2 * side
        tensors += [vectors, labels]
    return tensors


def test_each_class_has_its_own_fid_and_the_mean_weighs_them_equally(sides):
    result = class_averaged_fid(*sides)
    assert list(result.per_class) == ["0", "1", "5", "7"]
    for name, figure in result.per_class.items():
        vectors = [features[labels == int(name)] for features, labels in (sides[:2], sides[2:])]
        assert figure == pytest.approx(frechet_distance(*map(FeatureMoments.from_vectors, vectors)), rel=1e-12)
    assert result.mean == pytest.approx(sum(result.per_class.values()) / 4)


def test_classes_with_too_few_images_are_named(sides):
    result = class_averaged_fid(*sides, names={1: "one", 2: "two", 3: "three"})
    assert list(result.skipped) == ["two", "three"]
    assert result.skipped["two"].startswith("1 generated and 30 reference images")
    assert result.skipped["three"].startswith("20 generated and 0 reference images")
    assert list(result.biased) == ["one", "7"]


def test_images_of_the_wrong_class_show(sides):
    """Although the FID of all images together cannot tell."""
    confused = class_averaged_fid(sides[0], sides[1].flip(0), *sides[2:])
    whole = [
        frechet_distance(*map(FeatureMoments.from_vectors, (vectors, sides[2])))
        for vectors in (sides[0], sides[0].flip(0))
    ]
    assert whole[0] == pytest.approx(whole[1])
    assert confused.mean > 3 * class_averaged_fid(*sides).mean


def test_what_has_no_classes_is_refused(sides):
    with pytest.raises(ValueError, match="no class"):
        class_averaged_fid(sides[0], sides[1], sides[2], sides[3] + 100)
    with pytest.raises(ValueError, match="name of its own"):
        class_averaged_fid(*sides, names={0: "cat", 1: "cat"})
