"""Pulling from the hub: only what is needed, verified, and what happens when something goes wrong."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from looc_ldm import LooCLDMPipeline
from looc_ldm.models.loading import load_autoencoder
from looc_ldm.utils.errors import ModelError
from looc_ldm.utils.hub_download import download, wanted_files

ID = "ada/pets"
UNET = "unet/diffusion_pytorch_model.safetensors"


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# Arrived files --------------------------------------------------------------------------------------------------------


def test_pull_brings_a_model_without_other_variants_and_prints_where(pushed, say, tmp_path, pipeline_folder):
    status, printed, errors = say("pull", ID, "--output", "pets")
    assert status == 0, errors
    assert printed == "pets\n"
    assert files_in(tmp_path / "pets") == {
        path for path in pushed.repositories[ID].files() if "non_ema" not in path and path != ".gitattributes"
    }
    pulled, original = (LooCLDMPipeline.from_pretrained(folder) for folder in (tmp_path / "pets", pipeline_folder))
    assert torch.equal(pulled.unet.conv_in.weight, original.unet.conv_in.weight)
    assert not list(tmp_path.glob(".*"))


def test_pull_brings_one_variant_where_there_is_one(pushed, say, tmp_path, pipeline_folder):
    assert say("pull", ID, "--output", "pets", "--variant", "non_ema")[0] == 0
    weights = {path for path in files_in(tmp_path / "pets") if path.endswith(".safetensors")}
    assert weights == {"unet/diffusion_pytorch_model.non_ema.safetensors", "vqvae/diffusion_pytorch_model.safetensors"}
    loaded = LooCLDMPipeline.from_pretrained(tmp_path / "pets", variant="non_ema")
    original = LooCLDMPipeline.from_pretrained(pipeline_folder, variant="non_ema")
    assert torch.equal(loaded.unet.conv_in.weight, original.unet.conv_in.weight)


def test_without_a_folder_it_goes_into_the_cache_and_loads_without_a_network(pushed, say, tmp_path, monkeypatch):
    status, printed, _ = say("pull", ID)
    assert status == 0
    assert Path(printed.strip()).is_relative_to(tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    LooCLDMPipeline.from_pretrained(ID)


def test_a_revision_is_pulled(pushed, say, tmp_path):
    files = pushed.repositories[ID].files()
    pushed.add(ID, files | {"README.md": b"another\n"}, branch="other")
    assert say("pull", ID, "--output", "pets", "--revision", "other")[0] == 0
    assert (tmp_path / "pets" / "README.md").read_bytes() == b"another\n"
    status, _, errors = say("pull", ID, "--output", "more", "--revision", "nothing")
    assert (status, errors.count("\n")) == (2, 1)
    assert "Revision Not Found" in errors


def test_a_private_repository_is_pulled_with_a_token_only(pushed, say, tmp_path, monkeypatch):
    pushed.repositories[ID].private = True
    token = constants.os.environ["HF_TOKEN"]
    monkeypatch.delenv("HF_TOKEN")
    status, _, errors = say("pull", ID, "--output", "pets")
    assert status == 2
    assert "make sure you are authenticated" in errors
    assert say("pull", ID, "--output", "pets", "--token", token)[0] == 0


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
HALF = ["model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json"]


@pytest.mark.parametrize(("variant", "weights"), [(None, SHARDS), ("fp16", HALF), ("ema", ["model.ema.safetensors"])])
def test_shards_and_their_index_belong_to_a_variant_too(variant, weights):
    assert wanted_files(ID, ["config.json", *SHARDS, *HALF, "model.ema.safetensors"], variant) == [
        "config.json",
        *weights,
    ]


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [[], ["--output", "pets"]], ids=["cache", "folder"])
def test_a_corrupted_download_is_refused_by_name_and_does_not_stay(pushed, say, tmp_path, place):
    """The client compares only sizes: a flipped bit goes unnoticed by it."""
    pushed.corrupted = {UNET}
    status, printed, errors = say("pull", ID, *place)
    assert (status, printed) == (2, "")
    assert errors.splitlines()[-1].startswith(f"error: {UNET} of {ID} is damaged: its sha256 is ")
    assert not (tmp_path / "pets").exists()
    pushed.corrupted = set()
    requests = pushed.requests["GET resolve"]
    assert say("pull", ID, *place)[0] == 0
    assert pushed.requests["GET resolve"] == requests + 1  # complete files are not fetched again


@pytest.mark.parametrize(
    ("command", "file", "checksum"),
    [(["pull"], "scheduler/scheduler_config.json", "git-sha1"), (["sample", "--steps", 1], UNET, "sha256")],
)
def test_small_files_and_downloads_of_other_commands_are_verified_too(pushed, say, command, file, checksum):
    pushed.corrupted = {file}
    status, _, errors = say(*command, ID)
    assert status == 2
    assert f"{file} of ada/pets is damaged: its {checksum} is" in errors.splitlines()[-1]


def test_a_repository_with_a_pickle_instead_of_safetensors_is_refused(pushed, say, tmp_path):
    files = pushed.repositories[ID].files()
    pushed.add("eve/pets", {path.replace(".safetensors", ".bin"): content for path, content in files.items()})
    status, _, errors = say("pull", "eve/pets")
    assert status == 2
    assert "error: eve/pets has unet/diffusion_pytorch_model." in errors
    assert "no safetensors beside it to load. Pickles are refused, because they can run any code." in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_pickles_that_no_component_needs_are_left_there(pushed, say, tmp_path):
    stray = {
        "unet/diffusion_pytorch_model.bin",
        "training_args.bin",
        "checkpoints/optimizer.pt",
        "old_unet/model.bin",
        "old_unet/model.fp16.safetensors",
    }
    pushed.add(ID, pushed.repositories[ID].files() | dict.fromkeys(stray, b"") | {"old_vae/config.json": b""})
    status, _, errors = say("pull", ID, "--output", "pets")
    assert status == 0, errors
    assert not files_in(tmp_path / "pets") & stray
    LooCLDMPipeline.from_pretrained(tmp_path / "pets")


def test_pickles_in_folders_of_an_autoencoder_are_left_there_and_in_its_root_refused(hub, say, tmp_path):
    weights = "diffusion_pytorch_model.safetensors"
    left = {"training_args.bin": b"", "checkpoints/optimizer.pt": b""}
    hub.add(ID, {"config.json": b"{}", weights: b"weights"} | left)
    assert say("pull", ID, "--output", "codes")[0] == 0
    assert files_in(tmp_path / "codes") == {"config.json", weights}
    hub.add("ada/old", {"config.json": b"{}", "model.bin": b"", f"old/{weights}": b""})
    status, _, errors = say("pull", "ada/old")
    assert status == 2
    assert "ada/old has model.bin, but no safetensors beside it to load" in errors


def test_a_component_without_plain_weights_is_refused(hub, say, tmp_path):
    files = {"model_index.json": b"{}", "unet/config.json": b"{}", "vqvae/config.json": b"{}"}
    files |= {f"unet/diffusion_pytorch_model.{name}.safetensors": b"" for name in ("ema", "fp16")}
    files |= {f"vqvae/diffusion_pytorch_model{name}.safetensors": b"" for name in ("", ".non_ema")}
    hub.add(ID, files)
    for variant in ([], ["--variant", "non_ema"]):
        status, _, errors = say("pull", ID, *variant)
        assert status == 2
        assert "has unet/diffusion_pytorch_model.ema.safetensors, but no safetensors beside it to load" in errors
        assert "If the weights have a variant, such as fp16, name it: `looc-ldm pull --variant fp16`." in errors


@pytest.mark.parametrize("name", ["/absolute.json", "..\\parent.json", "../parent.json", "long" * 75 + ".json"])
def test_a_file_name_that_cannot_be_used_is_refused_in_one_line(pushed, say, tmp_path, name):
    pushed.add(ID, pushed.repositories[ID].files() | {name: b"{}"})
    for command in (["pull", ID, "--output", "pets"], ["sample", ID, "--steps", 1]):
        status, _, errors = say(*command)
        assert (status, errors.count("\n")) == (2, 1)
        assert f"ada/pets is refused: {name[:100]!r} is no usable name of a file." in errors
    assert not (tmp_path / "pets").exists()


@pytest.mark.parametrize("command", ["pull", "sample", "reconstruct", "evaluate reconstruction"])
def test_a_missing_repository_is_one_line_that_says_what_to_do(hub, say, command):
    rest = {"reconstruct": ["fashion_mnist"], "evaluate reconstruction": ["--data", "fashion_mnist"]}
    status, _, errors = say(*command.split(), "ada/nothing", *rest.get(command, []))
    assert (status, errors.count("\n")) == (2, 1)
    assert "Repository Not Found" in errors
    assert errors.endswith(" There is no folder 'ada/nothing' either.\n") or command == "pull"


@pytest.mark.parametrize("command", ["pull", "sample"])
@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("token", "Invalid credentials in Authorization header"),
        ("nobody", "Connection refused"),
        ("offline", "HF_HUB_OFFLINE"),
    ],
)
def test_what_keeps_the_hub_out_of_reach_is_said_in_one_line(pushed, say, monkeypatch, command, trouble, message):
    if trouble == "token":
        monkeypatch.setenv("HF_TOKEN", "hf_bad")
    elif trouble == "nobody":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port of discarded packets
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, _, errors = say(command, ID)
    assert (status, errors.count("\n")) == (2, 1)
    assert errors.startswith(f"error: {ID} at {constants.ENDPOINT}: ")
    assert message in errors


def test_what_is_in_the_cache_is_used_when_the_hub_cannot_be_reached(pushed, monkeypatch):
    folder = download(ID)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert download(ID) == folder
    with pytest.raises(ModelError, match="Connection refused"):
        download("ada/other")


def test_an_unknown_variant_and_a_repository_without_a_model_are_refused(pushed, say):
    status, _, errors = say("pull", ID, "--variant", "fp16")
    assert status == 2
    assert "ada/pets has no variant 'fp16' of its weights." in errors
    pushed.add("ada/empty", {"README.md": b""})
    assert "no model in ada/empty" in say("pull", "ada/empty")[2]
    pushed.add("ada/bare", {"config.json": b"{}"})
    assert "no model in ada/bare: it holds no safetensors" in say("pull", "ada/bare")[2]


def test_a_folder_that_is_not_empty_is_left_alone(pushed, say, tmp_path):
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "mine.txt").write_text("mine")
    status, _, errors = say("pull", ID, "--output", "pets")
    assert (status, errors) == (2, "error: --output 'pets' is not empty: give another folder, or delete it.\n")
    assert files_in(tmp_path / "pets") == {"mine.txt"}
    (tmp_path / "pets" / "mine.txt").unlink()
    assert say("pull", ID, "--output", "pets")[0] == 0


def test_a_link_to_an_empty_folder_is_filled(pushed, say, tmp_path):
    (tmp_path / "disk" / "pets").mkdir(parents=True)
    (tmp_path / "pets").symlink_to(tmp_path / "disk" / "pets")
    status, printed, errors = say("pull", ID, "--output", "pets")
    assert (status, printed) == (0, "pets\n"), errors
    assert (tmp_path / "pets").is_symlink()
    assert "model_index.json" in files_in(tmp_path / "disk" / "pets")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["pets"]


def test_of_a_pipeline_only_the_first_stage_is_downloaded_where_no_more_is_needed(pushed, tmp_path):
    load_autoencoder(ID)
    snapshot = next((tmp_path / "cache").rglob("model_index.json")).parent
    needed = {"model_index.json", "vqvae/config.json", "vqvae/looc_ldm.py", "vqvae/diffusion_pytorch_model.safetensors"}
    assert files_in(snapshot) == needed
    LooCLDMPipeline.from_pretrained(ID)  # and the rest when it is
