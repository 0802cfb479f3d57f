"""`looc-ldm encode` and `looc-ldm decode` as somebody types them, and the examples of docs/looc_format.md."""

import math
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from looc_ldm import LooCVQModel
from looc_ldm.codes.images import encode_image
from looc_ldm.codes.looc_file import HEADER_BYTES, read_codes
from looc_ldm.commands import codes, many_files
from looc_ldm.images.open import BUNDLED
from looc_ldm.images.pixels import to_float
from looc_ldm.utils.errors import UserError
from looc_ldm.utils.files import renamed_when_complete
from tiny import blocks, refusal, run, stopped, tiny_autoencoder, tiny_pipeline

DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs" / "looc_format.md"
K, F, C = 100, 2, 2  # codevectors, downsampling, codes at a position


def tiny_model(channels: int, seed: int = 0) -> LooCVQModel:
    return tiny_autoencoder(channels, seed=seed, num_vq_embeddings=K)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders `grey`, `colour`, `other` (grey, other weights), and `pipeline`, which holds the grey one."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model(1).save_pretrained(folder / "grey")
    tiny_model(3).save_pretrained(folder / "colour")
    tiny_model(1, seed=1).save_pretrained(folder / "other")
    vqvae = LooCVQModel.from_pretrained(folder / "grey")
    vqvae.register_to_config(scaling_factor=3.0)  # belongs to stage 2: not another model
    tiny_pipeline("unconditional", vqvae=vqvae).save_pretrained(folder / "pipeline")
    return folder


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with images of two classes and several sizes and formats in `photos`."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name, shape in {
        "cats/a.png": (14, 17),
        "cats/b.jpg": (14, 17, 3),
        "cats/more/c.webp": (14, 17, 3),
        "dogs/d.tiff": (9, 5),
        "dogs/e.png": (16, 16, 4),
    }.items():
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(f"photos/{name}")
    return Path("photos")


def files(folder: str) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file())


def fashion_mnist(split: str) -> datasets.Dataset:
    file = BUNDLED / "fashion_mnist" / f"{split}.parquet"
    return datasets.load_dataset("parquet", data_files=str(file), split="train")


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_folder_becomes_a_folder_of_codes_and_comes_back_with_names_sizes_and_modes(models, capsys):
    run(capsys, "encode", models / "colour", "photos", "--output", "new/codes")
    names = ["cats/a", "cats/b", "cats/more/c", "dogs/d", "dogs/e"]
    assert files("new/codes") == [f"{name}.looc" for name in names]
    run(capsys, "decode", models / "colour", "new/codes", "--output", "new/images")
    assert files("new/images") == [f"{name}.png" for name in names]
    for original in Path("photos").rglob("*.*"):
        decoded = PIL.Image.open("new/images" / original.relative_to("photos").with_suffix(".png"))
        assert decoded.size == PIL.Image.open(original).size
        assert decoded.mode == "RGB"


def test_links_are_followed_as_in_training_and_those_that_lead_nowhere_are_named(models, capsys):
    Path("linked").mkdir()
    Path("linked/cats").symlink_to(Path("photos/cats").resolve())
    Path("linked/gone.png").symlink_to("nowhere.png")
    lines = stopped(capsys, "encode", models / "colour", "linked", "--output", "codes")
    assert lines[0].startswith("cannot read linked/gone.png: No such file or directory")
    assert files("codes") == ["cats/a.looc", "cats/b.looc", "cats/more/c.looc"]


def test_the_commands_do_what_the_python_functions_do(models, capsys):
    model = LooCVQModel.from_pretrained(models / "grey")
    run(capsys, "encode", models / "grey", "photos/dogs/d.tiff", "photos/cats", "--output", "codes")
    assert files("codes") == ["a.looc", "b.looc", "d.looc", "more/c.looc"]
    content = Path("codes/d.looc").read_bytes()
    assert content == encode_image(model, PIL.Image.open("photos/dogs/d.tiff"))
    run(capsys, "decode", models / "grey", "codes/d.looc", "--output", "images")
    decoded = torch.from_numpy(np.array(PIL.Image.open("images/d.png")))
    with torch.no_grad():
        sample = model.decode_indices(torch.from_numpy(read_codes(Path("codes/d.looc")).indices.astype(int))[None])
    expected = sample.sample[0, 0, :9, :5]
    assert (to_float(decoded) - expected.clamp(-1, 1)).abs().max() <= 1 / 127.5


def test_both_rates_are_printed_for_the_pixels_of_the_originals_and_the_share_of_headers(models, capsys):
    printed = run(capsys, "encode", models / "grey", "photos", "--output", "codes")
    codes = (3 * 7 * 9 + 5 * 3 + 8 * 8) * C
    pixels = 3 * 14 * 17 + 9 * 5 + 16 * 16
    size = sum(file.stat().st_size for file in Path("codes").rglob("*.looc"))
    assert size == 5 * HEADER_BYTES + sum(math.ceil(n * C * 7 / 8) for n in (63, 63, 63, 15, 64))
    assert f"5 images, {size:,} bytes, {5 * HEADER_BYTES / size:.1%} of them headers" in printed
    assert f"{codes * 7 / pixels:.4f} bits per pixel packed, at ceil(log2 K) = 7 bits" in printed
    assert f"{codes * math.log2(100) / pixels:.4f} at log2 K = 6.644 bits" in printed


def test_a_pipeline_decodes_what_its_autoencoder_encoded_in_any_dtype(models, capsys):
    run(capsys, "encode", models / "grey", "photos", "--output", "a", "--device", "cpu")
    run(capsys, "encode", models / "pipeline", "photos", "--output", "b", "--dtype", "bfloat16", "--batch-size", 2)
    for folder in "a", "b":
        run(capsys, "decode", models / "pipeline", folder, "--output", f"{folder}-float32")
        run(capsys, "decode", models / "grey", folder, "--output", f"{folder}-bfloat16", "--dtype", "bfloat16")
    assert len(files("a-float32")) == len(files("b-bfloat16")) == 5


def test_hidden_files_and_what_is_no_image_are_left_out(models, capsys):
    Path("photos/notes.txt").write_text("no image")
    Path("photos/.thumbnails").mkdir()
    Path("photos/.thumbnails/a.png").write_text("no image")
    Path("photos/._a.png").write_text("no image")
    run(capsys, "encode", models / "grey", "photos", "--output", "photos")
    assert len([name for name in files("photos") if name.endswith(".looc")]) == 5


def test_files_are_replaced_only_when_that_is_asked_for(models, capsys):
    Path("codes/cats").mkdir(parents=True)
    Path("codes/cats/a.looc").write_text("somebody's")
    message = refusal(capsys, "encode", models / "grey", "photos", "--output", "codes")
    assert message.startswith("error: 1 of 5 outputs already exist, such as 'codes/cats/a.looc': --overwrite")
    run(capsys, "encode", models / "grey", "photos", "--output", "codes", "--overwrite")
    assert read_codes(Path("codes/cats/a.looc")).height == 14
    # Beside the originals, a decoded image would replace one.
    shutil.copytree("photos", "both")
    shutil.copytree("codes", "both", dirs_exist_ok=True)
    assert "2 of 5 outputs" in refusal(capsys, "decode", models / "grey", "both", "--output", "both")


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_encoded(models, capsys):
    cut_off = Path("photos/cats/a.png")
    cut_off.write_bytes(cut_off.read_bytes()[:60])
    PIL.Image.new("F", (2, 2)).save("photos/dogs/d.tiff")
    lines = stopped(capsys, "encode", models / "grey", "photos", "--output", "codes")
    assert lines[0].startswith("cannot read photos/cats/a.png: ")
    assert lines[1].startswith("cannot read photos/dogs/d.tiff: its pixels have 32 bits")
    assert lines[2:] == ["error: 2 of 5 images could not be encoded and are left out."]
    assert files("codes") == ["cats/b.looc", "cats/more/c.looc", "dogs/e.looc"]


def test_damaged_codes_are_named_and_the_others_are_decoded(models, capsys):
    run(capsys, "encode", models / "grey", "photos", "--output", "codes")
    content = bytearray(Path("codes/cats/a.looc").read_bytes())
    content[-1] ^= 1
    Path("codes/cats/a.looc").write_bytes(content)
    Path("codes/cats/b.looc").write_bytes(content[:-1])
    lines = stopped(capsys, "decode", models / "grey", "codes", "--output", "images")
    size = len(content)
    assert lines == [
        "cannot read 'codes/cats/a.looc': damaged: its checksum does not match.",
        f"cannot read 'codes/cats/b.looc': cut off: it has {size - 1} bytes, but its header says {size}.",
        "error: 2 of 5 images could not be decoded and are left out.",
    ]
    assert files("images") == ["cats/more/c.png", "dogs/d.png", "dogs/e.png"]


# Tables ---------------------------------------------------------------------------------------------------------------


def encode_table(capsys, model, *arguments) -> str:
    return run(capsys, "encode", model, *arguments, "--format", "parquet")


def test_a_table_loads_with_datasets_and_holds_what_the_model_encodes(models, capsys, tmp_path):
    printed = encode_table(capsys, models / "grey", "fashion_mnist", "--split", "validation", "--output", "table")
    table = datasets.load_dataset("table", split="validation", cache_dir=str(tmp_path / "cache"))
    size = Path("table/validation.parquet").stat().st_size
    assert f"1000 images, 10 classes, {size:,} bytes, {8 * size / 1000 / 16**2:.4f} bits per pixel" in printed
    original = fashion_mnist("validation")
    assert table.features["label"] == original.features["label"]
    assert table.features["codes"] == datasets.List(datasets.Value("uint8"))
    assert table["label"][:] == original["label"][:]
    model = LooCVQModel.from_pretrained(models / "grey").eval()
    for i in (0, 500, 999):
        image = original[i]["image"].resize((16, 16), PIL.Image.Resampling.LANCZOS)
        x = to_float(torch.from_numpy(np.array(image)))[None, None]
        row = table[i]
        assert np.array_equal(np.reshape(row["codes"], row["latent_shape"]), model.encode_indices(x)[0].numpy())
        assert (row["height"], row["width"], row["num_codevectors"]) == (16, 16, K)
        assert row["file"] == f"validation/{i:08d}.png"


def test_a_table_of_a_folder_has_its_classes_and_names_and_decodes_to_images(models, capsys, tmp_path):
    shutil.move("photos/cats/more/c.webp", "photos/cats/c.webp")
    printed = encode_table(capsys, models / "colour", "photos", "--output", "table", "--resolution", 12)
    assert "5 images, 2 classes, " in printed
    table = datasets.load_dataset("table", split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(table["file"]) == ["cats/a.png", "cats/b.jpg", "cats/c.webp", "dogs/d.tiff", "dogs/e.png"]
    for row in table:
        assert table.features["label"].int2str(row["label"]) == row["file"].split("/")[0]
    assert {tuple(row["latent_shape"]) for row in table} == {(6, 6, C)}
    run(capsys, "decode", models / "colour", "table", "--output", "images")
    assert files("images") == ["cats/a.png", "cats/b.png", "cats/c.png", "dogs/d.png", "dogs/e.png"]
    assert {PIL.Image.open(f"images/{name}").size for name in files("images")} == {(12, 12)}


def test_without_fitting_a_table_holds_what_the_files_hold_in_order(models, capsys):
    shutil.copy("photos/cats/a.png", "photos/dogs/f.png")  # as large as those before the dogs
    encode_table(capsys, models / "grey", "photos", "--fit", "none", "--output", "table")
    names = pq.read_table("table/train.parquet")["file"].to_pylist()
    assert names == sorted(names)
    assert len(names) == 6
    run(capsys, "encode", models / "grey", "photos", "--output", "codes")
    run(capsys, "decode", models / "grey", "codes", "--output", "from files")
    run(capsys, "decode", models / "grey", "table/train.parquet", "--output", "from table")
    assert files("from table") == files("from files")
    for name in files("from files"):
        assert PIL.Image.open(f"from table/{name}").tobytes() == PIL.Image.open(f"from files/{name}").tobytes()


def test_padding_of_a_table_is_not_counted_as_pixels(models, capsys):
    shutil.rmtree("photos/dogs")
    printed = encode_table(capsys, models / "grey", "photos", "--fit", "pad", "--resolution", 20, "--output", "table")
    assert f"{100 * C * 7 / (14 * 17):.4f} bits per pixel packed" in printed


def test_an_image_that_cannot_be_read_leaves_no_table(models, capsys):
    Path("photos/cats/b.jpg").write_text("no image")
    lines = stopped(capsys, "encode", models / "grey", "photos", "--format", "parquet", "--output", "table")
    assert lines[-1].startswith("error: cannot read ")
    assert "photos/cats/b.jpg" in lines[-1]
    assert files("table") == []


def test_a_damaged_table_is_refused(models, capsys):
    encode_table(capsys, models / "grey", "photos", "--output", "table")
    content = bytearray(Path("table/train.parquet").read_bytes())
    content[200] ^= 1
    Path("table/train.parquet").write_bytes(content)
    lines = stopped(capsys, "decode", models / "grey", "table", "--output", "o")
    assert "cannot read 'table/train.parquet'" in lines[0]
    assert lines[1:] == ["error: 5 of 5 images could not be decoded and are left out."]
    assert not Path("o").exists()
    Path("table/train.parquet").write_bytes(content[:-10])
    assert "cannot read 'table/train.parquet'" in refusal(capsys, "decode", models / "grey", "table", "--output", "o")


def with_column(name: str, values: pa.Array) -> None:
    """Put other values into a column of `table/train.parquet`."""
    table = pq.read_table("table/train.parquet")
    table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table.replace_schema_metadata(None), "table/train.parquet")


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "c/../../a.png", "C:\\a.png", ""])
def test_a_table_cannot_write_outside_of_the_output(name, models, capsys):
    encode_table(capsys, models / "grey", "photos", "--output", "table")
    with_column("file", pa.array([name, "a", "b", "c", "d"]))
    message = refusal(capsys, "decode", models / "grey", "table", "--output", "images")
    assert f"{name!r} is not a relative name of a file" in message


def test_codes_of_another_model_are_named_and_all_others_decoded(models, capsys):
    run(capsys, "encode", models / "grey", "photos", "--output", "codes")
    run(capsys, "encode", models / "other", "photos/dogs/d.tiff", "--output", "codes/cats")
    encode_table(capsys, models / "other", "photos", "--output", "codes/table")
    lines = stopped(capsys, "decode", models / "grey", "codes", "--output", "images", "--batch-size", 8)
    assert lines[0].startswith("'codes/cats/d.looc' is from a different model, ")
    assert lines[1].startswith("'codes/table/train.parquet, row cats/a.png' is from a different model, ")
    assert lines[2:] == ["error: 6 of 11 images could not be decoded and are left out."]
    assert files("images") == ["cats/a.png", "cats/b.png", "cats/more/c.png", "dogs/d.png", "dogs/e.png"]


def test_rows_whose_names_differ_in_their_suffix_only_are_decoded(models, capsys):
    encode_table(capsys, models / "grey", "photos", "--output", "table")
    with_column("file", pa.array(["x/4.png", "x/4.webp", "y.jpg", "y.png/z.png", "dogs/e.png"]))
    run(capsys, "decode", models / "grey", "table", "--output", "images")
    names = ["dogs/e.png.png", "x/4.png.png", "x/4.webp.png", "y.jpg.png", "y.png/z.png.png"]
    assert files("images") == names


def test_a_name_that_stands_twice_in_a_table_is_refused(models, capsys):
    encode_table(capsys, models / "grey", "photos", "--output", "table")
    with_column("file", pa.array(["x", "x", "a", "b", "c"]))
    message = refusal(capsys, "decode", models / "grey", "table", "--output", "images")
    assert "row x' and 'table/train.parquet, row x' would both become" in message


@pytest.mark.parametrize(
    ("column", "values"),
    [("codes", ["a"]), ("codes", [["a"]]), ("height", [8.5]), ("height", [None]), ("file", [None])],
)
def test_a_table_with_columns_of_other_types_or_with_gaps_is_refused(column, values, models, capsys):
    encode_table(capsys, models / "grey", "photos", "--output", "table")
    with_column(column, pa.array(values * 5))
    lines = stopped(capsys, "decode", models / "grey", "table", "--output", "images")
    assert "cannot read 'table/train.parquet'" in lines[0]
    assert files("images") == []


# Large files --------------------------------------------------------------------------------------------------------


def test_an_image_above_the_budget_of_pixels_has_the_same_codes(models, capsys, monkeypatch):
    PIL.Image.effect_noise((150, 140), 50).save("photos/dogs/large.png")
    run(capsys, "encode", models / "grey", "photos", "--output", "whole")
    monkeypatch.setitem(many_files.PIXELS_PER_BATCH, "cpu", 150 * 140 - 1)  # it goes through in tiles
    run(capsys, "encode", models / "grey", "photos", "--output", "tiled", "--device", "cpu")
    for name in files("whole"):
        whole, tiled = (read_codes(Path(folder, name)).indices for folder in ("whole", "tiled"))
        assert (whole != tiled).mean() < 1e-3


def test_an_image_too_large_for_memory_is_named_and_the_others_are_encoded(models, capsys, monkeypatch):
    def encode_pixels(model, pixels):
        if pixels.shape[1] > 200:
            raise MemoryError
        return encode(model, pixels)

    encode = codes.encode_pixels
    monkeypatch.setattr(codes, "encode_pixels", encode_pixels)
    PIL.Image.new("L", (240, 201)).save("photos/cats/huge.png")
    lines = stopped(capsys, "encode", models / "grey", "photos", "--output", "codes")
    assert lines == [
        "not enough memory for 'photos/cats/huge.png', of 240x201 pixels.",
        "error: 1 of 6 images could not be encoded and are left out.",
    ]
    assert len(files("codes")) == 5


# Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "grey", "photos"], "required: output"),
        (["encode", "grey", "fotos", "--output", "o"], "no file or folder 'fotos' (encode takes data sets by name"),
        (["encode", "grey", "empty", "--output", "o"], "nothing to read in the folder empty (looked for .jpg"),
        (["encode", "grey", "photos", "--output", "file/o"], "'file' is not a folder"),
        (["encode", "grey", "photos", "photos/cats/a.png", "photos/cats", "--output", "o"], "would both become 'o/a"),
        (["encode", "grey", "same", "--output", "o"], "'same/a.jpg' and 'same/a.png' would both become 'o/a.looc'"),
        (["encode", "grey", "photos", "--output", "o", "--resolution", "8"], "--fit need --format parquet"),
        (["encode", "grey", "photos", "--output", "o", "--batch-size", "0"], "--batch-size: must be >0, got 0"),
        (["encode", "grey", "photos", "same", "--output", "o", "--format", "parquet"], "one data set, got 2"),
        (["encode", "grey", "fotos", "--output", "o", "--format", "parquet"], "'fotos'"),
        (["encode", "grey", "photos", "--output", "o", "--format", "parquet", "--split", "tain"], "'tain'"),
        (["encode", "grey", "photos", "--output", "o", "--format", "parquet", "--resolution", "7"], "divisible by 2"),
        (["encode", "grey", "photos", "--output", "full", "--format", "parquet"], "'full/train.parquet'"),
        (["decode", "grey", "photos", "--output", "o"], "nothing to read in the folder photos (looked for .looc"),
        (["decode", "grey", "codes.looc", "--output", "o"], "no file or folder 'codes.looc'"),
        (["decode", "grey", "full", "--output", "o"], "'full/train.parquet'"),
        (["decode", "grey", "foreign.parquet", "--output", "o"], "not a table of codes: it has no column 'codes'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_in_one_line_and_status_2_with_nothing_written(arguments, message, models, capsys):
    Path("file").write_text("not a folder")
    for folder in "empty", "full", "same":
        Path(folder).mkdir()
    Path("full/train.parquet").write_text("somebody's")
    for name in "a.png", "a.jpg":
        PIL.Image.new("L", (8, 8)).save(f"same/{name}")
    pq.write_table(pa.table({"text": ["a"]}), "foreign.parquet")
    arguments[1] = str(models / arguments[1])
    assert message in refusal(capsys, *arguments)


def test_a_dangling_link_is_not_replaced(models, capsys):
    Path("codes").mkdir()
    Path("codes/a.looc").symlink_to("nowhere")
    message = refusal(capsys, "encode", models / "grey", "photos/cats/a.png", "--output", "codes")
    assert "outputs already exist" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_the_first_error_is_seen():
    def fill():
        with renamed_when_complete(Path("a")) as partial:
            partial.symlink_to("/dev/full")
            partial.write_text("full")

    def fail():
        with renamed_when_complete(Path("b")) as partial:
            partial.mkdir()  # which unlink cannot remove
            raise KeyError("first")

    with pytest.raises(UserError, match=r"^cannot write 'a': No space left on device\.$"):
        fill()
    assert not os.path.lexists("a")
    assert not os.path.lexists(".a.partial")
    with pytest.raises(KeyError, match="first"):
        fail()


# The documentation ----------------------------------------------------------------------------------------------------


def test_the_python_of_the_documentation_runs(models, capsys):
    shutil.copytree(models / "grey", "quickstart/autoencoder/model")
    shutil.move("photos/cats/b.jpg", "photos/cat.jpg")
    first = fashion_mnist("train").select(range(32))
    Path("fashion").mkdir()
    first.to_parquet("fashion/train.parquet")
    capsys.readouterr()
    model = "quickstart/autoencoder/model"
    run(capsys, "encode", model, "photos/cat.jpg", "--output", "codes")
    encode_table(capsys, model, "fashion", "--fit", "pad", "--resolution", 32, "--output", "table")
    variables: dict = {}
    for block in blocks(DOCUMENTATION, "python"):
        exec(compile(block, str(DOCUMENTATION), "exec"), variables)
    assert variables["content"] == Path("codes/cat.looc").read_bytes()
    assert variables["sequences"].shape == (16, 16 * 16 * C)
    assert variables["classes"].tolist() == first["label"][:16]
    assert variables["image"].shape == (1, 1, 32, 32)
    x = to_float(torch.from_numpy(np.pad(np.array(first[0]["image"]), 2)))[None, None]
    assert np.array_equal(variables["model"].eval().encode_indices(x)[0].numpy(), variables["codes"])
