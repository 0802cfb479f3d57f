"""Features of a reference are found again under what they were computed from, and never under anything else."""

import pytest
import torch

from looc_ldm.metrics.collect import Features
from looc_ldm.metrics.frechet import FeatureMoments, frechet_distance
from looc_ldm.metrics.reference import ReferenceCache, default_cache_folder
from looc_ldm.utils.errors import UserError

KEY = {"data": "0f", "transform": {"resolution": 32, "fit": "crop"}, "network": {"layer": "64", "sha256": "ab"}}


def features(count: int = 7, dim: int = 4, complete: bool = True) -> Features:
    vectors = torch.randn(count, dim, generator=torch.Generator().manual_seed(0))
    return Features(FeatureMoments.from_vectors(vectors), vectors if complete else None, logits=None)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("count", [3, 7])  # fewer and more than dimensions
def test_what_was_saved_is_loaded(complete, count, tmp_path):
    saved = features(count, complete=complete)
    ReferenceCache(tmp_path / "new").save(KEY, saved)
    loaded = ReferenceCache(tmp_path / "new").load(KEY)
    assert loaded.moments.count == count
    torch.testing.assert_close(loaded.moments.mean, saved.moments.mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(loaded.moments.covariance, saved.moments.covariance, rtol=1e-12, atol=1e-14)
    other = FeatureMoments.from_vectors(torch.randn(9, 4, generator=torch.Generator().manual_seed(1)))
    distance = frechet_distance(loaded.moments, other)
    assert distance == pytest.approx(frechet_distance(saved.moments, other), rel=1e-9)
    assert (loaded.vectors is None and saved.vectors is None) or torch.equal(loaded.vectors, saved.vectors)


def test_the_order_of_a_key_does_not_matter_and_everything_in_it_does(tmp_path):
    cache = ReferenceCache(tmp_path)
    cache.save(KEY, features())
    assert cache.load(dict(reversed(KEY.items()))) is not None
    for name, other in (("data", "1f"), ("transform", {**KEY["transform"], "fit": "pad"}), ("network", {})):
        assert cache.load({**KEY, name: other}) is None
    assert cache.load({**KEY, "limit": None}) is None


def test_a_later_save_replaces_an_earlier_one_and_leaves_nothing_beside_it(tmp_path):
    cache = ReferenceCache(tmp_path)
    cache.save(KEY, features(7))
    cache.save(KEY, features(5))
    assert cache.load(KEY).moments.count == 5
    assert list(tmp_path.iterdir()) == [cache.file(KEY)]


def test_a_damaged_file_is_named(tmp_path):
    cache = ReferenceCache(tmp_path)
    cache.save(KEY, features())
    file = cache.file(KEY)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="delete it") as error:
        cache.load(KEY)
    assert str(file) in str(error.value)


def test_without_a_folder_nothing_is_kept_and_one_that_cannot_be_made_is_an_error(tmp_path):
    cache = ReferenceCache(None)
    cache.save(KEY, features())
    assert cache.load(KEY) is None
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot make the folder"):
        ReferenceCache(tmp_path / "file" / "cache").save(KEY, features())


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LOOC_LDM_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LOOC_LDM_CACHE")
    assert default_cache_folder() == tmp_path / "xdg" / "looc_ldm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / ".cache" / "looc_ldm"
