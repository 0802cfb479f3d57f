"""LSUN as it is distributed: LMDBs of encoded images, opened by each process that reads."""

import hashlib
import pickle
import sys
from pathlib import Path

import datasets
import lmdb
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from looc_ldm.images import lsun
from looc_ldm.images.config import DataConfig
from looc_ldm.images.image_set import load_image_set
from looc_ldm.images.lsun import LmdbSource, find_lmdbs
from looc_ldm.training.data import load_image_sets
from looc_ldm.utils.errors import DataError


def write_lmdb(folder: Path, contents: list[bytes]) -> dict[bytes, bytes]:
    """An LMDB whose keys are, as LSUN's, the hex digits of a SHA-1; returns what is in it, sorted by key."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {hashlib.sha1(content).hexdigest().encode(): content for content in contents}
    with lmdb.open(str(folder), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for key, content in stored.items():
            transaction.put(key, content)
    return dict(sorted(stored.items()))


@pytest.fixture(scope="module")
def church(bundled, tmp_path_factory) -> Path:
    """A folder with a training LMDB of 40 images and a validation LMDB of 6."""
    contents = list(dict.fromkeys(bundled[0].source.read(index).content for index in range(200)))
    folder = tmp_path_factory.mktemp("lsun")
    write_lmdb(folder / "church_outdoor_train_lmdb", contents[:40])
    write_lmdb(folder / "church_outdoor_val_lmdb", contents[40:46])
    return folder


def config_of(folder: Path, **settings) -> DataConfig:
    return DataConfig(path=str(folder), resolution=28, flip=False, **{"validation_images": 6, **settings})


def test_splits_are_the_names_of_the_folders(church, tmp_path):
    assert find_lmdbs(church) == {
        "train": church / "church_outdoor_train_lmdb",
        "validation": church / "church_outdoor_val_lmdb",
    }
    assert find_lmdbs(church / "church_outdoor_val_lmdb") == {"train": church / "church_outdoor_val_lmdb"}
    assert find_lmdbs(tmp_path) is None


def test_two_scenes_in_one_folder_are_refused(tmp_path):
    for scene in ("bedroom", "church_outdoor"):
        write_lmdb(tmp_path / f"{scene}_train_lmdb", [b"x"])
    with pytest.raises(DataError, match=r"two LMDBs of the split train, bedroom_train_lmdb and church_outdoor_train_"):
        find_lmdbs(tmp_path)


def test_images_come_by_their_keys(tmp_path):
    stored = write_lmdb(tmp_path / "a", [b"one", b"two", b"three" * 10_000])
    source = LmdbSource(tmp_path / "a")
    assert [source.read(index).content for index in range(len(source))] == list(stored.values())
    assert source.read(0).name == f"{next(iter(stored)).decode()} of {tmp_path / 'a'}"
    assert source.classes == []
    assert source.labels().tolist() == [-1] * 3


def test_training_and_held_out_images_share_one_database(church):
    both = load_image_set(config_of(church, split="train"), channels=1)
    train, validation = load_image_sets(config_of(church), channels=1)
    assert (len(train), len(validation)) == (34, 6)
    pixels = {image.numpy().tobytes() for images in (train, validation) for image in images.pixels()}
    assert pixels == {image.numpy().tobytes() for image in both.pixels()}
    assert len(pixels) == 40


def test_the_validation_split_is_its_own_database(church):
    train, validation = load_image_sets(config_of(church, validation_split="validation"), channels=1)
    assert (len(train), len(validation)) == (40, 6)


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_and_their_parent_read_the_same(church, context):
    images = load_image_set(config_of(church, split="train"), channels=1)
    before = torch.stack(list(images.pixels()))  # the database is open when the workers start
    loader = DataLoader(images, batch_size=4, num_workers=2, multiprocessing_context=context)
    assert torch.equal(torch.cat([pixels for pixels, _ in loader]), before)
    assert torch.equal(torch.stack(list(images.pixels())), before)


def test_a_pickled_source_reads_the_same(church):
    source = LmdbSource(church / "church_outdoor_train_lmdb").select(np.arange(3, 9))
    packed = pickle.dumps(source)
    assert len(packed) < 1000  # the keys are not sent along
    copied = pickle.loads(packed)
    assert [copied.read(index) for index in range(6)] == [source.read(index) for index in range(6)]


def test_an_empty_database_has_no_images(tmp_path):
    write_lmdb(tmp_path / "a", [])
    assert len(LmdbSource(tmp_path / "a")) == 0


def test_a_file_that_is_cut_off_is_an_error_and_not_a_crash(tmp_path):
    write_lmdb(tmp_path / "a", [bytes([number]) * 20_000 for number in range(20)])
    file = tmp_path / "a" / "data.mdb"
    file.write_bytes(file.read_bytes()[:200_000])
    with pytest.raises(DataError, match=r"data.mdb is cut off: it has 200,000 of \d{3},\d{3} bytes"):
        LmdbSource(tmp_path / "a")


@pytest.mark.parametrize("content", [b"", b"junk" * 5000])
def test_what_is_no_lmdb_is_named(tmp_path, content):
    (tmp_path / "train_lmdb").mkdir()
    (tmp_path / "train_lmdb" / "data.mdb").write_bytes(content)
    with pytest.raises(DataError, match=rf"cannot read {tmp_path / 'train_lmdb'}: "):
        load_image_sets(config_of(tmp_path), channels=1)


def test_without_the_package_the_extra_is_named(church, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(lsun, "_open", {})
    with pytest.raises(DataError, match=r'pip install "looc-ldm\[lsun\]"'):
        load_image_sets(config_of(church), channels=1)
