"""A training that starts from a finished model has its networks and weights, and says so where it cannot."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from looc_ldm import LooCLDMPipeline, LooCVQModel
from looc_ldm.training import autoencoder, diffusion, init_from
from looc_ldm.training.checkpoints import read_state
from looc_ldm.training.config import AutoencoderConfig, OptimizerConfig
from looc_ldm.training.config_parsing import parse_config
from looc_ldm.training.init_from import autoencoder_from, denoiser_from, newest_weights
from looc_ldm.utils.errors import ConfigError, ModelError
from tiny import assert_equal_tensors


@pytest.fixture(scope="module")
def pipeline_run(diffusion_config, tmp_path_factory):
    """The folder of a finished class-conditional pipeline. To be read only."""
    folder = tmp_path_factory.mktemp("runs") / "diffusion"
    return diffusion.train(diffusion_config(folder, class_conditional=True, total_images=8))


@pytest.fixture
def classes(pipeline_run) -> list[str]:
    return list(LooCLDMPipeline.from_pretrained(pipeline_run).config.id2label.values())


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


# Stage 1 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeated", [True, False])
def test_an_autoencoder_starts_with_the_weights_of_another(repeated, autoencoder_config, autoencoder_run, tmp_path):
    config = autoencoder_config(tmp_path, init_from=str(autoencoder_run / "model"))
    model = autoencoder_from(config if repeated else replace(config, model={}))
    trained = LooCVQModel.from_pretrained(autoencoder_run / "model")
    assert same(model, trained)
    assert model.config.scaling_factor is None  # to be measured on the images of this training
    assert trained.config.scaling_factor > 0


def test_a_pipelines_first_stage_will_do(autoencoder_config, autoencoder_run, pipeline_run, tmp_path):
    model = autoencoder_from(autoencoder_config(tmp_path, init_from=str(pipeline_run)))
    assert same(model, LooCVQModel.from_pretrained(autoencoder_run / "model"))


def test_how_the_codebook_learns_is_the_configs_to_say(autoencoder_config, autoencoder_run, tmp_path):
    settings = {"anchor": "none", "gradient": "straight-through", "codebook_update": "gradient"}
    config = autoencoder_config(tmp_path, model=settings, init_from=str(autoencoder_run / "model"))
    quantizer = autoencoder_from(config).quantize
    assert {name: getattr(quantizer, name) for name in settings} == settings


def test_training_goes_on_from_there(autoencoder_config, autoencoder_run, tmp_path):
    config = autoencoder_config(tmp_path, model=None, init_from=str(autoencoder_run / "model"), total_images=8)
    result = autoencoder.train(replace(config, model={}))
    model, trained = (LooCVQModel.from_pretrained(folder) for folder in (result, autoencoder_run / "model"))
    assert not same(model, trained)
    moved = (model.encoder.conv_in.weight - trained.encoder.conv_in.weight).abs().max()
    assert 0 < moved <= 1.01 * config.optimizer.learning_rate  # one step of Adam
    assert model.config.scaling_factor > 0
    assert autoencoder.train(replace(config, model={})) == result


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_vq_embeddings": 32}, "model.num_vq_embeddings is 32 in the config and 16 in init_from; --model '{}'"),
        ({"segment_layout": "patch"}, "model.segment_layout is 'patch' in the config and 'channel' in init_from"),
    ],
)
def test_another_network_in_the_config_is_refused(model, message, autoencoder_config, autoencoder_run, tmp_path):
    config = autoencoder_config(tmp_path / "run", model=model, init_from=str(autoencoder_run / "model"))
    with pytest.raises(ConfigError, match=message):
        autoencoder.train(config)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_model_is_refused(autoencoder_config, tmp_path):
    with pytest.raises(ModelError, match=r"neither bundled .*, a folder, nor a hub id"):
        autoencoder.train(autoencoder_config(tmp_path / "run", init_from="/nowhere/model"))


def test_flags_may_be_typed_with_dashes():
    arguments = ["--init-from", "a-b/c-d", "--output-dir=my-run", "--data.num-workers", "3", "--model", "{}"]
    config = parse_config(AutoencoderConfig, arguments, "test")
    assert (config.init_from, config.output_dir, config.data.num_workers) == ("a-b/c-d", "my-run", 3)
    assert config.model == {}


def test_a_run_gives_its_newest_live_and_averaged_weights_and_the_average_goes_on(
    autoencoder_config, autoencoder_run, tmp_path
):
    newest = autoencoder_run / "checkpoints" / "000000048"
    live, averaged = load_file(newest / "model.safetensors"), load_file(newest / "ema.safetensors")
    slow = OptimizerConfig(learning_rate=1e-9)
    config = autoencoder_config(tmp_path, init_from=str(autoencoder_run), optimizer=slow, total_images=8, batch_size=4)
    config = replace(config, model={}, ema_halflife_images=1000)
    result = autoencoder.train(config)
    name = "encoder.conv_in.weight"
    now = {variant: LooCVQModel.from_pretrained(result, variant=variant) for variant in (None, "non_ema")}
    torch.testing.assert_close(now["non_ema"].state_dict()[name], live[name], rtol=0, atol=1e-7)
    # Two steps of 4 images after the 48: half-lives of 5 % of 52 and of 56 images
    weight = 0.5 ** (4 / (52 * 0.05)) * 0.5 ** (4 / (56 * 0.05))
    expected = live[name] + weight * (averaged[name] - live[name])
    torch.testing.assert_close(now[None].state_dict()[name], expected, rtol=0, atol=1e-7)
    assert (expected - live[name]).abs().max() > 1e-5
    assert read_state(tmp_path / "checkpoints" / "000000008")["earlier_images"] == 48
    again = autoencoder_config(tmp_path / "again", model={}, init_from=str(tmp_path), total_images=8)
    assert newest_weights(again).images == 56
    autoencoder.train(replace(again, model={}))  # from a run that has no network in its own config


def test_a_run_without_checkpoints_is_no_start(autoencoder_config, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ModelError, match="is a run without checkpoints"):
        autoencoder.train(autoencoder_config(tmp_path / "new", init_from=str(tmp_path / "run")))


# Stage 2 --------------------------------------------------------------------------------------------------------------


def start(config, classes, autoencoder_run):
    return denoiser_from(config, LooCVQModel.from_pretrained(autoencoder_run / "model"), classes)


@pytest.mark.parametrize("repeated", [True, False])
def test_a_unet_starts_with_the_weights_of_another(
    repeated, diffusion_config, autoencoder_run, pipeline_run, classes, tmp_path
):
    config = diffusion_config(tmp_path, class_conditional=True, init_from=str(pipeline_run))
    denoiser = start(config if repeated else replace(config, unet={}), classes, autoencoder_run)
    assert same(denoiser.unet, LooCLDMPipeline.from_pretrained(pipeline_run).unet)


def test_with_other_classes_their_embeddings_start_anew(
    diffusion_config, autoencoder_run, pipeline_run, classes, tmp_path, caplog
):
    config = diffusion_config(tmp_path, class_conditional=True, init_from=str(pipeline_run))
    denoiser = start(config, ["cat", "dog"], autoencoder_run)
    trained = LooCLDMPipeline.from_pretrained(pipeline_run).unet
    assert denoiser.unet.class_embedding.weight.shape[0] == 3
    assert torch.equal(denoiser.unet.conv_in.weight, trained.conv_in.weight)
    assert "their embeddings are random" in caplog.text
    unconditional = start(replace(config, class_conditional=False), [], autoencoder_run)
    assert torch.equal(unconditional.unet.conv_out.weight, trained.conv_out.weight)


def test_a_run_of_stage_2_gives_its_newest_live_and_averaged_weights(diffusion_config, pipeline_run, classes, tmp_path):
    newest = pipeline_run.parent / "checkpoints" / "000000008"
    live, averaged = load_file(newest / "model.safetensors"), load_file(newest / "ema.safetensors")
    config = diffusion_config(tmp_path, class_conditional=True, init_from=str(pipeline_run.parent), autoencoder="")
    start_of_run = newest_weights(config)
    vqvae = LooCLDMPipeline.from_pretrained(pipeline_run).vqvae
    denoiser = denoiser_from(replace(config, unet={}), vqvae, classes, start_of_run)
    assert_equal_tensors(denoiser.state_dict(), live)
    assert_equal_tensors(start_of_run.averaged, averaged)
    other = denoiser_from(config, vqvae, ["cat", "dog"], start_of_run)
    assert other.unet.class_embedding.weight.shape[0] == 3
    assert torch.equal(other.unet.conv_in.weight, live["unet.conv_in.weight"])
    assert start_of_run.averaged.keys() == live.keys() - {"unet.class_embedding.weight"}
    result = diffusion.train(replace(config, unet={}, optimizer=OptimizerConfig(learning_rate=1e-9), total_images=8))
    trained = load_file(result / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    torch.testing.assert_close(trained["conv_in.weight"], live["unet.conv_in.weight"], rtol=0, atol=1e-7)


def test_live_weights_of_fsdp_are_found_where_accelerate_stores_them(
    diffusion_config, pipeline_run, tmp_path, monkeypatch
):
    newest = pipeline_run.parent / "checkpoints" / "000000008"
    live, state = load_file(newest / "model.safetensors"), read_state(newest)
    shutil.copytree(pipeline_run.parent, tmp_path / "fsdp")
    weights = tmp_path / "fsdp" / "checkpoints" / "000000008" / "model.safetensors"
    torch.save(live, weights.with_name("pytorch_model_fsdp.bin"))
    weights.unlink()
    monkeypatch.setattr(init_from, "read_state", lambda _: state)  # the checksums are not those of FSDP
    found = newest_weights(diffusion_config(tmp_path, init_from=str(tmp_path / "fsdp"))).live
    assert_equal_tensors(found, live)


def test_the_first_stage_of_the_pipeline_is_used_where_no_other_is_given(diffusion_config, pipeline_run, tmp_path):
    config = diffusion_config(
        tmp_path, class_conditional=True, init_from=str(pipeline_run), autoencoder="", total_images=8
    )
    result = LooCLDMPipeline.from_pretrained(diffusion.train(config))
    before = LooCLDMPipeline.from_pretrained(pipeline_run)
    assert same(result.vqvae, before.vqvae)
    moved = (result.unet.conv_in.weight - before.unet.conv_in.weight).abs().max()
    assert 0 < moved <= 1.01 * config.optimizer.learning_rate


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_out_channels": [32, 16]}, r"unet.block_out_channels is \(32, 16\) in the config and \(16, 16\)"),
        ({"type": "UNet2DConditionModel"}, "unet.type is UNet2DConditionModel in the config, but UNet2DModel in"),
    ],
)
def test_another_unet_in_the_config_is_refused(settings, message, diffusion_config, pipeline_run, tmp_path):
    config = diffusion_config(tmp_path / "run", class_conditional=True, init_from=str(pipeline_run))
    with pytest.raises(ConfigError, match=message):
        diffusion.train(replace(config, unet={**config.unet, **settings}))
    assert not (tmp_path / "run").exists()


def test_a_unet_goes_on_with_what_it_was_trained_to_predict(
    diffusion_config, autoencoder_run, pipeline_run, classes, tmp_path
):
    flow = {"type": "FlowMatchEulerDiscreteScheduler"}
    config = diffusion_config(tmp_path / "flow", class_conditional=True, scheduler=flow, total_images=8)
    trained = diffusion.train(config)
    again = replace(config, output_dir=str(tmp_path / "again"))
    vqvae = LooCVQModel.from_pretrained(autoencoder_run / "model")
    for source in (trained, trained.parent):  # the pipeline, and the run
        config = replace(again, init_from=str(source))
        denoiser_from(config, vqvae, classes, newest_weights(config))
    with pytest.raises(ConfigError, match=r"the scheduler is for flow_prediction, but init_from=.* for epsilon"):
        diffusion.train(replace(again, init_from=str(pipeline_run)))


def test_latents_of_other_channels_are_refused(diffusion_config, autoencoder_config, pipeline_run, tmp_path):
    other = autoencoder.train(autoencoder_config(tmp_path / "first", model={"vq_embed_dim": 6}, total_images=8))
    config = diffusion_config(tmp_path / "run", class_conditional=True, init_from=str(pipeline_run))
    with pytest.raises(ConfigError, match="denoises latents of 4 channels, but the autoencoder's latents have 6"):
        diffusion.train(replace(config, autoencoder=str(other)))
