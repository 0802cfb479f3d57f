"""Codes in a file: what the format promises, whose codes they are, and what becomes of an image's pixels."""

import struct
import tracemalloc
import zlib
from functools import partial

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch

from looc_ldm import LooCVQModel
from looc_ldm.codes.images import decode_image, decode_pixels, encode_image, encode_pixels, pixels_of, short_fingerprint
from looc_ldm.codes.looc_file import (
    HEADER_BYTES,
    CodesError,
    ImageCodes,
    bits_per_code,
    index_dtype,
    pack,
    read_codes,
    unpack,
)
from looc_ldm.codes.table import CODES_PER_GROUP, TableRow, read_code_table, write_code_table
from looc_ldm.images.pixels import to_float, to_uint8
from looc_ldm.models.fingerprint import model_fingerprint
from looc_ldm.utils.errors import DataError
from tiny import tiny_autoencoder

FINGERPRINT = "0123456789abcdef" * 2
FIELDS = "<4sB6I16s"  # the table of docs/looc_format.md


# f = 4, C = 8, and K = 100, which is no power of two.
tiny_model = partial(tiny_autoencoder, blocks=3, num_vq_embeddings=100, interpolation_factor=2)


def some_codes(num_codevectors: int = 1000, shape: tuple[int, ...] = (3, 5, 7)) -> ImageCodes:
    indices = np.random.default_rng(0).integers(0, num_codevectors, shape)
    indices.flat[0], indices.flat[-1] = num_codevectors - 1, 0
    return ImageCodes(indices, 23, 37, num_codevectors, FINGERPRINT)


def photo(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, channels), np.uint8)


def signed(fields: tuple, payload: bytes) -> bytes:
    """A file of these fields with the checksum that fits."""
    header = struct.pack(FIELDS, *fields)
    return header + struct.pack("<I", zlib.crc32(header + payload)) + payload


# The format -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_codevectors", [2, 3, 4, 5, 100, 256, 257, 1000, 65536, 65537, 2**24 - 1, 2**24])
@pytest.mark.parametrize("count", [1, 7, 8, 70_001])
def test_codes_are_packed_one_after_the_other_at_ceil_log2_k_bits_the_highest_first(num_codevectors, count):
    codes = np.random.default_rng(count).integers(0, num_codevectors, count)
    bits = bits_per_code(num_codevectors)
    assert 2 ** (bits - 1) < num_codevectors <= 2**bits
    text = "".join(f"{code:0{bits}b}" for code in codes)
    text += "0" * (-len(text) % 8)
    packed = pack(codes, bits)
    assert packed == int(text, 2).to_bytes(len(text) // 8, "big")
    assert np.array_equal(unpack(packed, count, bits), codes)


@pytest.mark.parametrize("num_codevectors", [2, 100, 1000, 2**24])
def test_a_file_is_the_header_and_the_bits_of_the_codes_rounded_up_to_a_byte(num_codevectors, tmp_path):
    codes = some_codes(num_codevectors)
    content = codes.to_bytes()
    assert HEADER_BYTES <= 64
    assert len(content) == HEADER_BYTES + -(-3 * 5 * 7 * int(np.ceil(np.log2(num_codevectors))) // 8)
    (tmp_path / "a.looc").write_bytes(content)
    again = read_codes(tmp_path / "a.looc")
    assert np.array_equal(again.indices, codes.indices)
    assert again.indices.dtype == index_dtype(num_codevectors)
    assert (again.height, again.width) == (23, 37)
    assert (again.num_codevectors, again.fingerprint) == (num_codevectors, FINGERPRINT)


def test_the_bytes_of_the_header_are_those_of_the_documentation():
    content = some_codes(1000).to_bytes()
    fields = (b"LOOC", 1, 23, 37, 3, 5, 7, 1000, bytes.fromhex(FINGERPRINT))
    assert struct.unpack_from(FIELDS, content) == fields
    assert content == signed(fields, content[HEADER_BYTES:])


def test_every_flipped_bit_is_refused():
    content = some_codes(1000, (2, 2, 3)).to_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CodesError):
            ImageCodes.from_bytes(bytes(damaged))


def test_every_cut_and_everything_that_follows_is_refused():
    content = some_codes().to_bytes()
    for length in range(len(content)):
        with pytest.raises(CodesError, match="cut off"):
            ImageCodes.from_bytes(content[:length])
    with pytest.raises(CodesError, match="followed by something else"):
        ImageCodes.from_bytes(content + b"\0")


def test_each_refusal_has_its_reason():
    content = some_codes().to_bytes()
    payload, fields = content[HEADER_BYTES:], struct.unpack_from(FIELDS, content)
    for changed, reason in (
        (b"\x89PNG" + content[4:], "not a .looc file"),
        (signed((fields[0], 2, *fields[2:]), payload), "version 2"),
        (content[:-1] + bytes([content[-1] ^ 8]), "checksum"),
        (signed((*fields[:7], 999, fields[8]), payload), r"in \[0, 999\), got 999"),
        (signed((*fields[:7], 2**31, fields[8]), pack(np.zeros(105, int), 31)), "codevectors"),
        (signed((*fields[:4], 0, 5, 7, 1000, fields[8]), b""), "invalid header: 0x5x7"),
        (signed((*fields[:2], 0, *fields[3:]), payload), "height"),
    ):
        with pytest.raises(CodesError, match=reason) as refused:
            ImageCodes.from_bytes(changed)
        assert "\n" not in str(refused.value)


def test_a_header_that_promises_more_than_there_is_costs_no_memory():
    fields = (b"LOOC", 1, 2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1, 2**24, bytes(16))
    tracemalloc.start()
    with pytest.raises(CodesError, match="cut off"):
        ImageCodes.from_bytes(signed(fields, b""))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"indices": np.zeros((2, 2), int)}, r"int64 of \(2, 2\)"),
        ({"indices": np.zeros((2, 2, 1))}, "float64"),
        ({"indices": np.zeros((0, 2, 1), int)}, r"\(0, 2, 1\)"),
        ({"indices": np.full((1, 1, 1), 4)}, r"in \[0, 4\), got 4"),
        ({"indices": np.full((1, 1, 1), -1)}, "got -1"),
        ({"num_codevectors": 1}, "got 1"),
        ({"num_codevectors": 2**24 + 1}, "16777217"),
        ({"height": 0}, "height must be"),
        ({"width": 2**32}, "width must be"),
        ({"fingerprint": "abcd"}, "32 digits, got 'abcd'"),
    ],
)
def test_codes_that_no_file_can_hold_are_refused(changed, message):
    codes = {"indices": np.zeros((1, 1, 1), int), "height": 1, "width": 1, "num_codevectors": 4}
    codes["fingerprint"] = FINGERPRINT
    with pytest.raises(ValueError, match=message):
        ImageCodes(**{**codes, **changed})


def test_a_table_is_written_a_group_at_a_time_and_read_back(tmp_path):
    shape = (CODES_PER_GROUP // 64, 8, 4)  # half a group

    def rows():
        for i in range(3):
            yield TableRow(ImageCodes(np.full(shape, i, np.uint8), 23, 37, 100, FINGERPRINT), f"{i}.png")

    write_code_table(tmp_path / "train.parquet", rows(), 100, [])
    read = list(read_code_table(tmp_path / "train.parquet"))
    assert [row.file for row in read] == ["0.png", "1.png", "2.png"]
    assert all(row.codes.indices.shape == shape and (row.codes.indices == i).all() for i, row in enumerate(read))
    assert pq.ParquetFile(tmp_path / "train.parquet").num_row_groups == 2


@pytest.mark.parametrize(("classes", "file"), [(["caf\udce9"], None), ([], "caf\udce9")])
def test_a_name_that_is_not_utf8_is_refused_before_anything_more_is_computed(tmp_path, classes, file):
    def rows():
        assert file is not None, "a row is computed"
        yield TableRow(some_codes(100), file)
        pytest.fail("another row is computed")

    with pytest.raises(DataError, match=r"the name 'caf\\udce9' is not UTF-8"):
        write_code_table(tmp_path / "train.parquet", rows(), 100, classes)
    assert not list(tmp_path.iterdir())


# Whose codes ----------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_weights_and_config_and_of_nothing_else(tmp_path):
    model = tiny_model()
    fingerprint = model_fingerprint(model)
    assert len(bytes.fromhex(fingerprint)) == 32
    model.save_pretrained(tmp_path)
    assert model_fingerprint(LooCVQModel.from_pretrained(tmp_path)) == fingerprint
    model.register_to_config(scaling_factor=2.0, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    model.train()
    assert model_fingerprint(model.double()) == fingerprint
    assert model_fingerprint(model.float().to(memory_format=torch.channels_last)) == fingerprint


def test_a_model_with_default_settings_keeps_its_fingerprint_when_it_is_stored(tmp_path):
    model = LooCVQModel(block_out_channels=(8,), norm_num_groups=4, vq_embed_dim=4)
    model.save_pretrained(tmp_path)
    assert model_fingerprint(LooCVQModel.from_pretrained(tmp_path)) == model_fingerprint(model)


def test_another_weight_statistic_or_setting_is_another_fingerprint():
    fingerprint = model_fingerprint(tiny_model())
    for name in ("encoder.conv_in.weight", "quantize.embedding.weight", "quantize.usage", "decoder.conv_out.bias"):
        model = tiny_model()
        tensor = model.state_dict()[name].view(-1)
        tensor[-1] = torch.nextafter(tensor[-1], torch.tensor(9.0))
        assert model_fingerprint(model) != fingerprint, name
    assert model_fingerprint(tiny_model(commitment_weight=0.5)) != fingerprint
    assert model_fingerprint(tiny_model(distance="cosine")) != fingerprint
    assert model_fingerprint(tiny_model().to(torch.bfloat16)) != fingerprint  # rounded


def test_codes_of_another_model_are_refused():
    content = encode_image(tiny_model(), PIL.Image.fromarray(photo(8, 8)))
    with pytest.raises(CodesError, match="the content is from a different model"):
        decode_image(tiny_model(seed=1), content)


def test_codes_of_an_impossible_shape_are_refused_whatever_their_fingerprint():
    model = tiny_model()
    fingerprint = short_fingerprint(model)
    for shape, k in (((3, 2, 8), 100), ((2, 2, 4), 100), ((2, 2, 8), 99)):
        content = ImageCodes(np.zeros(shape, int), 8, 8, k, fingerprint).to_bytes()
        with pytest.raises(CodesError, match=r"this model has \(2, 2, 8\) of 100 for 8x8 pixels"):
            decode_image(model, content)


# Images ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_comes_back_as_the_model_reconstructs_it(channels):
    model, pixels = tiny_model(channels), photo(16, 24, channels)
    image = PIL.Image.fromarray(pixels.squeeze())
    content = encode_image(model, image)
    assert len(content) == HEADER_BYTES + 4 * 6 * 8 * 7 // 8  # 7 bits for 100 codevectors
    x = to_float(torch.from_numpy(pixels)).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = to_uint8(model(x).sample)[0].permute(1, 2, 0).squeeze()
    decoded = decode_image(model, content)
    assert decoded.mode == {1: "L", 3: "RGB"}[channels]
    assert np.abs(np.asarray(decoded).astype(int) - expected.numpy()).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3), (13, 18), (16, 17)])
def test_an_image_of_any_size_comes_back_at_its_own_seen_with_its_edges_repeated(size):
    model, pixels = tiny_model(), photo(*size)
    image = PIL.Image.fromarray(pixels)
    decoded = decode_image(model, encode_image(model, image))
    assert decoded.size == image.size
    height, width = (-(-side // 4) * 4 for side in size)
    rows, columns = np.minimum(np.arange(height), size[0] - 1), np.minimum(np.arange(width), size[1] - 1)
    assert np.array_equal(encode_pixels(model, pixels[None]), encode_pixels(model, pixels[rows][:, columns][None]))
    codes = ImageCodes.from_bytes(encode_image(model, image))
    assert codes.indices.shape == (height // 4, width // 4, 8)


def test_an_image_gives_the_same_codes_alone_and_in_a_batch():
    model = tiny_model()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 21, 30, 3), np.uint8)
    together = encode_pixels(model, pixels)
    alone = np.concatenate([encode_pixels(model, each[None]) for each in pixels])
    assert np.array_equal(alone, together)
    assert np.array_equal(alone, np.concatenate([encode_pixels(model, each[None]) for each in pixels]))
    images = decode_pixels(model, together, 21, 30).astype(int)
    each = np.concatenate([decode_pixels(model, codes[None], 21, 30) for codes in together])
    assert np.abs(images - each).max() <= 1


def test_a_model_in_half_precision_writes_codes_for_the_model_it_was_cast_from():
    model = tiny_model()
    fingerprint = short_fingerprint(model)
    image = PIL.Image.fromarray(photo(9, 9))
    content = encode_image(tiny_model().to(torch.bfloat16), image, fingerprint)
    assert decode_image(model, content, fingerprint).size == (9, 9)


def image_in_mode(mode: str) -> PIL.Image.Image:
    """Two pixels, one black and one white, on a 2x1 image."""
    grey = PIL.Image.fromarray(np.array([[0, 255]], np.uint8))
    if mode == "I;16":
        return PIL.Image.fromarray(np.array([[0, 65535]], np.uint16))
    if mode == "P":
        return grey.convert("RGB").quantize(2)
    return grey.convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_images_of_every_mode_are_taken(mode, tmp_path):
    image = image_in_mode(mode)
    assert pixels_of(image, 3).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    assert pixels_of(image, 1).tolist() == [[[0], [255]]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_whose_range_is_not_known_are_refused(mode):
    with pytest.raises(DataError, match=f"32 bits \\(mode {mode}\\)"):
        pixels_of(PIL.Image.new(mode, (2, 2)), 1)
