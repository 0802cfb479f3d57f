"""The model card says what is in the files of a model and its run, and nothing else."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from PIL import Image

import looc_ldm
from looc_ldm import LooCSmallVQModel, LooCVQModel
from looc_ldm.hub.card import MARK, write_card
from looc_ldm.models.fingerprint import model_fingerprint
from looc_ldm.models.loading import stored_fingerprints
from looc_ldm.models.registration import AUTOENCODERS
from looc_ldm.utils.errors import ModelError, UserError

RECONSTRUCTION = {"protocol": "clean", "images": 500, "height": 16, "width": 16, "data": "ada/animals", "split": "test"}
RECONSTRUCTION |= {
    "psnr": 23.4567891,
    "ssim": 0.8125,
    "rfid@192": 7.125,
    "bits_per_image": 512.0,
    "bits_per_pixel": 2.0,
}
RECONSTRUCTION |= {"num_codevectors": 16, "codevector_dim": 2, "dtype": "float32", "version": "0.1.0"}
RECONSTRUCTION |= {"command": "looc-ldm evaluate reconstruction runs/pets --data ada/animals --output figures.json"}
GENERATION = {
    "protocol": "clean",
    "images_first": 10_000,
    "images_second": 500,
    "data": "/data/animals",
    "split": "test",
}
GENERATION |= {"fid@2048": 12.5, "kid@2048": 0.0625, "kid_std@2048": 0.001, "bits_per_pixel": 2.0}
GENERATION |= {"num_inference_steps": 50, "guidance_scale": 1.5, "seed": 4, "dtype": "bfloat16", "version": "0.1.0"}
GENERATION |= {"command": "looc-ldm evaluate generation runs/pets --data /data/animals --output figures.json"}


@pytest.fixture
def figures(tmp_path, make_pipeline):
    """Writes figures of the models of conftest.py as `looc-ldm evaluate` does, with changes; returns the file."""
    pipe = make_pipeline()
    vqvae, unet = model_fingerprint(pipe.vqvae), model_fingerprint(pipe.unet)

    def write(record, **changes):
        file = tmp_path / f"figures{len(list(tmp_path.glob('figures*')))}.json"
        fingerprints = {"vqvae": vqvae} if "images" in record else {"vqvae": vqvae, "unet": unet}
        record = {"fingerprints": fingerprints, **record, **changes}
        file.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))
        return file

    return write


def results(card) -> list[dict]:
    return metadata_load(card)["model-index"][0]["results"]


def test_every_figure_stands_in_metadata_and_table_with_data_split_protocol_count_and_rate(pipeline_folder, figures):
    card = write_card(pipeline_folder, "ada/pets", [figures(RECONSTRUCTION), figures(GENERATION)], license="mit")
    data = ModelCard.load(card).data  # raises on a model-index that the hub does not read
    assert (data.model_name, data.library_name, data.license) == ("pets", "diffusers", "mit")
    assert data.tags == ["looc-ldm", "vector-quantization", "latent-diffusion"]
    validation, reconstruction, generation = results(card)
    assert validation["dataset"] == {"name": "pets", "type": "pets", "split": "test"}
    assert reconstruction["task"] == {"type": "image-reconstruction"}
    assert reconstruction["dataset"] == {"name": "ada/animals", "type": "ada/animals", "split": "test"}
    assert generation["dataset"] == {"name": "animals", "type": "animals", "split": "test"}
    assert {metric["type"]: metric["value"] for metric in reconstruction["metrics"]} == {
        key: RECONSTRUCTION[key] for key in ("psnr", "ssim", "rfid@192", "bits_per_image", "bits_per_pixel")
    }
    fid = generation["metrics"][0]
    assert (fid["type"], fid["value"], fid["name"]) == ("fid@2048", 12.5, "FID (2048 features), protocol clean")
    assert fid["args"] == {
        "images_first": 10_000,
        "images_second": 500,
        "seed": 4,
        "num_inference_steps": 50,
        "guidance_scale": 1.5,
        "protocol": "clean",
        "dtype": "bfloat16",
        "bits_per_pixel": 2.0,
    }
    text = card.read_text()
    assert (
        "Generation: 10,000 samples against 500 images of `animals`, split `test`; protocol `clean`; "
        "50 denoising steps; guidance scale 1.5; seed 4; dtype bfloat16."
    ) in text
    assert "| FID (2048 features) | 12.5 |" in text
    assert "Reconstruction by the first stage: 500 images of 16x16 pixels of `ada/animals`, split `test`;" in text
    assert "| rFID (192 features) | 7.125 |" in text
    assert text.count("| bits per pixel | 2 |") == 3


def test_every_number_in_the_text_comes_from_a_file(pipeline_folder, figures):
    record = figures(GENERATION)
    stated = record.with_name("stated.json")  # without the digits of fingerprints
    stated.write_text(json.dumps(GENERATION))
    text = write_card(pipeline_folder, "ada/pets", [record]).read_text().split("---\n")[2]
    sources = [stated, *pipeline_folder.rglob("*.json")]
    known = {float(number) for source in sources for number in re.findall(r"\d+(?:\.\d+)?", source.read_text())}
    known.add(16 * 2)  # numbers in the codebook, K times d
    written = {float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", text.replace(",", ""))}
    assert written - known == set()


def test_what_is_not_known_is_left_out(tmp_path, make_pipeline):
    make_pipeline().save_pretrained(tmp_path / "bare")
    card = write_card(tmp_path / "bare")
    text = card.read_text()
    assert "model-index" not in metadata_load(card)
    assert "license" not in metadata_load(card)
    assert "Licence of the weights: not stated." in text
    for absent in ("## Measured", "## Training", "samples.png", "None", "unknown"):
        assert absent not in text
    assert text.splitlines()[text.splitlines().index(MARK) + 2] == "# bare"


def test_figures_of_an_unknown_data_set_are_in_the_table_only(autoencoder_folder, figures):
    card = write_card(autoencoder_folder, metrics=[figures(RECONSTRUCTION, data=None, split=None)])
    assert len(results(card)) == 1
    assert "Reconstruction: 500 images of 16x16 pixels; protocol `clean`; dtype float32." in card.read_text()


def test_the_newest_preview_is_shown_if_it_is_of_these_weights(pipeline_folder, autoencoder_folder):
    assert "![samples](samples.png)\n\nSamples, 25 denoising steps.\n\n##" in write_card(pipeline_folder).read_text()
    assert Image.open(pipeline_folder / "samples.png").getpixel((0, 0)) == (0, 128, 0)
    assert "Reconstructions." in write_card(autoencoder_folder).read_text()
    (pipeline_folder.parent / "previews" / "000000640.png").unlink()  # the one that is left is of half the training
    (pipeline_folder / "samples.png").unlink()
    assert "samples.png" not in write_card(pipeline_folder).read_text()
    assert not (pipeline_folder / "samples.png").exists()


def test_a_picture_of_ones_own_is_shown(pipeline_folder, tmp_path):
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "mine.JPG")
    text = write_card(pipeline_folder, samples=tmp_path / "mine.JPG").read_text()
    assert "![samples](samples.jpg)\n\n## Use" in text
    assert (pipeline_folder / "samples.jpg").read_bytes() == (tmp_path / "mine.JPG").read_bytes()


def test_the_training_is_described_as_training_json_has_it(pipeline_folder):
    text = write_card(pipeline_folder).read_text()
    lines = ["| data set | pets |", "| split | train |", "| batch size | 32 |", "| seed | 3 |"]
    assert (
        "## Training\n\n|  |  |\n| --- | --- |\n" + "\n".join(lines) + "\n\nAll settings are in `training.json`."
        in text
    )


def test_a_record_of_an_older_version_gives_a_card_without_the_training(pipeline_folder):
    file = pipeline_folder / "training.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({name: record[name] for name in ("data", "images_seen")}))
    text = write_card(pipeline_folder).read_text()
    for absent in ("## Measured", "## Training", "samples.png", "None"):
        assert absent not in text


def example(card: Path) -> str:
    return re.search(r"```py\n(.*?)```", card.read_text(), re.DOTALL)[1]


def test_the_example_in_the_card_of_a_pipeline_runs(pipeline_folder, tmp_path):
    code = example(write_card(pipeline_folder))
    assert code.count("\n") == 3
    assert 'class_labels=["cat"]' in code
    exec(code.replace('save("', f'save("{tmp_path}/'), {})
    assert Image.open(tmp_path / "sample.png").size == (16, 16)


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_the_example_in_the_card_of_an_autoencoder_runs(kind, tmp_path):
    sizes = {"sample_size": 16, "num_vq_embeddings": 16, "in_channels": 1, "out_channels": 1}  # the rest: defaults
    getattr(looc_ldm, kind)(**sizes).save_pretrained(tmp_path / "model")
    namespace = {}
    exec(example(write_card(tmp_path / "model")), namespace)
    assert type(namespace["model"]).__name__ == kind
    assert namespace["model"].decode_indices(namespace["codes"]).sample.shape == (1, 1, 16, 16)


def test_the_card_says_shared_codebook_and_network_as_the_config_has_them(tmp_path):
    def card(model):
        model.save_pretrained(tmp_path / "model")
        return write_card(tmp_path / "model").read_text()

    text = card(LooCVQModel(vq_embed_dim=4, codevector_dim=2, interpolation_factor=1))
    assert "all segments of a feature vector share (LooC). A `VQModel` of diffusers." in text
    assert "| codebook | 256 codevectors of 2, 512 numbers |" in text
    assert "share (LooC)" in card(LooCVQModel(vq_embed_dim=4, interpolation_factor=2))
    text = card(LooCVQModel(latent_channels=4, interpolation_factor=1))  # a VQGAN, with the sizes left to defaults
    assert "one codevector for each feature vector (VQ). A `VQModel` of diffusers." in text
    assert "LooC)" not in text
    assert "| codebook | 256 codevectors of 4, 1,024 numbers |" in text
    text = card(LooCSmallVQModel(hidden_channels=8, codevector_dim=4, interpolation_factor=1))
    assert "share (LooC). A small convolutional network" in text


def test_the_card_of_a_pipeline_on_a_plain_codebook_claims_no_shared_one(pipeline_folder):
    file = pipeline_folder / "vqvae" / "config.json"
    assert "share (LooC)" in write_card(pipeline_folder).read_text()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"codevector_dim": 4}))
    assert "LooC)" not in write_card(pipeline_folder).read_text()


def test_a_model_that_is_no_autoencoder_is_refused(pipeline_folder):
    with pytest.raises(ModelError, match="holds a UNet2DModel, not a LooCVQModel or LooCSmallVQModel"):
        write_card(pipeline_folder / "unet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprints": None}, "holds no figures that `looc-ldm evaluate"),
        ({"fingerprints": {}}, "holds figures of a different model"),
        ({"command": None}, "holds no figures that `looc-ldm evaluate"),
    ],
)
def test_figures_that_do_not_belong_here_are_refused(pipeline_folder, figures, changes, message):
    with pytest.raises(UserError, match=message):
        write_card(pipeline_folder, metrics=[figures(RECONSTRUCTION, **changes)])
    assert not (pipeline_folder / "README.md").exists()


def test_figures_of_other_weights_are_refused(pipeline_folder, figures, make_pipeline):
    records = [figures(RECONSTRUCTION), figures(GENERATION)]
    write_card(pipeline_folder, metrics=records)
    pipe = make_pipeline()
    torch.nn.init.normal_(pipe.unet.conv_in.weight)
    pipe.unet.save_pretrained(pipeline_folder / "unet")
    write_card(pipeline_folder, metrics=records[:1])  # the first stage is the same
    with pytest.raises(UserError, match="holds figures of a different model"):
        write_card(pipeline_folder, metrics=records[1:])
    torch.nn.init.normal_(pipe.vqvae.quant_conv.weight)
    pipe.vqvae.save_pretrained(pipeline_folder / "vqvae")
    with pytest.raises(UserError, match="holds figures of a different model"):
        write_card(pipeline_folder, metrics=records[:1])


def test_a_class_token_belongs_to_the_model_that_was_measured(tmp_path, make_pipeline):
    pipe = make_pipeline("cross_attention")
    pipe.save_pretrained(tmp_path / "pets")
    assert stored_fingerprints(tmp_path / "pets", generation=True) == {
        name: model_fingerprint(getattr(pipe, name)) for name in ("vqvae", "unet", "class_embedding")
    }


def test_figures_of_samples_do_not_belong_to_an_autoencoder(autoencoder_folder, figures):
    with pytest.raises(UserError, match=r"holds figures of samples, but .* holds no pipeline"):
        write_card(autoencoder_folder, metrics=[figures(GENERATION)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["nowhere.json"]}, "cannot read 'nowhere.json': No such file"),
        ({"metrics": ["text.json"]}, "'text.json' is not a JSON object"),
        ({"samples": "nowhere.png"}, "--samples 'nowhere.png' must be an image file"),
        ({"samples": "text.json"}, "--samples 'text.json' must be an image file"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_refused(pipeline_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.json").write_text("[]")
    with pytest.raises(UserError, match=message):
        write_card(pipeline_folder, **arguments)


def test_a_folder_without_a_model_is_refused_and_the_result_of_a_run_is_named(pipeline_folder):
    with pytest.raises(ModelError, match=r"/pets'.*; give '.*/pets/pipeline'"):
        write_card(pipeline_folder.parent)


def test_a_card_of_ones_own_is_not_overwritten(pipeline_folder):
    card = write_card(pipeline_folder)
    first = card.read_text()
    assert write_card(pipeline_folder).read_text() == first
    card.write_text(first.replace(f"{MARK}\n", "Mine.\n"))
    with pytest.raises(UserError, match=r"README\.md' was not written by looc-ldm: delete it to have one written"):
        write_card(pipeline_folder)
    assert "Mine." in card.read_text()


def test_what_evaluate_writes_is_what_the_card_reads(autoencoder_folder, say, tmp_path):
    (tmp_path / "animals" / "test").mkdir(parents=True)
    for i in range(3):
        Image.effect_noise((16, 16), 60).convert("RGB").save(tmp_path / "animals" / "test" / f"{i}.png")
    evaluate = ["evaluate", "reconstruction", autoencoder_folder, "--data", "animals", "--output", "figures.json"]
    evaluate += ["--dtype", "bfloat16"]  # the record names the weights as they are stored
    status, printed, errors = say(*evaluate)
    assert status == 0, errors
    measured = json.loads((tmp_path / "figures.json").read_text())
    assert "fingerprints" not in printed
    own = results(write_card(autoencoder_folder, metrics=[tmp_path / "figures.json"]))[1]
    assert own["dataset"] == {"name": "animals", "type": "animals", "split": "test"}
    assert own["metrics"][0]["value"] == measured["psnr"]
    assert own["metrics"][0]["args"]["images"] == 3
