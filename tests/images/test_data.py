"""The stream of training images depends on nothing but seed and position, and survives images that cannot be read."""

import logging
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from looc_ldm.images.config import DataConfig
from looc_ldm.images.image_set import Report, load_image_set
from looc_ldm.images.unreadable import UnreadableImages
from looc_ldm.training.data import (
    ImageStream,
    Stream,
    StreamBatches,
    float_batches,
    load_image_sets,
    make_stream,
    stream_loader,
)
from looc_ldm.training.stopping import start_worker
from looc_ldm.utils.errors import ConfigError, DataError, UnreadableImage, one_line_errors


def positions(total=32, start=0, batch_size=8, accumulation=1, rank=0, world_size=1) -> list[list[int]]:
    return list(StreamBatches(start, total, batch_size, accumulation, rank, world_size))


@pytest.fixture
def damaged(tmp_path, small_data) -> DataConfig:
    """Twelve photographs, number 2 of which is a JPEG that ends too early and number 7 an empty file."""
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i:02d}.jpg")
    file = tmp_path / "02.jpg"
    file.write_bytes(file.read_bytes()[:1000])
    (tmp_path / "07.jpg").write_bytes(b"")
    return replace(small_data, path=str(tmp_path), fit="crop", validation_images=2)


# Images that cannot be read --------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_named_where_nothing_may_be_left_out(damaged):
    images = load_image_set(damaged, channels=3)
    with pytest.raises(UnreadableImage, match=r"cannot read .*02\.jpg: .*truncated"):
        images[2]
    with pytest.raises(UnreadableImage, match=r"cannot read .*07\.jpg: the file is empty"):
        images[7]


def test_an_unreadable_image_met_by_a_worker_process_is_one_line(damaged, capsys):
    loader = DataLoader(load_image_set(damaged, channels=3), batch_size=4, num_workers=1)
    with pytest.raises(SystemExit) as caught, one_line_errors():
        list(loader)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: cannot read ")
    assert "02.jpg" in lines[0]


def test_in_training_the_next_readable_image_takes_the_place_and_the_reason_is_reported(damaged):
    train, _ = load_image_sets(damaged, channels=3)
    names = [train.source.read(index).name for index in range(len(train))]
    bad = [index for index, name in enumerate(names) if name.endswith(("02.jpg", "07.jpg"))]
    stream = ImageStream(train, seed=0)
    reported = []
    for position in range(3 * len(train)):
        image, label, report = stream[position]
        meant = stream.index_at(position)
        shown = train.read((meant + 1) % len(train))[0] if meant in bad else train.read(meant)[0]
        assert torch.equal(image, shown) or torch.equal(image, shown.flip(-1))
        assert label == -1
        expected = [f"cannot read {names[meant]}"] if meant in bad else []
        assert [problem.split(": ")[0] for problem in report.unreadable] == expected
        reported += report.unreadable
    assert len(reported) == 6  # each of the two in each of the three epochs
    assert any(problem.endswith("07.jpg: the file is empty") for problem in reported)


def test_each_unreadable_image_is_one_warning_with_the_reason_and_above_a_share_the_run_stops(caplog):
    found = UnreadableImages(max_share=0.1, size=20)
    with caplog.at_level(logging.WARNING):
        for problems in (["cannot read a.jpg: the file is empty"], [], ["cannot read a.jpg: the file is empty"]):
            found.add(problems)
    assert caplog.messages == ["cannot read a.jpg: the file is empty; the next readable image takes its place"]
    assert found.count == 2
    assert found.too_many(2, images_seen=20) is None
    assert found.too_many(3, images_seen=20).startswith("3 of 20 images cannot be read, more than data.max_unreadable")
    assert found.too_many(4, images_seen=21) is None  # the second epoch meets them again
    assert UnreadableImages(max_share=0.001, started_at=19, size=20).too_many(2, images_seen=21) is None
    assert UnreadableImages(max_share=0.0, size=20).too_many(1, images_seen=20)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_replacements_belong_to_positions_so_that_resuming_stays_exact(damaged, num_workers):
    train, _ = load_image_sets(damaged, channels=3)

    def batches(start):
        division = StreamBatches(start, 40, 4, 1, 0, 1)
        return list(stream_loader(make_stream(train, 5, division, num_workers), division, num_workers, False))

    whole, rest = batches(0), batches(12)
    assert sum(len(report.unreadable) for *_, report in rest) > 0
    for (images, labels, report), (resumed_images, resumed_labels, resumed_report) in zip(whole[3:], rest, strict=True):
        assert torch.equal(images, resumed_images)
        assert torch.equal(labels, resumed_labels)
        assert report == resumed_report


def test_a_training_does_not_end_at_an_unreadable_validation_image(damaged, caplog):
    _, validation = load_image_sets(replace(damaged, validation_images=12, validation_split="train"), channels=3)
    pixels = list(validation.pixels())
    assert len(pixels) == 12
    assert torch.equal(pixels[2], pixels[3])  # the next one takes its place
    assert torch.equal(pixels[7], pixels[8])
    named = [record.getMessage() for record in caplog.records]
    assert sum("02.jpg" in message for message in named) == 1
    with pytest.raises(UnreadableImage, match=r"02\.jpg"):
        validation.read(2)


def test_data_without_a_readable_image_ends_training_with_one_line(tmp_path, small_data):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    train, validation = load_image_sets(
        replace(small_data, path=str(tmp_path), fit="crop", validation_images=1), channels=3
    )
    with pytest.raises(
        DataError, match=r"2 images .* in a row cannot be read. The last: cannot read .*\.png: not an image"
    ):
        ImageStream(train, seed=0)[0]
    with pytest.raises(DataError, match=r"1 images .* in a row cannot be read. The last: cannot read .*\.png: not an"):
        validation[0]


# The stream ------------------------------------------------------------------------------------------------------


def test_every_epoch_is_a_permutation():
    stream = Stream(length=50, seed=3)
    epochs = [[stream.index_at(50 * epoch + place) for place in range(50)] for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 3
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(range(50))


def test_the_order_depends_on_seed_and_epoch_only():
    forwards, backwards, other = Stream(50, seed=3), Stream(50, seed=3), Stream(50, seed=4)
    order = [forwards.index_at(p) for p in range(150)]
    torch.manual_seed(1)
    np.random.seed(1)
    assert [backwards.index_at(p) for p in reversed(range(150))] == order[::-1]
    assert [other.index_at(p) for p in range(150)] != order


def test_half_of_the_images_are_mirrored_anew_in_each_epoch(small_data):
    train, _ = load_image_sets(small_data, channels=1)
    stream = ImageStream(train, seed=0)
    mirrored = {}
    for position in range(4 * len(train)):
        index, image = stream.index_at(position), stream[position][0]
        original = train[index][0]
        if not torch.equal(original, original.flip(-1)):
            assert torch.equal(image, original) or torch.equal(image, original.flip(-1))
            mirrored.setdefault(index, []).append(not torch.equal(image, original))
    share = np.mean([flip for flips in mirrored.values() for flip in flips])
    assert 0.35 < share < 0.65
    assert any(len(set(flips)) == 2 for flips in mirrored.values())


def test_images_are_mirrored_only_if_asked_for(small_data):
    train, _ = load_image_sets(replace(small_data, flip=False), channels=1)
    stream = ImageStream(train, seed=0)
    for position in range(len(train)):
        assert torch.equal(stream[position][0], train[stream.index_at(position)][0])


def test_two_ranks_with_two_accumulation_steps_see_what_one_process_sees():
    alone = positions(batch_size=8)
    ranks = [positions(batch_size=8, accumulation=2, rank=rank, world_size=2) for rank in range(2)]
    assert ranks[0] != ranks[1]
    assert {len(forward) for rank in ranks for forward in rank} == {2}
    for step, batch in enumerate(alone):
        together = [p for rank in ranks for forward in rank[2 * step : 2 * step + 2] for p in forward]
        assert sorted(together) == batch


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ConfigError, match=r"batch_size=10 must be a multiple of .*=2 times the number of processes, 2"):
        positions(batch_size=10, accumulation=2, world_size=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_gives_the_images_and_flips_of_an_uninterrupted_one(small_data, num_workers):
    train, _ = load_image_sets(small_data, channels=1)

    def batches(start):
        loader = stream_loader(ImageStream(train, 5), StreamBatches(start, 160, 8, 1, 0, 1), num_workers, False)
        return list(loader)

    whole, rest = batches(0), batches(72)  # in the middle of the second epoch of 64 images
    assert len(rest) == 11
    for (images, labels, _), (resumed_images, resumed_labels, _) in zip(whole[9:], rest, strict=True):
        assert torch.equal(images, resumed_images)
        assert torch.equal(labels, resumed_labels)


def test_making_a_loader_draws_no_random_numbers(small_data):
    train, validation = load_image_sets(small_data, channels=1)
    before = torch.get_rng_state()
    next(iter(stream_loader(ImageStream(train, 0), StreamBatches(0, 8, 8, 1, 0, 1), 0, False)))
    next(iter(float_batches(validation)))
    assert torch.equal(torch.get_rng_state(), before)


def test_random_crops_belong_to_positions_reach_both_ends_and_do_not_depend_on_flips(tmp_path, small_data):
    columns = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8), (32, 1)))  # 96 wide: left edges 0 to 64 fit
    for i in range(4):
        columns.save(tmp_path / f"{i}.png")
    config = replace(small_data, path=str(tmp_path), fit="random_crop", flip=False, validation_images=1)
    train, validation = load_image_sets(config, channels=1)
    stream, again = ImageStream(train, seed=0), ImageStream(train, seed=0)
    left = [stream[position][0][0, 0, 0].item() for position in range(90)]
    assert left == [again[position][0][0, 0, 0].item() for position in range(90)]
    assert min(left) < 8
    assert max(left) > 56
    assert 24 < np.mean(left) < 40
    assert validation[0][0][0, 0, 0] == train[0][0][0, 0, 0] == 32  # the centre, where nothing is trained

    # Whether an image is mirrored does not depend on the place of the crop.
    train, _ = load_image_sets(replace(config, flip=True), channels=1)
    stream = ImageStream(train, seed=0)
    rows = torch.stack([stream[position][0][0, 0] for position in range(200)])
    mirrored = (rows[:, 0] > rows[:, -1]).numpy()
    left = rows.amin(1).numpy()
    assert 0.35 < mirrored.mean() < 0.65
    assert abs(np.corrcoef(mirrored, left)[0, 1]) < 0.25


def test_a_stream_can_be_sent_to_workers_that_share_no_memory(small_data, bundled):
    for train in (load_image_sets(small_data, channels=1)[0], bundled[0]):
        stream = ImageStream(train, seed=2)
        sent = pickle.loads(pickle.dumps(stream))
        for position in (0, 5, 200):
            assert torch.equal(sent[position][0], stream[position][0])
            assert sent[position][1:] == stream[position][1:]


def test_batches_are_tensors_and_one_report(small_data):
    train, _ = load_image_sets(small_data, channels=1)
    batches = StreamBatches(0, 8, 8, 1, 0, 1)
    images, labels, report = next(iter(stream_loader(make_stream(train, 0, batches, 0), batches, 0, False)))
    assert images.shape == (8, 1, 32, 32)
    assert images.is_contiguous()
    assert images.dtype == torch.uint8  # workers send them through shared memory, of which containers have little
    assert (labels.shape, labels.dtype) == ((8,), torch.int64)
    assert report == Report(unreadable=[], cursor=None)


class Unsendable:
    """Ends like a tensor when /dev/shm is full: in the thread of a worker that sends batches."""

    def __reduce__(self):
        raise OSError("No space left on device")


def test_a_batch_that_a_worker_cannot_send_ends_in_one_line(capsys):
    settings = {"num_workers": 1, "multiprocessing_context": "fork", "worker_init_fn": start_worker}
    loader = DataLoader([Unsendable()], batch_size=None, **settings)
    with pytest.raises(SystemExit) as ended, one_line_errors():
        next(iter(loader))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "/dev/shm" in message
    assert "--data.num_workers 0" in message
