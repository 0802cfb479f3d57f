"""Every way of loading that diffusers knows, from folders and from the hub."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoModel, DDIMScheduler, DiffusionPipeline
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import looc_ldm.hub.upload
from looc_ldm import (
    FixedHeadsUNet2DModel,
    LooCLDMImg2ImgPipeline,
    LooCLDMPipeline,
    LooCSmallVQModel,
    LooCVQModel,
    starter_model,
)
from looc_ldm.hub.upload import push
from looc_ldm.models.loading import load_autoencoder
from looc_ldm.models.starter import bundled_models
from looc_ldm.utils.errors import ModelError
from tiny import tiny_autoencoder, tiny_pipeline

ID = "ada/pets"
BUNDLED = [starter_model(name) for name in bundled_models()]


def draw(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(class_labels=[0, "dog"], num_inference_steps=2, generator=generator, output_type="pt").images


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.flatten().float() for parameter in model.parameters()])


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=["", "trust"])
@pytest.mark.parametrize("place", ["folder", "hub"])
def test_our_class_loads_from_folder_and_hub_with_and_without_trust(place, trust, pushed, pipeline_folder):
    expected = draw(LooCLDMPipeline.from_pretrained(pipeline_folder))
    pipe = LooCLDMPipeline.from_pretrained(pipeline_folder if place == "folder" else ID, **trust)
    assert type(pipe) is LooCLDMPipeline
    assert type(pipe.vqvae) is LooCVQModel
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_diffusion_pipeline_loads_with_trust_and_without_it_says_that_it_needs_it(place, pushed, pipeline_folder):
    name = pipeline_folder if place == "folder" else ID
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(name)
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    assert type(pipe) is LooCLDMPipeline
    assert torch.equal(draw(pipe), draw(LooCLDMPipeline.from_pretrained(pipeline_folder)))


@pytest.mark.parametrize("loader", [AutoModel, LooCVQModel])
@pytest.mark.parametrize("place", ["folder", "hub"])
def test_the_first_stage_of_a_pipeline_loads_by_itself(loader, place, pushed, pipeline_folder):
    name = str(pipeline_folder) if place == "folder" else ID
    model = loader.from_pretrained(name, subfolder="vqvae")
    assert type(model) is LooCVQModel
    assert torch.equal(weights(model), weights(LooCLDMPipeline.from_pretrained(pipeline_folder).vqvae))
    assert torch.equal(weights(load_autoencoder(name)), weights(model))


def test_an_autoencoder_loads_from_its_own_repository(hub, autoencoder_folder):
    push(autoencoder_folder, "ada/codes")
    expected = weights(LooCVQModel.from_pretrained(autoencoder_folder))
    model, report = LooCVQModel.from_pretrained("ada/codes", output_loading_info=True)
    assert torch.equal(weights(model), expected)
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(weights(load_autoencoder("ada/codes")), expected)
    assert torch.equal(weights(AutoModel.from_pretrained("ada/codes", trust_remote_code=True)), expected)
    assert torch.equal(weights(AutoModel.from_pretrained("ada/codes")), expected)


def test_all_that_the_package_ships_and_writes_loads_by_diffusers_own_loaders(tmp_path, hub_environment):
    tiny_autoencoder().save_pretrained(tmp_path / "LooCVQModel")
    LooCSmallVQModel(hidden_channels=8, residual_channels=4, codevector_dim=4).save_pretrained(
        tmp_path / "LooCSmallVQModel"
    )
    tiny_pipeline("cross_attention").save_pretrained(tmp_path / "pipeline")
    FixedHeadsUNet2DModel(block_out_channels=(32,) * 4).save_pretrained(tmp_path / "FixedHeadsUNet2DModel")
    code = f"""
from diffusers import AutoModel, DiffusionPipeline
folder = {str(tmp_path)!r}
models = {{name: name for name in ("LooCVQModel", "LooCSmallVQModel", "FixedHeadsUNet2DModel")}}
models |= {{"pipeline/vqvae": "LooCVQModel", "pipeline/class_embedding": "ClassEmbedding"}}
pipelines = [*{BUNDLED!r}, folder + "/pipeline"]
for path in (*pipelines, *(f"{{folder}}/{{path}}" for path in models)):
    try:
        (DiffusionPipeline if path in pipelines else AutoModel).from_pretrained(path)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError(path + " loaded without trust")
for path in pipelines:
    pipe = DiffusionPipeline.from_pretrained(path, trust_remote_code=True)
    assert type(pipe).__name__ == "LooCLDMPipeline"
for trust in ({{"trust_remote_code": True}}, {{}}):  # the second time our classes have been imported
    for path, name in models.items():
        assert type(AutoModel.from_pretrained(folder + "/" + path, **trust)).__name__ == name
    model = AutoModel.from_pretrained(folder + "/pipeline", subfolder="vqvae", **trust)
    assert type(model).__name__ == "LooCVQModel"
"""
    ended = subprocess.run([sys.executable, "-c", code], env=hub_environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "not expected and will be ignored" not in ended.stderr


def test_a_model_pushed_by_its_own_method_loads(hub, autoencoder_folder):
    model = LooCVQModel.from_pretrained(autoencoder_folder)
    model.push_to_hub("ada/codes")
    assert torch.equal(weights(load_autoencoder("ada/codes")), weights(model))


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_variant_is_taken_where_there_is_one(place, pushed, pipeline_folder):
    name = pipeline_folder if place == "folder" else ID
    plain, live = (LooCLDMPipeline.from_pretrained(name, variant=variant) for variant in (None, "non_ema"))
    assert not torch.equal(weights(plain.unet), weights(live.unet))
    assert torch.equal(weights(plain.vqvae), weights(live.vqvae))
    if place == "hub":
        plain = LooCVQModel.from_pretrained(name, subfolder="vqvae")
        assert torch.equal(weights(plain), weights(live.vqvae))


def test_a_variant_in_half_precision_is_pushed_beside_the_plain_weights(pushed):
    pipe = LooCLDMPipeline.from_pretrained(ID)
    before = pushed.repositories[ID].files()
    pipe.to(torch.float16).push_to_hub(ID, variant="fp16")
    after = pushed.repositories[ID].files()
    assert {path for path in after if path not in before} == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vqvae/diffusion_pytorch_model.fp16.safetensors",
    }
    assert {path: after[path] for path in before} == before  # the card with its figures too
    half = LooCLDMPipeline.from_pretrained(ID, variant="fp16", dtype=torch.float16)
    assert half.unet.dtype == torch.float16
    assert torch.equal(weights(half.unet), weights(pipe.unet))


def test_after_one_download_no_network_is_needed(pushed, monkeypatch):
    expected = draw(LooCLDMPipeline.from_pretrained(ID))
    pushed.requests.clear()
    assert torch.equal(draw(LooCLDMPipeline.from_pretrained(ID, local_files_only=True)), expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(draw(LooCLDMPipeline.from_pretrained(ID)), expected)
    assert torch.equal(weights(LooCVQModel.from_pretrained(ID, subfolder="vqvae")), weights(load_autoencoder(ID)))
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        load_autoencoder("ada/other")
    assert not pushed.requests


def test_a_class_token_and_another_scheduler_come_back(hub, make_pipeline):
    pipe = make_pipeline("cross_attention")
    pipe.scheduler = DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear")
    pipe.push_to_hub("ada/token")
    assert "class_embedding/looc_ldm.py" in hub.repositories["ada/token"].files()
    for loader, trust in ((LooCLDMPipeline, {}), (DiffusionPipeline, {"trust_remote_code": True})):
        loaded = loader.from_pretrained("ada/token", **trust)
        assert loaded.scheduler.config.beta_schedule == "scaled_linear"
        assert torch.equal(draw(loaded), draw(pipe))


def test_another_pipeline_on_the_same_components_loads(pushed, tmp_path):
    pipe = LooCLDMImg2ImgPipeline.from_pretrained(ID)
    pipe.save_pretrained(tmp_path / "img2img")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "img2img", trust_remote_code=True)) is type(pipe)
    assert type(LooCLDMPipeline.from_pretrained(tmp_path / "img2img")) is LooCLDMPipeline


def test_a_folder_that_was_saved_before_pipelines_named_their_code_loads_and_is_pushed_with_it(hub, pipeline_folder):
    for shim in ("pipeline.py", "vqvae/looc_ldm.py"):
        (pipeline_folder / shim).unlink()
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    index["_class_name"] = "LooCLDMPipeline"
    (pipeline_folder / "model_index.json").write_text(json.dumps(index))
    expected = draw(LooCLDMPipeline.from_pretrained(pipeline_folder))
    push(pipeline_folder, ID)
    assert torch.equal(draw(DiffusionPipeline.from_pretrained(ID, trust_remote_code=True)), expected)


def test_what_a_repository_runs_with_trust_is_nothing_but_imports_of_what_is_installed(pushed):
    files = pushed.repositories[ID].files()
    code = {path: text.decode() for path, text in files.items() if path.endswith(".py")}
    assert sorted(code) == ["pipeline.py", "vqvae/looc_ldm.py"]
    for text in code.values():
        statements = [line for line in text.splitlines() if line and not line.startswith(('"""', "__all__"))]
        assert [line.split()[:3:2] for line in statements] == [["from", "import"]]
        assert statements[0].split()[1] == "looc_ldm"
    assert looc_ldm.hub.upload.remote_code(json.loads(files["model_index.json"])) == code


@pytest.mark.parametrize("loader", [LooCLDMPipeline.from_pretrained, load_autoencoder])
def test_a_pickle_instead_of_safetensors_is_refused(loader, pushed, tmp_path):
    files = pushed.repositories[ID].files()
    ruined = {path.replace(".safetensors", ".bin"): content for path, content in files.items()}
    pushed.add("eve/pets", ruined)
    with pytest.raises((OSError, ModelError), match=r"(?i)safetensors|pickle"):
        loader("eve/pets")
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_an_autoencoder_is_loaded_from_pickles_only_where_that_is_asked_for(autoencoder_folder):
    model = LooCVQModel.from_pretrained(autoencoder_folder)
    for file in autoencoder_folder.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(autoencoder_folder, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        LooCVQModel.from_pretrained(autoencoder_folder)
    loaded = LooCVQModel.from_pretrained(autoencoder_folder, use_safetensors=False)
    assert torch.equal(loaded.quant_conv.weight, model.quant_conv.weight)


@pytest.mark.parametrize("key", ["conv_in.bias", "surplus"])
def test_a_pipeline_whose_weights_do_not_fit_its_config_is_refused_in_one_line(say, pipeline_folder, key):
    file = pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if tensors.pop(key, None) is None:
        tensors[key] = torch.ones(1)
    save_file(tensors, file, {"format": "pt"})
    status, _, errors = say("sample", pipeline_folder, "--steps", 1)
    assert status == 2
    assert f"unet' do not fit its config: {key} and 0 more differ." in errors.splitlines()[-1]
