"""Data sets in shards: every image once an epoch, in an order that a stopped run takes up to the bit."""

import io
import pickle
import subprocess
import sys
import time
from collections import Counter
from itertools import cycle, islice, pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from looc_ldm.images.config import DataConfig
from looc_ldm.images.lanes import Lane, starting_cursors
from looc_ldm.images.source import Stored
from looc_ldm.training.data import StreamBatches, load_image_sets, make_stream, stream_loader
from looc_ldm.utils.errors import ConfigError, DataError
from tiny import write_tar

SHARD_SIZES = (11, 5, 17, 9, 14)  # images per training shard; blocks of 6 images end in their middle
VALIDATION = 8
BATCH_SIZE = 4
NAMES = [f"garment {label}" for label in range(10)]


@pytest.fixture(scope="module")
def stored(bundled) -> list[tuple[bytes, int]]:
    """Encoded images, all different, and their labels."""
    rows = [bundled[0].source.read(index) for index in range(400)]
    different = {row.content: row.label for row in rows}
    assert len(different) >= sum(SHARD_SIZES) + VALIDATION
    return list(different.items())


def splits_of(stored) -> list[tuple[str, list[tuple[bytes, int]]]]:
    """File names without suffix, and what belongs into each."""
    ends = np.cumsum(SHARD_SIZES).tolist()
    shards = [
        (f"train-{number:05d}", stored[end - size : end])
        for number, (size, end) in enumerate(zip(SHARD_SIZES, ends, strict=True))
    ]
    return [*shards, ("validation-00000", stored[ends[-1] : ends[-1] + VALIDATION])]


def write_parquet(file: Path, rows: list[tuple[bytes, int]], label=None) -> None:
    columns = {"image": [{"bytes": content, "path": None} for content, _ in rows], "label": [own for _, own in rows]}
    features = datasets.Features({"image": datasets.Image(), "label": label or datasets.ClassLabel(names=NAMES)})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(file)


def examples_of(rows: list[tuple[bytes, int]]) -> list[dict[str, bytes]]:
    return [{"png": content, "cls": str(label).encode()} for content, label in rows]


@pytest.fixture(scope="module")
def parquet(stored, tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("parquet")
    for name, rows in splits_of(stored):
        write_parquet(folder / f"{name}-of-00005.parquet", rows)
    return config_of(folder)


@pytest.fixture(scope="module")
def tars(stored, tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("tars")
    for name, rows in splits_of(stored):
        write_tar(folder / f"{name}.tar", examples_of(rows))
    return config_of(folder, num_classes=10)


def config_of(folder: Path, **settings) -> DataConfig:
    return DataConfig(
        path=str(folder),
        streaming=True,
        validation_split="validation",
        shuffle_images=6,
        resolution=28,
        **{"num_workers": 0, **settings},
    )


def stream(images, total, start=0, workers=0, world_size=1, cursors=None, seed=3):
    """Return the batches of all processes, in the order of positions, and the lanes' cursors."""
    chunks, cursors = {}, dict(cursors or {})
    began = None
    for rank in range(world_size):
        batches = StreamBatches(start, total, BATCH_SIZE, 1, rank, world_size)
        made = make_stream(images, seed, batches, workers, dict(cursors))
        began = made.cursors if began is None else began
        for positions, (pixels, labels, report) in zip(
            batches, stream_loader(made, batches, workers, False), strict=True
        ):
            chunks[positions[0]] = (pixels, labels)
            began = {**began, report.cursor[0]: report.cursor}
    return [chunks[position] for position in sorted(chunks)], began


def assert_same(batches, others) -> None:
    assert len(batches) == len(others)
    for (pixels, labels), (other_pixels, other_labels) in zip(batches, others, strict=True):
        torch.testing.assert_close(pixels, other_pixels, rtol=0, atol=0)
        assert labels.tolist() == other_labels.tolist()


# Epochs ------------------------------------------------------------------------------------------------------------


def lane_epochs(images, lanes: int, epochs: int, cursors=None) -> list[list[str]]:
    """Names of the images that all lanes together give in each epoch."""
    names = [[] for _ in range(epochs)]
    for number, cursor in starting_cursors(cursors or {}, lanes).items():
        lane = Lane(images, 3, lanes, cursor)
        while True:
            name = next(lane).name
            epoch = lane.cursor[1] // images.num_shards
            if epoch >= epochs:
                break
            names[epoch].append(name)
        assert lane.cursor[0] == number
    return names


@pytest.mark.parametrize("lanes", [1, 2, 5, 7])
@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_each_epoch_has_every_image_once_in_an_order_of_its_own(kind, lanes, request):
    images, _ = load_image_sets(request.getfixturevalue(kind), channels=1)
    first, second = lane_epochs(images, lanes, epochs=2)
    assert len(set(first)) == len(first) == sum(SHARD_SIZES)
    assert sorted(first) == sorted(second)
    shard_of = {name: name.partition(" of ")[2] for name in first}
    if lanes == 1:  # more lanes are followed one after the other here
        assert list(dict.fromkeys(map(shard_of.get, first))) != list(dict.fromkeys(map(shard_of.get, second)))
    for shard in set(shard_of.values()):
        once, again = ([name for name in epoch if shard_of[name] == shard] for epoch in (first, second))
        assert once != again
        assert sorted(once) != once


def test_the_loader_gives_what_the_lanes_give(parquet, stored):
    images, _ = load_image_sets(DataConfig(**{**vars(parquet), "flip": False}), channels=1)
    batches, _ = stream(images, total=sum(SHARD_SIZES))
    given = Counter(pixels.numpy().tobytes() for chunk, _ in batches for pixels in chunk)
    expected = [np.asarray(Image.open(io.BytesIO(content))) for content, _ in stored[: sum(SHARD_SIZES)]]
    expected = Counter(image.tobytes() for image in expected)
    assert given == expected


# Stopping and going on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (2, 1), (0, 2), (2, 2), (2, 4)])  # 1 to 8 lanes
@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_a_stream_that_is_stopped_again_and_again_is_the_same_to_the_bit(kind, workers, world_size, request):
    images, _ = load_image_sets(request.getfixturevalue(kind), channels=1)
    total = 160  # almost three epochs
    whole, _ = stream(images, total, workers=workers, world_size=world_size)
    # In the first block, before all lanes have begun, in the middle of shards, in the second and the third epoch.
    stops = (0, 4, 20, 60, 116, 132, total) if workers == 0 else (0, 4, 132, total)
    pieces, cursors = [], {}
    for start, stop in pairwise(stops):
        piece, cursors = stream(images, stop, start, workers, world_size, cursors)
        cursors = {lane: tuple(cursor) for lane, cursor in cursors.items()}
        pieces += piece
    assert_same(pieces, whole)


class Shards:
    """Shards of a number of images each, whose names are shard and place, as lanes read them."""

    config = DataConfig(path="shards", shuffle_images=4)

    def __init__(self, sizes):
        self.sizes, self.num_shards = sizes, len(sizes)

    def read(self, shard: int, start: int = 0):
        return (Stored(None, f"{shard}/{place}", -1) for place in range(start, self.sizes[shard]))


def given_in_turn(images, cursors: dict, count: int, seed=3) -> tuple[Counter, dict]:
    """The images that lanes give, one after the other, `count` together, and where the lanes go on."""
    lanes = [Lane(images, seed, len(cursors), cursor) for cursor in cursors.values()]
    given = Counter(f"{next(lane).name}" for lane in islice(cycle(lanes), count))
    return given, {lane.cursor[0]: lane.cursor for lane in lanes}


@pytest.mark.parametrize(("shards", "lanes"), [(5, 4), (5, 1), (3, 4)])
def test_after_k_epochs_every_image_was_seen_k_times_give_or_take_one(shards, lanes):
    images = Shards([10] * shards)
    for epochs in (1, 6, 40):
        given, cursors = given_in_turn(images, starting_cursors({}, lanes), epochs * shards * 10)
        assert len(given) == shards * 10 or epochs == 1
        assert all(abs(times - epochs) <= 1 for times in given.values())
        numbers = [cursor[1] for cursor in cursors.values()]
        assert max(numbers) - min(numbers) <= lanes


@pytest.mark.parametrize("changes", [(2, 1), (1, 2), (4, 2), (2, 5), (5, 3), (3, 8, 2), (32, 16), (4, 3, 4, 1)])
@pytest.mark.parametrize("sizes", [SHARD_SIZES, (6,) * 40], ids=["five", "forty"])
def test_with_other_numbers_of_lanes_nothing_is_left_out_and_nothing_comes_twice(changes, sizes):
    images, cursors, seen = Shards(sizes), {}, Counter()
    first, *others = changes
    for lanes, count in ((first, 37), *((lanes, 23) for lanes in others)):
        given, cursors = given_in_turn(images, starting_cursors(cursors, lanes), count)
        seen += given
    # Each lane alone, up to the end of the eighth epoch: what is left.
    for lane in (Lane(images, 3, len(cursors), cursor) for cursor in cursors.values()):
        while (name := next(lane).name) and lane.cursor[1] < 8 * len(sizes):
            seen[name] += 1
    assert set(seen.values()) == {8}
    assert len(seen) == sum(sizes)


def test_a_pickled_stream_gives_the_same(parquet):  # as workers that are not forked get it
    images, _ = load_image_sets(parquet, channels=1)
    made = make_stream(images, 0, StreamBatches(0, 64, BATCH_SIZE, 1, 0, 1), 0)
    copied = pickle.loads(pickle.dumps(made))
    for first in range(0, 64, BATCH_SIZE):
        positions = list(range(first, first + BATCH_SIZE))
        for (pixels, label, _), (other, other_label, _) in zip(
            made.__getitems__(positions), copied.__getitems__(positions), strict=True
        ):
            assert torch.equal(pixels, other)
            assert label == other_label


SLOW_TRAINING = """
import sys, time
from looc_ldm.utils.errors import Terminated, one_line_errors
from looc_ldm.images import streaming
from looc_ldm.images.config import DataConfig
from looc_ldm.training.data import StreamBatches, load_image_sets, make_stream, stream_loader
from looc_ldm.training.stopping import StopSignals

stored = streaming.StreamedSet._stored
given = []  # of the worker: over a network that is gone after one image
streaming.StreamedSet._stored = lambda *of: time.sleep(60 if given else 0.1) or given.append(1) or stored(*of)
config = DataConfig(path=sys.argv[1], streaming=True, validation_split="validation", validation_images=1, resolution=28,
                    num_workers=1, shuffle_images=1)
images, _ = load_image_sets(config, channels=1)
given.clear()  # was the validation image
batches = StreamBatches(0, 64, 1, 1, 0, 1)
loader = stream_loader(make_stream(images, 0, batches, 1), batches, 1, False)
with one_line_errors(), StopSignals():
    for batch in loader:
        print(time.time(), flush=True)
        raise Terminated("stopped")
"""


def test_a_run_that_is_stopped_does_not_wait_for_shards_that_are_being_read(parquet):
    command = [sys.executable, "-c", SLOW_TRAINING, parquet.path]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    waited = time.time() - float(ended.stdout)
    assert (ended.returncode, ended.stderr.split()) == (143, ["stopped"])
    assert waited < 40  # on a busy machine; PyTorch waits 5 seconds for a worker that is in the middle of something


# Classes, validation, bad input ------------------------------------------------------------------------------------


def test_the_first_images_of_the_validation_split_are_held_in_memory(tars, stored):
    train, validation = load_image_sets(DataConfig(**{**vars(tars), "validation_images": 3}), channels=1)
    expected = stored[sum(SHARD_SIZES) :][:3]
    assert [validation[index][1] for index in range(len(validation))] == [label for _, label in expected]
    assert validation.labels().tolist() == [label for _, label in expected]
    for index, (content, _) in enumerate(expected):
        assert validation[index][0][0].tolist() == np.asarray(Image.open(io.BytesIO(content))).tolist()
    assert train.num_shards == len(SHARD_SIZES)


def test_classes_are_named_by_the_data_or_counted_by_the_config(parquet, tars):
    named, _ = load_image_sets(parquet, channels=1)
    assert named.classes == NAMES
    counted, _ = load_image_sets(tars, channels=1)
    assert counted.classes == [str(label) for label in range(10)]
    without, validation = load_image_sets(DataConfig(**{**vars(tars), "num_classes": None}), channels=1)
    assert without.classes == validation.classes == []
    (_, labels), *_ = stream(without, BATCH_SIZE)[0]
    assert labels.tolist() == [-1] * BATCH_SIZE


def test_any_image_field_is_the_image_and_a_missing_label_counts_only_if_needed(stored, tmp_path):
    for split, first in (("train", 0), ("val", 8)):
        examples = examples_of(stored[first : first + 8])
        for example in examples[1::2]:
            image = io.BytesIO()
            Image.open(io.BytesIO(example.pop("png"))).save(image, "bmp")
            example["bmp"] = image.getvalue()
        if split == "train":
            del examples[6]["cls"]
        write_tar(tmp_path / f"{split}-0.tar", examples)
    config = config_of(tmp_path, num_classes=10, flip=False)
    images, _ = load_image_sets(config, channels=1)
    labels = sorted(label for _, batch in stream(images, 8)[0] for label in batch.tolist())
    assert labels == sorted([-1, *(label for _, label in [*stored[:6], stored[7]])])
    needed, _ = load_image_sets(config, channels=1, needs_labels=True)
    assert -1 not in [label for _, batch in stream(needed, 24)[0] for label in batch.tolist()]


def test_padded_images_know_their_size(parquet):
    train, validation = load_image_sets(DataConfig(**{**vars(parquet), "fit": "pad", "resolution": 32}), channels=1)
    assert train.content_size == validation.content_size == (28, 28)
    assert stream(train, BATCH_SIZE)[0][0][0].shape == (BATCH_SIZE, 1, 32, 32)


def test_a_label_outside_the_classes_is_named(tars):
    with pytest.raises(DataError, match=r"validation-00000.tar has the label \d: the 1 classes"):
        load_image_sets(DataConfig(**{**vars(tars), "num_classes": 1}), channels=1)


def test_a_stream_needs_a_validation_split(parquet):
    with pytest.raises(ConfigError, match=r"needs data.validation_split"):
        load_image_sets(DataConfig(**{**vars(parquet), "validation_split": None}), channels=1)


def test_loose_images_are_not_streamed(garments):
    with pytest.raises(DataError, match="neither parquet files nor WebDataset shards"):
        load_image_sets(config_of(garments), channels=1)


# Damaged data ------------------------------------------------------------------------------------------------------


def test_an_unreadable_image_is_named_and_the_next_one_takes_its_place(stored, tmp_path):
    rows = [(b"no image", 0), (b"", 0), *stored[:6]]
    write_tar(tmp_path / "train-0.tar", examples_of(rows))
    write_tar(tmp_path / "val-0.tar", examples_of(stored[6:8]))
    images, _ = load_image_sets(config_of(tmp_path), channels=1)
    batches = StreamBatches(0, 12, BATCH_SIZE, 1, 0, 1)
    reports = [report for *_, report in stream_loader(make_stream(images, 0, batches, 0), batches, 0, False)]
    names = [name for report in reports for name in report.unreadable]
    assert len(names) >= 2
    reasons = "not an image, or in a format that Pillow does not know", "the file is empty"
    file = tmp_path / "train-0.tar"
    assert set(names) == {f"cannot read {number:05d}.png of {file}: {why}" for number, why in enumerate(reasons)}
    whole, _ = stream(images, 12)
    for stop in (4, 8):  # skipped images count in the cursor
        head, cursors = stream(images, stop)
        assert_same(head + stream(images, 12, stop, cursors=cursors)[0], whole)


def test_images_may_be_addresses_and_one_of_them_may_be_missing(stored, tmp_path):
    for number, (content, _) in enumerate(stored[:4]):
        (tmp_path / f"{number}.png").write_bytes(content)
    paths = [f"{'file://' if number % 2 == 0 else ''}{tmp_path / f'{number}.png'}" for number in range(4)]
    (tmp_path / "2.png").unlink()
    # As on the hub: the address alone, in a column of images.
    table = pa.table({"image": [{"bytes": None, "path": path} for path in paths]})
    features = datasets.Features({"image": datasets.Image()})
    for split in ("train", "validation"):
        pq.write_table(table.cast(features.arrow_schema), tmp_path / f"{split}.parquet")
    images, validation = load_image_sets(config_of(tmp_path), channels=1)
    batches = StreamBatches(0, 12, BATCH_SIZE, 1, 0, 1)
    reports = [report for *_, report in stream_loader(make_stream(images, 0, batches, 0), batches, 0, False)]
    names = {name for report in reports for name in report.unreadable}
    assert len(names) == 1
    assert names.pop().startswith(f"cannot read {paths[2]} of {tmp_path / 'train.parquet'}: ")
    assert torch.equal(validation[2][0], validation[3][0])  # the next one takes its place
    assert validation[1][0][0].tolist() == np.asarray(Image.open(io.BytesIO(stored[1][0]))).tolist()


@pytest.fixture
def shard(stored, tmp_path):
    """A set with one training shard, the shard's file and its content."""
    write_tar(tmp_path / "train-0.tar", examples_of(stored[:20]))
    write_tar(tmp_path / "val-0.tar", examples_of(stored[20:24]))
    images, _ = load_image_sets(config_of(tmp_path), channels=1)
    return images, tmp_path / "train-0.tar", (tmp_path / "train-0.tar").read_bytes()


@pytest.mark.parametrize("blocks", [3, 20])  # within an image, and where the next header would begin
def test_a_shard_that_is_cut_off_is_named(shard, blocks):
    images, file, whole = shard
    file.write_bytes(whole[: 512 * blocks])
    with pytest.raises(DataError, match=rf"cannot read {file}: the archive is cut off"):
        list(images.read(0))


def test_shards_without_images_end_the_run(tmp_path, stored, monkeypatch):
    monkeypatch.setattr("looc_ldm.images.shards.has_images", lambda file: True)  # as on the hub
    write_parquet(tmp_path / "train-0.parquet", [])
    write_parquet(tmp_path / "validation-0.parquet", stored[:2])
    images, _ = load_image_sets(config_of(tmp_path), channels=1)
    with pytest.raises(DataError, match="no images in the shards"):
        stream(images, 8)


def test_nothing_but_unreadable_images_end_the_run(tmp_path, stored):
    write_tar(tmp_path / "train-0.tar", examples_of([(b"no image", 0)] * 3))
    write_tar(tmp_path / "val-0.tar", examples_of(stored[:2]))
    images, _ = load_image_sets(config_of(tmp_path), channels=1)
    with pytest.raises(DataError, match=r"1000 images .* cannot be read"):
        stream(images, 8)
