"""From an image file to a square of pixels: decoding, and the transforms that `data.fit` names."""

import errno
import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from looc_ldm.images import pixels as images
from looc_ldm.images.config import DataConfig
from looc_ldm.images.pixels import describe_transform, read_image, to_pixels, to_square
from looc_ldm.training.data import load_image_sets
from looc_ldm.utils.errors import ConfigError, DataError, UnreadableImage
from tiny import write_image


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Something with large and small structures."""
    random = np.random.default_rng(width * height)
    coarse = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height))
    fine = random.integers(-40, 40, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, format: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# Transforms ------------------------------------------------------------------------------------------------------


def adm_as_published(image: Image.Image, side: int) -> np.ndarray:
    """The centre crop of ADM step by step, as its paper's code base describes it, in arrays where that is possible."""
    width, height = image.size
    while min(width, height) >= 2 * side:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.BOX)
    scale = side / min(width, height)
    image = image.resize((round(width * scale), round(height * scale)), resample=Image.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


@pytest.mark.parametrize("size", [(64, 64), (63, 127), (500, 375), (129, 128), (333, 517), (40, 21), (20, 35)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_adm_is_adms_centre_crop(size, mode):
    image = photograph(*size, mode)
    ours = np.array(to_square(image, "adm", 32))
    assert ours.shape[:2] == (32, 32)
    assert np.array_equal(ours, adm_as_published(image, 32))


def test_the_transforms_differ_and_none_changes_an_image_that_has_the_size_already():
    large, fitting = photograph(200, 100), photograph(32, 32)
    results = {fit: np.array(to_square(large, fit, 32)) for fit in ("crop", "adm")}
    assert np.abs(results["crop"].astype(int) - results["adm"]).max() > 3
    for fit in ("crop", "random_crop", "adm", "pad"):
        assert np.array_equal(np.array(to_square(fitting, fit, 32)), np.array(fitting))


def test_random_crop_at_the_centre_is_crop_and_at_the_corner_is_the_corner():
    image = photograph(96, 64)
    assert to_square(image, "random_crop", 32) == to_square(image, "crop", 32)
    assert to_square(image, "random_crop", 64, place=(0.0, 0.0)) == image.crop((0, 0, 64, 64))
    assert to_square(image, "random_crop", 64, place=(1.0, 1.0)) == image.crop((32, 0, 96, 64))


def test_pixels_are_a_tensor_with_channels_first_that_may_be_written_to():
    for mode, channels in (("L", 1), ("RGB", 3)):
        image = photograph(3, 2, mode)
        pixels = to_pixels(image)
        assert pixels.shape == (channels, 2, 3)
        assert pixels.permute(1, 2, 0).numpy().tobytes() == image.tobytes()
        pixels.zero_()
        assert np.array(image).any()


def test_the_transform_in_words():
    config = DataConfig(resolution=256, fit="crop", flip=True)
    words = {fit: describe_transform(replace(config, fit=fit)) for fit in ("crop", "random_crop", "adm", "pad")}
    assert words["crop"] == (
        "centred square of the shorter side, resized to 256x256 (Lanczos); mirrored at random in training"
    )
    assert words["adm"] == (
        "halved by box filters while the shorter side is at least 512, shorter side resized to 256 (bicubic), "
        "centre crop 256x256; mirrored at random in training"
    )
    assert "random place" in words["random_crop"]
    assert len(set(words.values())) == 4
    assert "mirrored" not in describe_transform(replace(config, flip=False))


def test_pad_puts_the_very_pixels_in_the_middle(bundled):
    train, _ = bundled
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(train.source.read(5).content))))
    padded = train[5][0][0]
    assert torch.equal(padded[2:30, 2:30], pixels)
    assert padded.sum() == pixels.sum()  # black around it
    assert pixels.sum() > 0


def test_crop_keeps_the_middle_of_the_longer_side_and_resizes_the_shorter():
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste((0, 0, 255), (32, 0, 64, 32))
    narrow = Image.new("RGB", (100, 200), (0, 0, 255))
    for image in (wide, narrow):
        assert np.array_equal(np.array(to_square(image, "crop", 32)), np.full((32, 32, 3), (0, 0, 255)))


def test_one_channel_is_grey_and_three_are_colour(tmp_path, small_data):
    for i in range(2):
        write_image(tmp_path / f"{i}.png", color=(255, 0, 0))
    config = replace(small_data, path=str(tmp_path), fit="crop", validation_images=1)
    grey, colour = (load_image_sets(config, channels)[0][0][0] for channels in (1, 3))
    assert grey.shape == (1, 32, 32)
    assert grey[0, 0, 0] == 76  # 0.299 * 255: ITU-R 601 luma
    assert colour[:, 0, 0].tolist() == [255, 0, 0]


def test_other_numbers_of_channels_are_refused(small_data):
    with pytest.raises(ConfigError, match=r"1 \(grey\) or 3 channels, but the model expects 4"):
        load_image_sets(small_data, channels=4)


def test_pad_refuses_an_image_larger_than_the_resolution(small_data):
    train, _ = load_image_sets(replace(small_data, resolution=24), channels=1)
    with pytest.raises(DataError, match=r"ankle boot.*png is 28x28: fit=pad needs images of at most 24x24"):
        train[0]


def test_pad_refuses_images_of_several_sizes(small_data, tmp_path):
    for i, size in enumerate([(28, 28), (28, 28), (20, 24)]):
        Image.new("L", size).save(tmp_path / f"{i}.png")
    train, held_out = load_image_sets(replace(small_data, path=str(tmp_path), validation_images=1), channels=1)
    with pytest.raises(DataError, match="20x24: fit=pad needs images of one size, and the first is 28x28"):
        [images[i] for images in (train, held_out) for i in range(len(images))]


def test_sixteen_bit_images_keep_their_greys(small_data, tmp_path):
    for i in range(2):
        Image.fromarray(np.full((28, 28), 30000, np.uint16)).save(tmp_path / f"{i}.png")
    train, _ = load_image_sets(replace(small_data, path=str(tmp_path), validation_images=1), channels=1)
    assert train[0][0][0, 16, 16] == 30000 // 256


# Decoding --------------------------------------------------------------------------------------------------------


def test_bytes_and_files_are_the_same_image(tmp_path):
    image = photograph(20, 30)
    image.save(tmp_path / "a.png")
    for content in (encoded(image), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(np.array(read_image(content, "RGB", "a")), np.array(image))


def broken_files() -> dict[str, bytes]:
    jpeg, png = encoded(photograph(64, 64), "jpeg"), encoded(photograph(64, 64))
    # A PNG that says it is 100,000 x 100,000 pixels, with the right checksum.
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    return {
        "empty": b"",
        "text": b"<html>404 not found</html>",
        "a cut-off jpeg": jpeg[: len(jpeg) // 2],
        "the head of a jpeg": jpeg[:20],
        "a cut-off png": png[: len(png) // 2],
        "a bomb": bomb,
        "a cut-off tiff": encoded(photograph(64, 64), "tiff")[:600],
        "a cut-off webp": encoded(photograph(64, 64), "webp")[:200],
        "32 bits": encoded(Image.new("F", (4, 4)), "tiff"),
    }


@pytest.mark.parametrize("kind", broken_files())
def test_damaged_content_is_named_in_one_line(kind):
    with pytest.raises(UnreadableImage) as caught:
        read_image(broken_files()[kind], "RGB", "photos/7.jpg")
    assert str(caught.value).startswith("cannot read photos/7.jpg: ")
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)  # the address of an object says nothing


def test_missing_images_are_named(tmp_path):
    with pytest.raises(UnreadableImage, match="image 3 of pets is missing"):
        read_image(None, "RGB", "image 3 of pets")
    with pytest.raises(UnreadableImage, match="cannot read 7: No such file"):
        read_image(tmp_path / "7.jpg", "RGB", "7")


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), OSError(errno.EIO, "I/O error")])
def test_what_the_machine_fails_at_is_no_unreadable_image(monkeypatch, error):
    def read_bytes(self):
        raise error

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(DataError, match=f"cannot read a: {error.strerror}") as caught:
        read_image("a.png", "RGB", "a")
    assert not isinstance(caught.value, UnreadableImage)


def test_without_memory_to_decode_it_an_image_is_not_damaged(monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(images, "as_shown", no_memory)
    with pytest.raises(MemoryError):
        read_image(encoded(photograph(4, 4)), "RGB", "a")


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


@pytest.mark.parametrize("format", ["png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_as_their_exif_data_says(orientation, format):
    image = photograph(30, 20)
    content = encoded(image, format, exif=exif(orientation))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(np.array(read_image(content, "RGB", "a")), np.array(expected))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_damaged_exif_data_does_not_lose_the_image(format):
    image = photograph(30, 20)
    good = encoded(image, format, quality=95, exif=exif(6))
    upright = np.array(Image.open(io.BytesIO(encoded(image, format, quality=95))).convert("RGB"))
    start = good.index(b"MM\0*")
    for damage in (b"XXXXXXXX", b"MM\0*\xff\xff\xff\xff", b"MM\0*\0\0\0\x1a"):
        content = good[:start] + damage + good[start + len(damage) :]
        assert np.array_equal(np.array(read_image(content, "RGB", "a")), upright)


def test_transparent_pixels_are_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert np.array(read_image(encoded(image), "RGB", "a")).tolist() == [[[10, 20, 30], [255, 255, 255]]]
