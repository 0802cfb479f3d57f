"""Pushing to the hub: what arrives there, what does not, and what happens when something goes wrong."""

import json
import time

import pytest
import torch
import yaml

from looc_ldm import LooCLDMPipeline, LooCVQModel
from looc_ldm.hub.upload import push
from looc_ldm.utils.errors import ModelError, UserError

ID = "ada/pets"
WEIGHTS = {
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vqvae/diffusion_pytorch_model.safetensors",
}
CONFIGS = {"model_index.json", "unet/config.json", "vqvae/config.json", "scheduler/scheduler_config.json"}
CODE = {"pipeline.py", "vqvae/looc_ldm.py"}
RECORDS = {"README.md", "samples.png", "training.json", "config.yaml"}


@pytest.fixture
def no_waiting(monkeypatch):
    """The client repeats what failed at growing intervals, half a minute in all: not waiting changes nothing else."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def files(hub, repo_id=ID, revision="main"):
    return hub.repositories[repo_id].files(revision)


# Pushed files ---------------------------------------------------------------------------------------------------------


def test_push_uploads_what_loading_needs_and_what_is_known_of_the_training(hub, say, pipeline_folder):
    status, printed, errors = say("push", pipeline_folder, ID)
    assert status == 0, errors
    assert set(files(hub)) - {".gitattributes"} == WEIGHTS | CONFIGS | CODE | RECORDS
    for path in WEIGHTS:
        assert files(hub)[path] == (pipeline_folder / path).read_bytes()
    assert printed.strip() == f"{hub.url}/{ID}/commit/{hub.repositories[ID].branches['main']}"
    assert hub.requests["POST validate_yaml"] == 1
    assert hub.requests["POST commit"] == 1


def test_a_dry_run_sends_nothing_and_shows_the_files_and_the_card_that_would_be_sent(hub, say, pipeline_folder):
    status, card, listed = say("push", pipeline_folder, ID, "--license", "mit", "--dry-run")
    assert status == 0, listed
    assert not hub.requests
    assert say("push", pipeline_folder, ID, "--license", "mit")[0] == 0
    sent = {path: content for path, content in files(hub).items() if path != ".gitattributes"}
    assert listed.splitlines() == [f"{len(content):>15,} bytes  {path}" for path, content in sorted(sent.items())]
    assert card.strip() == sent["README.md"].decode().strip()


def test_push_uploads_an_autoencoder(hub, say, autoencoder_folder):
    status, _, errors = say("push", autoencoder_folder, "ada/codes")
    assert status == 0, errors
    weights = {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.non_ema.safetensors"}
    assert set(files(hub, "ada/codes")) - {".gitattributes"} == weights | RECORDS | {"config.json", "looc_ldm.py"}


def test_nothing_that_is_uploaded_names_a_folder_of_this_machine(hub, say, pipeline_folder, autoencoder_folder):
    LooCLDMPipeline.from_pretrained(pipeline_folder).save_pretrained(pipeline_folder)  # diffusers notes where from
    assert str(pipeline_folder).encode() in (pipeline_folder / "unet" / "config.json").read_bytes()
    say("push", pipeline_folder, ID)
    say("push", autoencoder_folder, "ada/codes")
    for content in [*files(hub).values(), *files(hub, "ada/codes").values()]:
        assert b"/home/ada" not in content
        assert str(pipeline_folder.parent.parent).encode() not in content
    assert yaml.safe_load(files(hub)["config.yaml"])["data"]["path"] == "pets"
    assert json.loads(files(hub)["training.json"])["data"]["path"] == "pets"


def test_a_config_in_the_folder_above_stays_at_home(hub, say, pipeline_folder):
    (pipeline_folder.parent / "config.yaml").write_text("password: hunter2")
    assert say("push", pipeline_folder, ID)[0] == 0
    assert not [path for path, content in files(hub).items() if b"hunter2" in content]


def test_a_broken_record_of_the_training_is_one_line(hub, say, autoencoder_folder):
    (autoencoder_folder / "training.json").write_text("[]")
    status, _, errors = say("push", autoencoder_folder, ID)
    assert (status, errors.count("\n")) == (2, 1)
    assert "pets_ae/model/training.json' is not a JSON object" in errors
    assert not hub.requests


def test_a_repository_is_private_if_asked_for_and_a_public_one_is_not_taken_for_private(hub, say, pipeline_folder):
    assert say("push", pipeline_folder, ID, "--private")[0] == 0
    assert hub.repositories[ID].private
    say("push", pipeline_folder, "ada/open")
    assert not hub.repositories["ada/open"].private
    before = dict(files(hub, "ada/open"))
    status, _, errors = say("push", pipeline_folder, "ada/open", "--private", "--license", "mit")
    assert status == 2
    assert errors == "error: ada/open already exists and is public: nothing was uploaded; make it private first.\n"
    assert files(hub, "ada/open") == before


def test_a_branch_is_made_and_main_is_left_alone(hub, say, pipeline_folder):
    assert say("push", pipeline_folder, ID, "--revision", "half-way")[0] == 0
    assert set(files(hub, revision="main")) == {".gitattributes"}
    assert set(files(hub, revision="half-way")) > WEIGHTS
    assert say("push", pipeline_folder, ID, "--revision", "half-way", "--license", "mit")[0] == 0
    assert b"license: mit" in files(hub, revision="half-way")["README.md"]


def test_a_pull_request_is_opened_and_main_is_left_alone(hub, say, pipeline_folder):
    status, printed, _ = say("push", pipeline_folder, ID, "--create-pr")
    assert status == 0
    assert printed.strip() == f"{hub.url}/{ID}/discussions/1"
    assert set(files(hub, revision="main")) == {".gitattributes"}
    assert set(files(hub, revision="refs/pr/1")) > WEIGHTS
    assert LooCVQModel.from_pretrained(ID, subfolder="vqvae", revision="refs/pr/1").config.num_vq_embeddings == 16
    status, _, errors = say("push", pipeline_folder, ID, "--create-pr", "--revision", "half-way")
    assert status == 2
    assert "--create-pr opens a pull request against main: it cannot go with --revision half-way" in errors


def test_a_repository_of_somebody_else_takes_a_pull_request_from_who_may_not_write(hub, say, pipeline_folder):
    hub.add("eve/pets", {".gitattributes": b""})
    status, _, errors = say("push", pipeline_folder, "eve/pets", "--create-pr")
    assert status == 0, errors
    assert set(files(hub, "eve/pets", "refs/pr/1")) > WEIGHTS
    status, _, errors = say("push", pipeline_folder, "eve/pets")
    assert status == 2
    assert "403 Forbidden: this token may not write" in errors


def test_a_pipeline_pushes_itself(hub, pipeline_folder):
    pipe = LooCLDMPipeline.from_pretrained(pipeline_folder)
    torch.nn.init.normal_(pipe.unet.conv_in.weight)
    address = pipe.push_to_hub("pets", private=True)  # below the user whose token it is
    assert address == f"{hub.url}/{ID}/commit/{hub.repositories[ID].branches['main']}"
    assert hub.repositories[ID].private
    card = files(hub)["README.md"].decode()
    assert f'from_pretrained("{ID}")' in card
    assert "21.25" not in card  # measured with other weights
    plain = {path for path in WEIGHTS if "ema" not in path}
    assert set(files(hub)) - {".gitattributes"} == CONFIGS | CODE | plain | {"README.md"}


def test_saving_pushes_where_that_is_asked_for(hub, pipeline_folder, tmp_path):
    pipe = LooCLDMPipeline.from_pretrained(pipeline_folder)
    pipe.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=ID, private=True, license="mit")
    assert hub.repositories[ID].private
    assert b"license: mit" in files(hub)["README.md"]
    assert files(hub)["pipeline.py"] == (tmp_path / "saved" / "pipeline.py").read_bytes()


def test_a_pipeline_is_not_pushed_as_pickles(hub, pipeline_folder):
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        LooCLDMPipeline.from_pretrained(pipeline_folder).push_to_hub(ID, safe_serialization=False)
    assert not hub.requests


def test_sharded_weights_are_pushed_and_loaded(hub, pipeline_folder):
    pipe = LooCLDMPipeline.from_pretrained(pipeline_folder)
    pipe.push_to_hub(ID, max_shard_size="30KB")
    assert len([path for path in files(hub) if path.startswith("unet/") and "-of-" in path]) > 1
    loaded = LooCLDMPipeline.from_pretrained(ID)
    assert torch.equal(loaded.unet.conv_out.weight, pipe.unet.conv_out.weight)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_waiting")
def test_a_push_that_was_cut_off_goes_on_and_finishes_with_everything_there_and_nothing_doubled(
    hub, say, pipeline_folder
):
    hub.failing_upload = 3  # the third of four: three of weights and one of the picture
    status, _, errors = say("push", pipeline_folder, ID)
    assert status == 2
    assert errors.splitlines()[-1].startswith(f"error: {ID} at {hub.url}: ")  # not behind a bar
    arrived = list(hub.uploads)
    assert 0 < len(arrived) < 4
    assert set(files(hub)) == {".gitattributes"}  # nothing half-done is seen

    hub.failing_upload = None
    assert say("push", pipeline_folder, ID)[0] == 0
    assert set(files(hub)) > WEIGHTS | RECORDS
    assert len(hub.uploads) == len(set(hub.uploads)) == 4  # arrived files were not sent again
    commits = len(hub.repositories[ID].commits)
    assert say("push", pipeline_folder, ID)[0] == 0  # and there is nothing left to do
    assert len(hub.repositories[ID].commits) == commits == 2
    assert len(hub.uploads) == 4


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_bad", "Invalid credentials in Authorization header"),
        ("hf_read_only", "403 Forbidden: this token may not write"),
        ("", "Log in with `hf auth login`, or set HF_TOKEN."),
    ],
)
def test_a_token_that_is_refused_ends_in_one_line_and_uploads_nothing(
    hub, say, pipeline_folder, monkeypatch, token, message
):
    if not token:
        monkeypatch.delenv("HF_TOKEN")
    status, _, errors = say("push", pipeline_folder, ID, *(["--token", token] if token else []))
    assert status == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert not hub.uploads
    assert ID not in hub.repositories


def test_what_the_hub_objects_to_in_the_card_is_said(hub, say, pipeline_folder):
    hub.refused_yaml = '"license" must be one of [mit, apache-2.0]'
    status, _, errors = say("push", pipeline_folder, ID, "--license", "beer")
    assert status == 2
    assert errors.splitlines()[-1].startswith("error: ")
    assert '"license" must be one of' in errors.splitlines()[-1]
    assert not hub.uploads


def test_a_pipeline_that_was_saved_without_its_unet_is_refused(hub, pipeline_folder):
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    (pipeline_folder / "model_index.json").write_text(json.dumps(index | {"unet": [None, None]}))
    with pytest.raises(ModelError, match=r"holds no unet.*merge_and_unload\(\)"):
        push(pipeline_folder, ID)
    assert not hub.requests


def test_a_pickle_is_refused_before_anything_is_asked_of_the_hub(hub, say, pipeline_folder):
    (pipeline_folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    status, _, errors = say("push", pipeline_folder, ID)
    assert status == 2
    assert "unet/diffusion_pytorch_model.bin' is a pickle: loading it can run any code, so it is not uploaded" in errors
    assert errors.count("\n") == 1
    assert not hub.requests


def test_damaged_weights_are_refused(hub, say, pipeline_folder):
    file = pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    status, _, errors = say("push", pipeline_folder, ID)
    assert status == 2
    assert "unet/diffusion_pytorch_model.safetensors' is damaged, and not uploaded" in errors
    assert not hub.requests


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "no model in 'nowhere'"), ("empty", "no model in 'empty'"), ("bare", "no weights in 'bare'")],
)
def test_a_folder_without_a_model_is_refused(hub, say, tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"_class_name": "LooCVQModel"}')
    status, _, errors = say("push", name, ID)
    assert status == 2
    assert message in errors
    assert not hub.requests


def test_files_of_another_kind_are_left_out_and_named(hub, say, pipeline_folder, caplog):
    (pipeline_folder / "notes.docx").write_bytes(b"")
    (pipeline_folder / "LICENSE").write_text("Mine.")
    assert say("push", pipeline_folder, ID)[0] == 0
    assert "LICENSE" in files(hub)
    assert "notes.docx" not in files(hub)
    assert [record.getMessage() for record in caplog.records if record.name == "looc_ldm.hub.upload"] == [
        f"not pushed: {pipeline_folder / 'notes.docx'}"
    ]


def test_a_card_of_ones_own_is_pushed_as_it_is(hub, say, pipeline_folder):
    (pipeline_folder / "README.md").write_text("# Mine\n")
    assert say("push", pipeline_folder, ID)[0] == 0
    assert files(hub)["README.md"] == b"# Mine\n"
    with pytest.raises(UserError, match="--metrics, --samples and --license are for the model card"):
        push(pipeline_folder, ID, license="mit")


def test_an_id_that_is_none_is_refused(hub, pipeline_folder):
    with pytest.raises(ModelError, match=r"Repo id must be .*'a/b/c'"):
        push(pipeline_folder, "a/b/c")
