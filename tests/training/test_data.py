"""Images of any source at one size, and the stream of training images that depends on nothing but seed and position."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from looc_ldm.errors import ConfigError, DataError, one_line_errors
from looc_ldm.training.data import ImageStream, Stream, StreamBatches, load_image_set, load_image_sets, stream_loader

CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def write_image(file, color=(200, 100, 50), size=(40, 20)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(file)


def positions(total=32, start=0, batch_size=8, accumulation=1, rank=0, world_size=1) -> list[list[int]]:
    return list(StreamBatches(start, total, batch_size, accumulation, rank, world_size))


# Sources ---------------------------------------------------------------------------------------------------------


def test_the_bundled_set_has_ten_balanced_classes(bundled):
    train, validation = bundled
    assert train.classes == validation.classes == CLASSES
    assert np.bincount(train.labels()).tolist() == [800] * 10
    assert np.bincount(validation.labels()).tolist() == [100] * 10
    assert train.content_size == (28, 28)


def test_fewer_validation_images_are_as_many_of_each_class(bundled):
    train, _ = bundled
    _, fewer = load_image_sets(replace(train.config, validation_images=50), channels=1)
    assert len(fewer) == 50
    by_class = np.bincount(fewer.labels(), minlength=10)
    assert by_class.min() >= 1


def test_folders_are_classes(small_data):
    train, validation = load_image_sets(small_data, channels=1)
    assert train.classes == validation.classes
    assert len(train.classes) == 10
    assert (len(train), len(validation)) == (64, 16)
    image, label = train[0]
    assert image.shape == (1, 32, 32)
    assert image.dtype == torch.uint8
    assert label == train.labels()[0]


def test_held_out_images_are_not_trained_on(small_data):
    train, validation = load_image_sets(small_data, channels=1)
    name = {split: {row["image"]["path"] for row in split.rows} for split in (train, validation)}
    assert len(name[train]) == 64
    assert not name[train] & name[validation]


def test_a_flat_folder_has_no_classes(tmp_path, small_data):
    for i in range(3):
        write_image(tmp_path / f"{i}.jpg")
    train, _ = load_image_sets(replace(small_data, path=str(tmp_path), fit="crop", validation_images=1), channels=3)
    assert train.classes == []
    assert train[0][1] == -1
    assert train.labels().tolist() == [-1, -1]


def test_train_and_val_folders_are_splits_with_classes(tmp_path, small_data):
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                write_image(tmp_path / split / name / f"{i}.png")
    config = replace(small_data, path=str(tmp_path), fit="crop", validation_split="validation")
    train, validation = load_image_sets(config, channels=3)
    assert (len(train), len(validation)) == (6, 4)
    assert train.classes == ["cat", "dog"]
    assert train.labels().tolist() == [0, 0, 0, 1, 1, 1]
    assert len(load_image_set(replace(config, split="", validation_split=None), channels=3)) == 4


def test_parquet_files_are_splits_also_in_the_hubs_shards(tmp_path, bundled, small_data):
    train, _ = bundled
    rows = train.rows.cast_column("image", datasets.Image())
    rows.select([0, 1]).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    rows.select([2]).to_parquet(tmp_path / "train-00001-of-00002.parquet")
    rows.select([3]).to_parquet(tmp_path / "test.parquet")
    loaded, held_out = load_image_sets(replace(small_data, path=str(tmp_path), validation_split="test"), channels=1)
    assert (len(loaded), len(held_out)) == (3, 1)
    assert loaded.classes == CLASSES
    for ours, original in ((loaded[2], train[2]), (held_out[0], train[3])):
        assert torch.equal(ours[0], original[0])
        assert ours[1] == original[1]


# Size and colour -------------------------------------------------------------------------------------------------


def test_pad_puts_the_very_pixels_in_the_middle(bundled):
    train, _ = bundled
    original = train.rows.cast_column("image", datasets.Image())[5]["image"]
    pixels = torch.from_numpy(np.array(original))
    padded = train[5][0][0]
    assert torch.equal(padded[2:30, 2:30], pixels)
    assert padded.sum() == pixels.sum()  # black around it
    assert pixels.sum() > 0


def test_crop_keeps_the_middle_of_the_longer_side(tmp_path, small_data):
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste((0, 0, 255), (32, 0, 64, 32))
    (tmp_path / "a").mkdir()
    for i in range(2):
        wide.save(tmp_path / "a" / f"{i}.png")
    config = replace(small_data, path=str(tmp_path), fit="crop", validation_images=1)
    image, _ = load_image_sets(config, channels=3)[0][0]
    assert torch.equal(image, torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None].expand(3, 32, 32))


def test_crop_resizes_the_shorter_side(tmp_path, small_data):
    for i in range(2):
        write_image(tmp_path / f"{i}.png", size=(200, 100))
    config = replace(small_data, path=str(tmp_path), fit="crop", validation_images=1)
    image, _ = load_image_sets(config, channels=3)[0][0]
    assert torch.equal(image[:, 0, 0], torch.tensor([200, 100, 50], dtype=torch.uint8))
    assert torch.equal(image, image[:, :1, :1].expand(3, 32, 32))


def test_one_channel_is_grey_and_three_are_colour(tmp_path, small_data):
    for i in range(2):
        write_image(tmp_path / f"{i}.png", color=(255, 0, 0))
    config = replace(small_data, path=str(tmp_path), fit="crop", validation_images=1)
    grey, colour = (load_image_sets(config, channels)[0][0][0] for channels in (1, 3))
    assert grey.shape == (1, 32, 32)
    assert grey[0, 0, 0] == 76  # 0.299 * 255: ITU-R 601 luma
    assert colour[:, 0, 0].tolist() == [255, 0, 0]


def test_other_numbers_of_channels_are_refused(small_data):
    with pytest.raises(ConfigError, match=r"1 \(grey\) or 3 channels, the model asks for 4"):
        load_image_sets(small_data, channels=4)


# Bad input -------------------------------------------------------------------------------------------------------


def test_pad_refuses_an_image_larger_than_the_resolution(small_data):
    train, _ = load_image_sets(replace(small_data, resolution=24), channels=1)
    with pytest.raises(DataError, match="28x28: fit=pad needs images of at most 24x24"):
        train[0]


def test_a_folder_without_images_is_refused(tmp_path, small_data):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match="no images in the folder"):
        load_image_sets(replace(small_data, path=str(tmp_path)), channels=1)


def test_a_path_that_is_nothing_is_answered_with_what_is_allowed(small_data):
    with pytest.raises(DataError, match=r"'garmets' is neither bundled \(fashion_mnist\), a folder, nor a hub id"):
        load_image_sets(replace(small_data, path="garmets"), channels=1)


def test_unknown_splits_and_columns_are_answered_with_the_known_ones(small_data):
    for wrong, answer in (
        ({"split": "training"}, "data.split='training': .* has the splits train"),
        ({"validation_split": "val"}, "data.validation_split='val': .* has the splits train"),
        ({"image_column": "picture"}, "data.image_column='picture': .* has image, label"),
    ):
        with pytest.raises(DataError, match=answer):
            load_image_sets(replace(small_data, **wrong), channels=1)


def test_holding_out_everything_is_refused(small_data):
    with pytest.raises(DataError, match=r"data\.validation_images=80 leaves none to train on; at most 79"):
        load_image_sets(replace(small_data, validation_images=80), channels=1)


@pytest.fixture
def truncated(tmp_path, small_data):
    """A data set whose second image is a JPEG that ends too early."""
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.jpg")
    file = tmp_path / "1.jpg"
    file.write_bytes(file.read_bytes()[:1000])
    return load_image_sets(replace(small_data, path=str(tmp_path), fit="crop", validation_images=1), channels=3)[0]


def test_a_truncated_image_is_named(truncated):
    with pytest.raises(DataError, match=r"cannot read .*1\.jpg: .*truncated"):
        [truncated[i] for i in range(len(truncated))]


def test_a_truncated_image_read_by_a_worker_process_is_one_line(truncated, capsys):
    loader = stream_loader(ImageStream(truncated, seed=0), StreamBatches(0, 3, 3, 1, 0, 1), 2, pin_memory=False)
    with pytest.raises(SystemExit) as caught, one_line_errors():
        list(loader)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: cannot read ")
    assert "1.jpg" in lines[0]


def test_a_hub_id_out_of_reach_is_one_line_at_once(tmp_path):
    command = [sys.executable, "-m", "looc_ldm.training.autoencoder", "--config", "fashion_mnist/autoencoder"]
    command += ["--data.path", "nobody/nothing"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    ended = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run")], env=environment, capture_output=True, text=True, timeout=100
    )
    assert time.monotonic() - started < 60
    assert ended.returncode == 2
    assert len(ended.stderr.strip().splitlines()) == 1
    assert ended.stderr.startswith("error: cannot load data.path='nobody/nothing'")
    assert not (tmp_path / "run").exists()


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
        index, (image, _) = stream.index_at(position), stream[position]
        original = train[index][0].float() / 127.5 - 1
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
        assert torch.equal(stream[position][0], train[stream.index_at(position)][0].float() / 127.5 - 1)


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
    for (images, labels), (resumed_images, resumed_labels) in zip(whole[9:], rest, strict=True):
        assert torch.equal(images, resumed_images)
        assert torch.equal(labels, resumed_labels)


def test_making_a_loader_draws_no_random_numbers(small_data):
    train, _ = load_image_sets(small_data, channels=1)
    before = torch.get_rng_state()
    next(iter(stream_loader(ImageStream(train, 0), StreamBatches(0, 8, 8, 1, 0, 1), 0, False)))
    assert torch.equal(torch.get_rng_state(), before)


def test_data_put_in_place_of_other_data_is_the_data_that_is_read(tmp_path, garments, small_data):
    shutil.copytree(garments, tmp_path / "images")
    config = replace(small_data, path=str(tmp_path / "images"))
    before, _ = load_image_sets(config, channels=1)
    shutil.rmtree(next((tmp_path / "images").iterdir()))
    after, _ = load_image_sets(config, channels=1)
    assert (len(before), len(after)) == (64, 56)
    assert len(after.classes) == 9


def test_pad_refuses_images_of_several_sizes(small_data, tmp_path):
    for i, size in enumerate([(28, 28), (28, 28), (20, 24)]):
        Image.new("L", size).save(tmp_path / f"{i}.png")
    train, held_out = load_image_sets(replace(small_data, path=str(tmp_path), validation_images=1), channels=1)
    with pytest.raises(DataError, match="20x24: fit=pad needs images of one size, and the first is 28x28"):
        [images[i] for images in (train, held_out) for i in range(len(images))]


def test_a_broken_parquet_file_is_one_line(small_data, tmp_path):
    (tmp_path / "train.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"cannot load data\.path"):
        load_image_sets(replace(small_data, path=str(tmp_path)), channels=1)


def test_sixteen_bit_images_keep_their_greys(small_data, tmp_path):
    for i in range(2):
        Image.fromarray(np.full((28, 28), 30000, np.uint16)).save(tmp_path / f"{i}.png")
    train, _ = load_image_sets(replace(small_data, path=str(tmp_path), validation_images=1), channels=1)
    assert train[0][0][0, 16, 16] == 30000 // 256


def test_words_in_file_names_are_not_splits(small_data, tmp_path):
    folder = tmp_path / "odd [1] name"
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for name in ("ILSVRC2012_val_1", "test_2", "3"):
            Image.new("L", (28, 28)).save(folder / label / f"{name}.png")
    train, held_out = load_image_sets(replace(small_data, path=str(folder), validation_images=1), channels=1)
    assert len(train) + len(held_out) == 6
    assert train.classes == ["a", "b"]
