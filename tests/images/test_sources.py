"""Each kind of data as images and classes, and one line for what is not as it should be."""

import io
import json
import os
import re
import shutil
import tarfile
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

import looc_ldm.images.open
from looc_ldm.images.config import DataConfig
from looc_ldm.images.image_set import load_image_set
from looc_ldm.images.open import open_sources
from looc_ldm.training.data import load_image_sets
from looc_ldm.utils.errors import DataError, UnreadableImage
from tiny import write_image, write_tar

CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


# Bundled, folders ------------------------------------------------------------------------------------------------


def test_the_bundled_set_has_ten_balanced_classes(bundled):
    train, validation = bundled
    assert train.classes == validation.classes == CLASSES
    assert np.bincount(train.labels()).tolist() == [800] * 10
    assert np.bincount(validation.labels()).tolist() == [100] * 10
    assert train.content_size == (28, 28)


def test_stored_sizes_of_tables_and_folders_are_known_for_every_image(bundled, garments):
    train, _ = bundled
    sizes = train.source.sizes()
    assert [len(train.source.read(i).content) for i in (0, 999, 5000, 7999)] == sizes[[0, 999, 5000, 7999]].tolist()
    folder = load_image_set(DataConfig(path=str(garments), split="train"), 1)
    assert (
        folder.source.sizes()[:5] == [len(Path(folder.source.read(i).content).read_bytes()) for i in range(5)]
    ).all()


def test_as_many_images_of_each_class_are_held_out(small_data):
    _, validation = load_image_sets(replace(small_data, validation_images=20), channels=1)
    assert np.bincount(validation.labels()).tolist() == [2] * 10


def test_folders_are_classes_and_held_out_images_are_not_trained_on(small_data):
    train, validation = load_image_sets(small_data, channels=1)
    assert train.classes == validation.classes
    assert len(train.classes) == 10
    names = [{images.source.read(index).name for index in range(len(images))} for images in (train, validation)]
    assert list(map(len, names)) == [64, 16]
    assert not names[0] & names[1]
    image, label = train[0]
    assert image.shape == (1, 32, 32)
    assert image.dtype == torch.uint8
    assert label == train.labels()[0]


def test_a_flat_folder_has_no_classes(tmp_path, small_data):
    for i in range(3):
        write_image(tmp_path / f"{i}.jpg")
    train, _ = load_image_sets(replace(small_data, path=str(tmp_path), fit="crop", validation_images=1), channels=3)
    assert train.classes == []
    assert train[0][1] == -1
    assert train.labels().tolist() == [-1, -1]


def test_train_and_val_folders_are_splits_with_classes(tmp_path, small_data, caplog):
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
    assert "no training images" not in caplog.text
    for name in ("ant", "bee"):
        write_image(tmp_path / "val" / name / "1.png")
    train, validation = load_image_sets(config, channels=3)
    assert train.labels().tolist() == [2, 2, 2, 3, 3, 3]
    assert f"{tmp_path}: validation images of ant, bee, but no training images" in caplog.text


def test_words_in_file_names_are_not_splits(small_data, tmp_path):
    folder = tmp_path / "odd [1] name"
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for name in ("ILSVRC2012_val_1", "test_2", "3"):
            Image.new("L", (28, 28)).save(folder / label / f"{name}.png")
    train, held_out = load_image_sets(replace(small_data, path=str(folder), validation_images=1), channels=1)
    assert len(train) + len(held_out) == 6
    assert train.classes == ["a", "b"]


def test_data_put_in_place_of_other_data_is_the_data_that_is_read(tmp_path, garments, small_data):
    shutil.copytree(garments, tmp_path / "images")
    config = replace(small_data, path=str(tmp_path / "images"))
    before, _ = load_image_sets(config, channels=1)
    shutil.rmtree(next((tmp_path / "images").iterdir()))
    after, _ = load_image_sets(config, channels=1)
    assert (len(before), len(after)) == (64, 56)
    assert len(after.classes) == 9


def test_a_folder_without_images_is_refused(tmp_path, small_data):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match="no images in the folder"):
        load_image_sets(replace(small_data, path=str(tmp_path)), channels=1)


def test_the_first_of_nested_folders_is_the_class_and_hidden_files_are_left_out(tmp_path, config):
    for place in ("cat/a/1.png", "cat/__2__.png", "dog/b/c/3.png", ".trash/4.png", "dog/.5.png", "__MACOSX/6.png"):
        write_image(tmp_path / place)
    write_image(tmp_path / "__background__" / "7.png")
    (tmp_path / "dog" / "back").symlink_to(tmp_path)  # a link that leads in a circle
    (tmp_path / "eel").symlink_to(tmp_path / "cat" / "a")
    images = load_image_set(config, channels=3)
    assert images.classes == ["__background__", "cat", "dog", "eel"]
    assert images.labels().tolist() == [0, 1, 1, 2, 3]


def test_a_link_that_leads_nowhere_is_an_unreadable_image_and_files_of_other_kinds_are_said(tmp_path, config, caplog):
    write_image(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "a" / "self").symlink_to("self")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "raw.cr2").write_bytes(b"no image")
    (tmp_path / "metadata.csv").write_text("file_name,label\na/1.png,a")
    (tmp_path / "a" / "metadata.csv").write_text("file_name,label\n1.png,a")
    images = load_image_set(config, channels=3)
    assert len(images) == 2
    with pytest.raises(UnreadableImage, match=r"cannot read .*gone\.png: "):
        images.read(1)
    assert f"{tmp_path}: 3 files with other suffixes are not read" in caplog.text
    assert f"{tmp_path}: 1 label files in sub-folders are not used; the first is a/metadata.csv" in caplog.text
    assert f"{tmp_path}: the only label is a, so there are no classes" in caplog.text


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "pgm", "pbm", "avif", "jp2", "tga", "JPEG"])
def test_every_usual_suffix_is_read(tmp_path, config, suffix):
    Image.new("1" if suffix == "pbm" else "L", (32, 32), 1).save(tmp_path / f"a.{suffix}")
    assert load_image_set(config, channels=1)[0][0].shape == (1, 32, 32)


@pytest.mark.parametrize("names", [("bus", "train", "truck"), ("cats", "dogs", "test")])
def test_a_class_named_like_a_split_does_not_drop_the_others(tmp_path, config, names):
    for name in names:
        write_image(tmp_path / name / "1.png")
    with pytest.raises(DataError, match=r"named like a split, beside other images, such as .*: data\.split=all takes"):
        load_image_sets(config, channels=3)
    images = load_image_set(replace(config, split="all"), channels=3)
    assert (images.classes, images.labels().tolist()) == (list(names), [0, 1, 2])


def test_images_beside_the_folders_of_splits_are_said_to_be_left_out(tmp_path, config, caplog):
    for place in ("train/a/1.png", "train/b/1.png", "val/a/1.png", "extra/1.png"):
        write_image(tmp_path / place)
    assert len(load_image_set(config, channels=3)) == 2
    assert "images beside the splits (train, val) are left out, such as extra/1.png" in caplog.text


def test_labels_in_dataset_json_and_metadata_come_before_folders(tmp_path, config, caplog):
    names = [f"{folder}/{number}.png" for folder in ("00000", "00001") for number in range(4)]
    for name in names:
        write_image(tmp_path / name)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[name, i % 3] for i, name in enumerate(names)]}))
    images = load_image_set(config, channels=3)
    assert (images.classes, images.labels().tolist()) == (["0", "1", "2"], [0, 1, 2, 0, 1, 2, 0, 1])
    (tmp_path / "dataset.json").unlink()
    rows = [f"{name},{'xy'[name.startswith('00001')]}" for name in names[1:]]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    images = load_image_set(config, channels=3)
    assert (images.classes, images.labels().tolist()) == (["x", "y"], [-1, 0, 0, 0, 1, 1, 1, 1])
    (tmp_path / "metadata.csv").unlink()
    numbers = datasets.Dataset.from_dict({"file_name": names, "label": [-1, 0, 0, 0, 1, 1, 1, 1]})
    numbers.to_parquet(tmp_path / "metadata.parquet")
    images = load_image_set(config, channels=3)
    assert (images.classes, images.labels().tolist()) == (["0", "1"], [-1, 0, 0, 0, 1, 1, 1, 1])
    (tmp_path / "metadata.parquet").unlink()
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": "a"}) + "\n" for n in names))
    assert load_image_set(config, channels=3).classes == ["00000", "00001"]
    assert "metadata.jsonl is not used: it lacks one column file_name and one label" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset.json", '{"labels": 5}'),
        ("dataset.json", '{"labels": [[["1.png"], 0]]}'),
        ("metadata.jsonl", '{"file_name": "1.png", "label": [1, 2]}'),
        ("metadata.csv", "file_name,label\n1.png,0\n2.png,99999999999"),
    ],
)
def test_labels_that_are_no_classes_are_refused_with_the_place(tmp_path, config, name, content):
    for image in ("1.png", "2.png"):
        write_image(tmp_path / image)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        open_sources(replace(config, path=str(tmp_path)))


def test_labels_of_other_files_are_said(tmp_path, config, caplog):
    for image in ("train/1.png", "train/2.png", "val/1.png"):
        write_image(tmp_path / image)
    (tmp_path / "metadata.csv").write_text("file_name,label\n1.png,a")
    file = tmp_path / "train" / "metadata.csv"
    file.write_text("file_name,label\n./1.png,a\n./2.png,b")
    assert open_sources(replace(config, path=str(tmp_path)))["train"].classes == ["a", "b"]
    assert f"{tmp_path / 'metadata.csv'} is not used" in caplog.text
    file.write_text("file_name,label\nx/1.png,a\nx/2.png,b")
    assert not open_sources(replace(config, path=str(tmp_path)))["train"].classes
    assert "the label file lists other files, such as x/1.png" in caplog.text


def test_an_image_without_a_label_counts_as_unreadable_only_if_labels_are_needed(tmp_path, config):
    pictures(3, label=["a", None, "b"]).to_parquet(tmp_path / "train.parquet")
    images, _ = load_image_sets(config, channels=3)
    assert [label for _, label in images] == [0, -1, 1]
    images, _ = load_image_sets(config, channels=3, needs_labels=True)
    assert [label for _, label in images] == [0, 1, 1]
    with pytest.raises(UnreadableImage, match="has no label"):
        images.read(1)


def test_larger_images_than_pillows_limit_are_read_if_the_config_says_so(tmp_path, config, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    write_image(tmp_path / "a.png", size=(64, 64))
    with pytest.raises(UnreadableImage, match="exceeds limit of 1000 pixels, could be decompression bomb"):
        load_image_set(config, channels=3).read(0)
    assert load_image_set(replace(config, max_image_pixels=5000), channels=3)[0][0].shape == (3, 32, 32)


def test_folders_are_no_classes_where_the_config_says_so(tmp_path, config):
    for place in ("00000/1.png", "01000/2.png"):  # as FFHQ is distributed
        write_image(tmp_path / place)
    assert load_image_set(config, channels=3).classes == ["00000", "01000"]
    assert load_image_set(replace(config, label_column=""), channels=3).classes == []


def test_images_beside_folders_have_no_classes_and_the_first_of_them_is_named(tmp_path, config, caplog):
    for place in ("cat/1.png", "dog/2.png", "3.png"):
        write_image(tmp_path / place)
    assert load_image_set(config, channels=3).classes == []
    assert "2 images lie in sub-folders and 1 beside them, the first of which is 3.png" in caplog.text
    caplog.clear()
    assert load_image_set(replace(config, label_column=""), channels=3).classes == []
    assert not caplog.text


def test_a_split_without_some_of_the_classes_counts_as_the_others(tmp_path, config):
    for place in ("train/a/1.png", "train/b/2.png", "train/c/3.png", "val/c/4.png"):
        write_image(tmp_path / place)
    train, validation = load_image_sets(replace(config, validation_split="validation"), channels=3)
    assert train.classes == validation.classes == ["a", "b", "c"]
    assert validation.labels().tolist() == [2]


def test_two_folders_of_one_split_are_refused(tmp_path, config):
    for place in ("train/1.png", "val/2.png", "validation/3.png"):
        write_image(tmp_path / place)
    with pytest.raises(DataError, match="two folders of the split validation: val and validation"):
        load_image_set(config, channels=3)


def test_file_names_that_are_no_text_are_read(tmp_path, config):
    write_image(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff\xfe.png")
    assert load_image_set(config, channels=3)[0][0].shape == (3, 32, 32)


# Tables ----------------------------------------------------------------------------------------------------------


def pictures(count: int, **columns) -> datasets.Dataset:
    """A table of single-coloured images, number i of brightness 20 i, and further columns."""
    images = [Image.new("RGB", (32, 32), (20 * i,) * 3) for i in range(count)]
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())


def brightness(images) -> list[int]:
    return [20 * round(images[index][0].float().mean().item() / 20) for index in range(len(images))]


@pytest.fixture
def config(tmp_path, small_data) -> DataConfig:
    """Settings for the data that a test puts into its folder, with all training images for validation, too."""
    return replace(small_data, path=str(tmp_path), fit="crop", validation_split="train")


def test_parquet_files_are_splits_also_in_the_hubs_shards(tmp_path, config):
    rows = (
        pictures(4).add_column("label", [2, 0, 1, 0]).cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
    )
    rows.select([0, 1]).to_parquet(tmp_path / "data" / "train-00000-of-00002.parquet")
    rows.select([2]).to_parquet(tmp_path / "data" / "train-00001-of-00002.parquet")
    rows.select([3]).to_parquet(tmp_path / "data" / "test.parquet")
    train, test = load_image_sets(replace(config, validation_split="test"), channels=3)
    assert (brightness(train), brightness(test)) == ([0, 20, 40], [60])
    assert train.classes == test.classes == ["a", "b", "c"]
    assert (train.labels().tolist(), test.labels().tolist()) == ([2, 0, 1], [0])
    assert [train[index][1] for index in range(3)] == [2, 0, 1]


def test_a_saved_data_set_is_read_from_its_folder(tmp_path, config):
    rows = pictures(3, label=["x", "y", "x"])
    datasets.DatasetDict(train=rows, validation=rows.select([1])).save_to_disk(tmp_path / "splits")
    rows.save_to_disk(tmp_path / "one")
    train, validation = load_image_sets(
        replace(config, path=str(tmp_path / "splits"), validation_split="validation"), channels=3
    )
    assert (brightness(train), brightness(validation)) == ([0, 20, 40], [20])
    assert brightness(load_image_set(replace(config, path=str(tmp_path / "one")), channels=3)) == [0, 20, 40]


def test_text_labels_are_classes_of_all_splits_together(tmp_path, config):
    pictures(3, label=["dog", "cat", "dog"]).to_parquet(tmp_path / "train.parquet")
    pictures(2, label=["eel", "dog"]).to_parquet(tmp_path / "test.parquet")
    train, test = load_image_sets(replace(config, validation_split="test"), channels=3)
    assert train.classes == test.classes == ["cat", "dog", "eel"]
    assert (train.labels().tolist(), test.labels().tolist()) == ([1, 0, 1], [2, 1])


def test_numbers_are_classes_only_if_the_config_counts_them(tmp_path, config, caplog):
    pictures(4, label=[3, 0, 1, 1]).to_parquet(tmp_path / "train.parquet")
    images = load_image_set(config, channels=3)
    assert images.classes == []
    assert images.labels().tolist() == [-1] * 4
    assert "data.num_classes makes numbers classes" in caplog.text
    caplog.clear()
    images = load_image_set(replace(config, num_classes=4), channels=3)
    assert images.classes == ["0", "1", "2", "3"]
    assert images.labels().tolist() == [3, 0, 1, 1]
    assert not caplog.text
    with pytest.raises(DataError, match=r"image 0 of .*\(train\) has the label 3: the 3 classes are '0' to '2'"):
        load_image_set(replace(config, num_classes=3), channels=3)


def test_the_number_of_classes_must_be_that_of_the_names(tmp_path, config):
    pictures(2, label=["a", "b"]).to_parquet(tmp_path / "train.parquet")
    assert load_image_set(replace(config, num_classes=2), channels=3).classes == ["a", "b"]
    with pytest.raises(DataError, match=r"data\.num_classes=3: the split train of .* has 2 classes"):
        load_image_set(replace(config, num_classes=3), channels=3)
    with pytest.raises(DataError, match=r"data\.num_classes=3: .* has no labels"):
        load_image_set(replace(config, num_classes=3, label_column="kind"), channels=3)


def test_a_test_split_without_labels_has_no_classes_and_a_wrong_label_is_named(tmp_path, config):
    label = datasets.ClassLabel(names=["a", "b"])
    rows = pictures(3).add_column("label", [0, 1, 1]).cast_column("label", label)
    rows.to_parquet(tmp_path / "train.parquet")
    pictures(2).add_column("label", [-1, -1]).cast_column("label", label).to_parquet(tmp_path / "test.parquet")
    train, test = load_image_sets(replace(config, validation_split="test"), channels=3)
    assert train.classes == ["a", "b"]
    assert test.classes == []
    assert test[0][1] == -1
    rows = pictures(3).add_column("label", [0, None, 1]).cast_column("label", label)
    rows.to_parquet(tmp_path / "train.parquet")
    assert load_image_set(config, channels=3).labels().tolist() == [0, -1, 1]


def test_images_may_be_plain_bytes_and_missing_ones_are_named(tmp_path, config):
    rows = pictures(3).cast_column("image", datasets.Image(decode=False))
    content = [rows[0]["image"]["bytes"], None, rows[2]["image"]["bytes"]]
    datasets.Dataset.from_dict({"picture": content}).to_parquet(tmp_path / "train.parquet")
    images = load_image_set(replace(config, image_column="picture"), channels=3)
    assert [int(images[index][0].float().mean()) for index in (0, 2)] == [0, 40]
    with pytest.raises(UnreadableImage, match=r"image 1 of .*\(train\) is missing"):
        images[1]


def test_a_broken_parquet_file_is_one_line(small_data, tmp_path):
    (tmp_path / "train.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"cannot read .*train\.parquet: Parquet magic bytes not found"):
        load_image_sets(replace(small_data, path=str(tmp_path)), channels=1)


@pytest.fixture
def hub_without_data_sets():
    """Address of a server that has nothing."""

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [("nothing", ", nor a data set of that name on the hub"), ("http://127.0.0.1:9", "; the hub cannot be reached: ")],
)
def test_a_path_that_is_neither_on_the_disk_nor_on_the_hub_is_answered_at_once(
    config, monkeypatch, hub_without_data_sets, endpoint, reason, streaming
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    address = hub_without_data_sets if endpoint == "nothing" else endpoint
    monkeypatch.setattr(looc_ldm.images.open, "HfApi", partial(huggingface_hub.HfApi, endpoint=address))
    config = replace(config, path="nobody/nothing", streaming=streaming, validation_split="validation")
    started = time.monotonic()
    with pytest.raises(DataError, match=f"there is no folder 'nobody/nothing'{reason}"):
        load_image_sets(config, channels=3)
    assert time.monotonic() - started < 5


def test_only_the_splits_that_are_asked_for_count(tmp_path, config):
    config = replace(config, num_classes=2)
    pictures(3, label=[0, 1, 1]).to_parquet(tmp_path / "train.parquet")
    pictures(2, label=[0, 5]).to_parquet(tmp_path / "test.parquet")
    train, _ = load_image_sets(config, channels=3)
    assert train.labels().tolist() == [0, 1, 1]
    with pytest.raises(DataError, match=r"image 1 of .* has the label 5"):
        load_image_sets(replace(config, validation_split="test"), channels=3)
    with pytest.raises(DataError, match=r"data.split='other': .* has the splits test, train"):
        load_image_sets(replace(config, split="other"), channels=3)


def test_a_split_of_texts_that_are_all_missing_has_no_classes(tmp_path, config):
    pictures(2, label=["b", "a"]).to_parquet(tmp_path / "train.parquet")
    rows = pictures(2, label=[None, None]).cast_column("label", datasets.Value("string"))
    rows.to_parquet(tmp_path / "test.parquet")
    train, test = load_image_sets(replace(config, validation_split="test"), channels=3)
    assert train.classes == ["a", "b"]
    assert test.classes == []
    assert test.labels().tolist() == [-1, -1]


# WebDataset ------------------------------------------------------------------------------------------------------


def write_shards(folder, examples: list[dict[str, bytes]], name="train-{:04d}.tar", per_shard=2):
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(examples), per_shard):
        write_tar(folder / name.format(start // per_shard), examples[start : start + per_shard], start)


def encoded(number: int, format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (20 * number,) * 3).save(file, format)
    return file.getvalue()


@pytest.mark.parametrize("per_shard", [1, 2, 5])
def test_webdataset_shards_with_numbered_classes_and_any_kinds_of_images(tmp_path, config, per_shard):
    kinds = [("jpg", "jpeg"), ("png", "png"), ("webp", "webp"), ("small.JPEG", "jpeg"), ("gif", "gif")]
    examples = [{suffix: encoded(i, kind), "cls": str(i % 3).encode()} for i, (suffix, kind) in enumerate(kinds)]
    write_shards(tmp_path, examples, per_shard=per_shard)
    write_shards(tmp_path, examples[:1], "mine-val-{:04d}.tar")
    config = replace(config, num_classes=3, validation_split="validation")
    train, validation = load_image_sets(config, channels=3)
    assert (brightness(train), brightness(validation)) == ([0, 20, 40, 60, 80], [0])
    assert train.classes == ["0", "1", "2"]
    assert train.labels().tolist() == [0, 1, 2, 0, 1]
    assert [train.source.read(index).name for index in (2, 3)] == ["00002.webp", "00003.small.JPEG"]
    assert len(load_image_set(replace(config, image_column="png"), channels=3)) == 5


def test_webdataset_classes_in_json_or_in_a_text_of_their_own(tmp_path, config):
    examples = [
        {
            "jpg": encoded(i, "jpeg"),
            "json": json.dumps({"label": "ab"[i % 2], "id": i}).encode(),
            "txt": b"xyx"[i : i + 1],
        }
        for i in range(3)
    ]
    write_shards(tmp_path / "train", examples, "{:04d}.tar")
    images = load_image_set(config, channels=3)
    assert (images.classes, images.labels().tolist()) == (["a", "b"], [0, 1, 0])
    images = load_image_set(replace(config, label_column="txt"), channels=3)
    assert (images.classes, images.labels().tolist()) == (["x", "y"], [0, 1, 0])
    images = load_image_set(replace(config, label_column="id", num_classes=3), channels=3)
    assert (images.classes, images.labels().tolist()) == (["0", "1", "2"], [0, 1, 2])


def test_webdataset_without_classes_and_with_two_images(tmp_path, config):
    write_shards(tmp_path, [{"png": encoded(i, "png"), "mask.png": encoded(2, "png")} for i in range(3)])
    with pytest.raises(
        DataError, match=r"data\.image_column='image': .* has the columns png, mask\.png, __key__, __url__"
    ):
        load_image_set(config, channels=3)
    images = load_image_set(replace(config, image_column="mask.png"), channels=3)
    assert brightness(images) == [40, 40, 40]
    assert images.classes == []


def test_shards_of_images_win_over_tables_of_metadata_beside_them(tmp_path, config):
    write_shards(tmp_path, [{"png": encoded(i, "png")} for i in range(2)], "{:05d}.tar")
    datasets.Dataset.from_dict({"url": ["x", "y"], "key": ["0", "1"]}).to_parquet(tmp_path / "00000.parquet")
    assert brightness(load_image_set(config, channels=3)) == [0, 20]


def test_empty_shards_are_passed_over_and_compressed_ones_named(tmp_path, config, caplog):
    write_shards(tmp_path, [{"png": encoded(i, "png")} for i in range(2)])
    (tmp_path / "empty.tar").touch()
    tarfile.open(tmp_path / "also-empty.tar", "w").close()
    assert brightness(load_image_set(config, channels=3)) == [0, 20]
    assert f"{tmp_path / 'empty.tar'} is empty" in caplog.text
    assert f"{tmp_path / 'also-empty.tar'} is empty" in caplog.text
    tarfile.open(tmp_path / "packed.tar", "w:gz").close()
    with pytest.raises(DataError, match=rf"cannot read {tmp_path}/packed\.tar: the archive is compressed with gzip"):
        load_image_set(config, channels=3)


def test_shards_that_are_not_found_are_answered_with_where_they_may_lie(tmp_path, config):
    write_shards(tmp_path / "a" / "b", [{"png": encoded(1, "png")}], "train-{}.tar.gz")
    with pytest.raises(DataError, match=r"no images in .*Uncompressed shards \(.tar, .parquet\) may be in it"):
        load_image_set(config, channels=3)


def test_parquet_files_without_rows_are_passed_over(tmp_path, config, caplog):
    pictures(2).to_parquet(tmp_path / "train-0.parquet")
    pictures(2).select([]).to_parquet(tmp_path / "train-1.parquet")
    assert brightness(load_image_set(config, channels=3)) == [0, 20]
    assert f"{tmp_path / 'train-1.parquet'} is empty" in caplog.text


def test_a_table_of_lists_of_images_or_without_rows_is_one_line(tmp_path, config):
    image = pictures(1).cast_column("image", datasets.Image(decode=False))[0]["image"]
    features = datasets.Features({"image": datasets.List(datasets.Image())})
    datasets.Dataset.from_dict({"image": [[image, image]]}, features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"data\.image_column='image': it holds lists in .*, not one image per row"):
        load_image_set(config, channels=3)
    pictures(1).select([]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="no images in the folder"):
        load_image_sets(config, channels=3)


def test_webdataset_classes_that_are_no_numbers_are_one_line(tmp_path, config):
    write_shards(tmp_path, [{"png": encoded(0, "png"), "cls": b"cat"}])
    with pytest.raises(DataError, match=r"cannot load data\.path=.*invalid literal.*'cat'"):
        load_image_set(config, channels=3)


@pytest.mark.parametrize("blocks", [3, 6])  # within an image, and where the next header would begin
def test_the_rest_of_a_shard_that_is_cut_off_is_not_left_out_in_silence(tmp_path, config, blocks):
    write_shards(tmp_path, [{"png": encoded(i, "png"), "cls": b"0"} for i in range(4)], per_shard=4)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[: 512 * blocks])
    with pytest.raises(DataError, match=rf"cannot read {file}: the archive is cut off"):
        load_image_sets(config, channels=3)


# Names in the config ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["garmets", ""])
def test_a_path_that_is_nothing_is_answered_with_what_is_allowed(small_data, path):
    with pytest.raises(DataError, match=f"'{path}' is neither bundled .fashion_mnist., a folder, nor a hub id"):
        load_image_sets(replace(small_data, path=path), channels=1)


@pytest.mark.parametrize("path", [".", "..", "./", "../data", "fashion_mnist/.."])
def test_a_relative_path_is_a_place_below_the_working_folder(path, small_data, tmp_path, monkeypatch):
    (tmp_path / "below" / "fashion_mnist").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    with pytest.raises(DataError, match=rf"no images in the folder {re.escape(str(Path(path)))} \("):
        load_image_sets(replace(small_data, path=path), channels=1)


def test_unknown_splits_and_columns_are_answered_with_the_known_ones(small_data):
    for wrong, answer in (
        ({"split": "some"}, "data.split='some': .* has the splits train"),
        ({"validation_split": "val"}, "='val': .* has the splits train. --data.validation_split null holds out"),
        ({"image_column": "picture"}, "data.image_column='picture': .* has the columns image and label"),
    ):
        with pytest.raises(DataError, match=answer):
            load_image_sets(replace(small_data, **wrong), channels=1)


def test_a_split_may_be_named_as_its_folder_is(tmp_path, config):
    for name in ("train/1", "train/2", "val/3"):
        write_image(tmp_path / f"{name}.png")
    for name in ("val", "validation", "valid"):
        images, held_out = load_image_sets(replace(config, validation_split=name), channels=3)
        assert (len(images), len(held_out)) == (2, 1)


def test_holding_out_everything_is_refused(small_data):
    with pytest.raises(DataError, match=r"data\.validation_images=80 leaves none to train on; at most 79"):
        load_image_sets(replace(small_data, validation_images=80), channels=1)


def test_archives_left_beside_the_folders_of_splits_are_not_read(tmp_path, config):
    write_image(tmp_path / "train" / "a" / "1.png")
    write_image(tmp_path / "train" / "b" / "2.png")
    write_shards(tmp_path, [{"png": encoded(3, "png")}], "ILSVRC2012_img_train.tar")
    images = load_image_set(config, channels=3)
    assert (len(images), images.classes) == (2, ["a", "b"])


def test_images_beside_shards_are_refused(tmp_path, config):
    write_image(tmp_path / "a" / "1.png")
    write_shards(tmp_path, [{"png": encoded(3, "png")}])
    with pytest.raises(DataError, match="holds images beside webdataset files: give a folder of only one kind"):
        load_image_set(config, channels=3)


def test_a_flat_validation_folder_has_no_classes(tmp_path, config):
    for folder in ("train/n01440764", "train/n01443537", "val"):
        write_image(tmp_path / folder / "1.JPEG")
    train, validation = load_image_sets(replace(config, validation_split="validation"), channels=3)
    assert train.classes == ["n01440764", "n01443537"]
    assert validation.classes == []
    assert len(validation) == 1
