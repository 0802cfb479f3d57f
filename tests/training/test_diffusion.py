"""Stage 2 end to end: its targets, its labels, what a run leaves behind and that an interruption does not change it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from looc_ldm import LooCLDMPipeline, LooCVQModel
from looc_ldm.images.config import DataConfig
from looc_ldm.models.loading import load_autoencoder
from looc_ldm.training import diffusion
from looc_ldm.training.checks import check_config
from looc_ldm.training.config import DiffusionDataConfig, EvaluationConfig
from looc_ldm.training.denoiser import Denoiser, make_scheduler
from looc_ldm.training.latents import LatentCache, LatentStream
from looc_ldm.training.run import Run
from looc_ldm.utils.errors import ConfigError, ModelError
from tiny import assert_equal_tensors, contents, log_lines, weights

UNET = {
    "type": "UNet2DModel",
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "block_out_channels": [16],
    "norm_num_groups": 4,
}
ATTENDING_UNET = {
    "type": "UNet2DConditionModel",
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """Calls of the denoiser while training: noisy latents, timesteps, labels, prediction."""
    recorded = []
    forward = Denoiser.forward

    def recording(denoiser, noisy, timesteps, labels):
        prediction = forward(denoiser, noisy, timesteps, labels)
        recorded.append((noisy, timesteps, labels, prediction.detach()))
        return prediction

    monkeypatch.setattr(Denoiser, "forward", recording)
    return recorded


@pytest.fixture(scope="module")
def conditional_run(diffusion_config, tmp_path_factory) -> Path:
    """The output folder of a finished class-conditional run. To be read only."""
    folder = tmp_path_factory.mktemp("runs") / "diffusion"
    diffusion.train(diffusion_config(folder, class_conditional=True, class_dropout=0.5))
    return folder


# Images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "resolution", "fit"), [({}, 32, "pad"), ({"resolution": 64, "fit": "crop"}, 64, "crop")]
)
def test_resolution_and_fit_are_those_of_the_autoencoders_training_unless_given(
    told, resolution, fit, diffusion_config, garments, tmp_path, caplog
):
    data = DiffusionDataConfig(path=str(garments), validation_images=16, num_workers=0, **told)
    with caplog.at_level("INFO"):
        result = diffusion.train(diffusion_config(tmp_path, data=data, total_images=8))
    used = json.loads((result / "training.json").read_text())["data"]
    assert (used["resolution"], used["fit"]) == (resolution, fit)
    assert ("data.resolution=32, data.fit=pad, as in the autoencoder's training" in caplog.text) == (not told)
    assert LooCLDMPipeline.from_pretrained(result).unet.config.sample_size == resolution // 2


def test_the_caption_of_a_grid_names_weights_guidance_and_the_class_of_each_column(diffusion_config, conditional_run):
    pipe = LooCLDMPipeline.from_pretrained(conditional_run / "pipeline")
    config = diffusion_config(conditional_run, class_conditional=True, preview_guidance_scale=1.5)
    names = ", ".join(pipe.config.id2label[label] for label in range(10))
    expected = f"Samples by averaged weights, 2 steps, guidance scale 1.5. Columns: {names}."
    assert diffusion.preview(pipe, config)[1] == expected


# Targets and labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prediction_type", "loss"), [("v_prediction", "min_snr"), ("epsilon", "l1")])
def test_the_loss_is_the_distance_to_the_noise_or_the_velocity(
    diffusion_config, tmp_path, calls, prediction_type, loss
):
    schedule = {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.02, "prediction_type": prediction_type}
    weighting = (
        {"loss": "l2", "loss_weighting": "min_snr", "min_snr_gamma": 2.0} if loss == "min_snr" else {"loss": loss}
    )
    config = diffusion_config(tmp_path, scheduler=schedule, total_images=8, **weighting)
    pipe = LooCLDMPipeline.from_pretrained(diffusion.train(config))
    stream = LatentStream(LatentCache(tmp_path / "latents"), pipe.vqvae, config.seed)
    examples = [stream[position] for position in range(8)]
    latents, noise = (torch.stack([example[i] for example in examples]) for i in (0, 2))
    timesteps = torch.tensor([int(1000 * example[3]) for example in examples])
    kept = torch.cumprod(1 - torch.linspace(0.001, 0.02, 1000), 0)[timesteps][:, None, None, None]

    noisy, times, labels, prediction = calls[0]
    assert torch.equal(times, timesteps)
    assert labels is None
    torch.testing.assert_close(noisy, kept.sqrt() * latents + (1 - kept).sqrt() * noise, rtol=0, atol=1e-5)
    target = noise if prediction_type == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * latents
    distance = (prediction - target).abs() if loss == "l1" else (prediction - target).square()
    if loss == "min_snr":
        snr = kept / (1 - kept)
        distance = distance * snr.clamp(max=2) / (snr if prediction_type == "epsilon" else snr + 1)
    assert log_lines(tmp_path)[0]["loss"] == pytest.approx(distance.mean().item(), rel=1e-5)


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FLOW = {"type": "FlowMatchEulerDiscreteScheduler"}


@pytest.mark.parametrize(
    ("settings", "prediction_type"),
    [
        ({"scheduler": {"prediction_type": "sample"}}, "sample"),
        ({"scheduler": {"prediction_type": "sample"}, "loss_weighting": "min_snr"}, "sample"),
        (
            {"scheduler": ZERO_SNR, "loss_weighting": "min_snr", "min_snr_gamma": 1.0},
            "v_prediction",
        ),
        ({"scheduler": {"type": "DPMSolverMultistepScheduler", "prediction_type": "v_prediction"}}, "v_prediction"),
        ({"scheduler": FLOW, "timestep_sampling": "logit_normal"}, "flow_prediction"),
        ({"scheduler": {**FLOW, "shift": 3.0}}, "flow_prediction"),
    ],
)
def test_what_was_predicted_is_saved_and_the_pipeline_draws_by_it(
    diffusion_config, tmp_path, settings, prediction_type
):
    pipe = LooCLDMPipeline.from_pretrained(diffusion.train(diffusion_config(tmp_path, total_images=16, **settings)))
    assert pipe.config.prediction_type == prediction_type
    assert type(pipe.scheduler).__name__ == settings["scheduler"].get("type", "DDIMScheduler")
    assert prediction_type == "flow_prediction" or pipe.scheduler.config.prediction_type == prediction_type
    assert pipe.num_class_embeds == 0
    images = pipe(batch_size=2, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 1, 32, 32)
    assert images.isfinite().all()
    assert log_lines(tmp_path)[-1]["loss"] > 0


def test_latents_encoded_in_the_loop_are_those_of_the_cache(diffusion_config, tmp_path, calls):
    diffusion.train(diffusion_config(tmp_path / "cached", class_conditional=True))
    cached = list(calls)
    calls.clear()
    diffusion.train(diffusion_config(tmp_path / "online", class_conditional=True, cache_latents=False))
    assert not (tmp_path / "online" / "latents").exists()
    assert len(cached) == len(calls)
    for (noisy, timesteps, labels, _), (other_noisy, other_timesteps, other_labels, _) in zip(
        cached, calls, strict=True
    ):
        assert torch.equal(timesteps, other_timesteps)
        assert torch.equal(labels, other_labels)
        torch.testing.assert_close(noisy, other_noisy, rtol=0, atol=5e-3)  # the cache is half precision


def test_latents_encoded_in_the_loop_keep_the_scale_that_was_measured_at_the_start(diffusion_config, tmp_path):
    config = diffusion_config(tmp_path, cache_latents=False, latent_scaling="channel", total_images=24)
    first = LooCLDMPipeline.from_pretrained(diffusion.train(config)).vqvae.config
    kept = json.loads((tmp_path / "moments.json").read_text())
    (tmp_path / "moments.json").write_text(json.dumps({**kept, "count": 4 * kept["count"]}))
    second = LooCLDMPipeline.from_pretrained(diffusion.train(replace(config, total_images=48))).vqvae.config
    assert second.latents_mean == pytest.approx([mean / 4 for mean in first.latents_mean])


def test_random_crops_are_encoded_in_the_loop_or_refused(diffusion_config, small_data, tmp_path):
    data = replace(small_data, fit="random_crop")
    diffusion.train(diffusion_config(tmp_path, data=data, cache_latents=False, total_images=8))
    with pytest.raises(ConfigError, match="set cache_latents=false"):
        check_config(diffusion_config(tmp_path, data=data))


def test_a_step_whose_gradients_are_not_finite_changes_nothing_and_is_counted(diffusion_config, tmp_path, monkeypatch):
    forward, steps = Denoiser.forward, []

    def sometimes_nan(denoiser, noisy, timesteps, labels):
        steps.append({name: tensor.clone() for name, tensor in denoiser.state_dict().items()})
        return forward(denoiser, noisy, timesteps, labels) * (torch.nan if len(steps) == 3 else 1.0)

    monkeypatch.setattr(Denoiser, "forward", sometimes_nan)
    monkeypatch.setattr(Run, "skipping", False)  # a checkpoint of that step, too
    config = diffusion_config(tmp_path, preview_every_images=10**6, checkpoint_every_images=8, keep_last=9)
    diffusion.train(config)
    averages = [load_file(tmp_path / "checkpoints" / f"{i:09d}" / "ema.safetensors") for i in (16, 24, 32)]
    assert_equal_tensors(averages[0], averages[1])
    assert not all(torch.equal(averages[1][name], averages[2][name]) for name in averages[0])
    assert_equal_tensors(steps[2], steps[3])
    assert not all(torch.equal(steps[3][name], steps[4][name]) for name in steps[2])
    assert [line["skipped_steps"] for line in log_lines(tmp_path)] == [0, 0, 1, 1, 1, 1]
    assert json.loads((tmp_path / "pipeline" / "training.json").read_text())["skipped_steps"] == 1


def test_measuring_while_it_runs_changes_nothing(diffusion_config, tmp_path, untrained_inception):
    measured = EvaluationConfig(
        every_images=24, images=4, fid=True, inception_weights=str(untrained_inception), feature_layer=64
    )
    with_it = diffusion.train(diffusion_config(tmp_path / "measured", evaluation=measured))
    without = diffusion.train(diffusion_config(tmp_path / "plain"))
    assert_equal_tensors(weights(with_it), weights(without))
    lines = [line for line in log_lines(tmp_path / "measured") if "val_fid@64" in line]
    assert [line["images"] for line in lines] == [24, 48]


@pytest.mark.slow
def test_compiled_training_goes_the_same_way(diffusion_config, tmp_path):
    runs = {
        name: weights(diffusion.train(diffusion_config(tmp_path / name, total_images=16, compile=name == "compiled")))
        for name in ("plain", "compiled")
    }
    for name, tensor in runs["plain"].items():
        torch.testing.assert_close(tensor, runs["compiled"][name], rtol=0, atol=1e-3)


def test_training_with_checkpointed_activations_goes_the_same_way(diffusion_config, tmp_path):
    runs = {
        name: weights(diffusion.train(diffusion_config(tmp_path / name, total_images=8, **settings)))
        for name, settings in (("plain", {}), ("checkpointed", {"gradient_checkpointing": True}))
    }
    assert runs["plain"].keys() == runs["checkpointed"].keys()
    for name, tensor in runs["plain"].items():
        torch.testing.assert_close(tensor, runs["checkpointed"][name], rtol=0, atol=1e-6)


def test_labels_are_those_of_the_images_and_some_are_replaced_by_the_null_class(diffusion_config, tmp_path, calls):
    config = diffusion_config(tmp_path, class_conditional=True, class_dropout=0.4, total_images=160)
    config = replace(config, preview_every_images=10**6)
    diffusion.train(config)
    stream = LatentStream(LatentCache(tmp_path / "latents"), load_autoencoder(config.autoencoder), config.seed)
    seen = torch.cat([labels for _, _, labels, _ in calls[:20]]).tolist()
    assert seen == [10 if stream[p][4] < 0.4 else stream[p][1] for p in range(160)]
    assert seen.count(10) == pytest.approx(64, abs=20)
    assert set(seen) == set(range(11))


@pytest.mark.parametrize(("class_dropout", "null_label", "labels"), [(0.1, 10, 11), (0.0, None, 10)])
def test_the_null_label_is_the_number_of_classes_and_there_is_none_without_dropout(
    diffusion_config, tmp_path, class_dropout, null_label, labels
):
    config = diffusion_config(tmp_path, class_conditional=True, class_dropout=class_dropout, total_images=8)
    pipe = LooCLDMPipeline.from_pretrained(diffusion.train(config))
    assert pipe.config.null_class_label == null_label
    assert pipe.unet.config.num_class_embeds == labels


def test_the_loss_falls_where_there_are_few_latents_to_learn(diffusion_config, garments, tmp_path):
    data = DataConfig(path=str(garments), validation_images=76, resolution=32, fit="pad", flip=False, num_workers=0)
    config = diffusion_config(tmp_path, data=data, total_images=1600, log_every_images=160, scheduler={"beta_end": 0.3})
    config = replace(config, preview_every_images=10**6, checkpoint_every_images=10**6)
    config.optimizer.learning_rate = 3e-3
    diffusion.train(config)
    losses = [line["loss"] for line in log_lines(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]


# The result ------------------------------------------------------------------------------------------------------


def test_the_pipeline_loads_knows_its_classes_and_draws(conditional_run, small_data, garments):
    pipe = LooCLDMPipeline.from_pretrained(conditional_run / "pipeline")
    assert list(pipe.config.id2label.values()) == sorted(folder.name for folder in garments.iterdir())
    draw = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    images = pipe(class_labels=["sandal", 9], generator=torch.Generator().manual_seed(0), **draw).images
    assert images.shape == (2, 1, 32, 32)
    assert images.isfinite().all()


def test_a_unet_that_attends_to_a_class_token_trains_loads_and_draws(diffusion_config, tmp_path, calls):
    config = diffusion_config(tmp_path, unet=ATTENDING_UNET, class_conditional=True, class_embedding_dim=8)
    pipe = LooCLDMPipeline.from_pretrained(diffusion.train(config))
    assert isinstance(pipe.unet, UNet2DConditionModel)
    assert pipe.class_embedding.embedding.weight.shape == (11, 8)
    live = load_file(tmp_path / "pipeline" / "class_embedding" / "diffusion_pytorch_model.non_ema.safetensors")
    assert not torch.equal(live["embedding.weight"], pipe.class_embedding.embedding.weight)
    noise = torch.randn(1, 4, 16, 16)
    draw = {"num_inference_steps": 2, "output_type": "latent", "latents": noise}
    assert not torch.equal(pipe(class_labels=0, **draw).images, pipe(class_labels=1, **draw).images)


def test_the_averaged_weights_have_the_plain_name_and_the_live_ones_the_variant(conditional_run):
    averaged = load_file(conditional_run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    live = load_file(conditional_run / "pipeline" / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    assert averaged.keys() == live.keys()
    assert any(not torch.equal(averaged[name], live[name]) for name in live)


def test_the_first_stage_in_the_pipeline_is_the_one_trained_on(conditional_run, autoencoder_run):
    ours = load_file(conditional_run / "pipeline" / "vqvae" / "diffusion_pytorch_model.safetensors")
    theirs = load_file(autoencoder_run / "model" / "diffusion_pytorch_model.safetensors")
    assert_equal_tensors(ours, theirs)
    described, first_stage = (
        json.loads(file.read_text())
        for file in (conditional_run / "pipeline" / "training.json", autoencoder_run / "model" / "training.json")
    )
    assert described["first_stage"] == first_stage["validation"]
    assert described["settings"]["autoencoder"] == str(autoencoder_run / "model")


def test_a_first_stage_without_scaling_factor_gets_the_measured_one(diffusion_config, autoencoder_run, tmp_path):
    autoencoder = tmp_path / "autoencoder"
    shutil.copytree(autoencoder_run / "model", autoencoder)
    config = json.loads((autoencoder / "config.json").read_text())
    (autoencoder / "config.json").write_text(json.dumps({**config, "scaling_factor": None}))
    folder = diffusion.train(diffusion_config(tmp_path / "run", autoencoder=str(autoencoder), total_images=8))
    measured = 1 / LatentCache(tmp_path / "run" / "latents").moments.standard_deviation
    assert LooCLDMPipeline.from_pretrained(folder).vqvae.config.scaling_factor == pytest.approx(measured)


def test_channels_are_whitened_on_demand_and_the_pipeline_knows(diffusion_config, tmp_path, calls):
    config = diffusion_config(tmp_path, latent_scaling="channel", total_images=8)
    pipe = LooCLDMPipeline.from_pretrained(diffusion.train(config))
    cache = LatentCache(tmp_path / "latents").moments
    assert pipe.vqvae.config.scaling_factor == 1
    assert pipe.vqvae.config.latents_mean == pytest.approx(cache.channel_mean)
    assert pipe.vqvae.config.latents_std == pytest.approx(cache.channel_std)


# Going on --------------------------------------------------------------------------------------------------------


def test_interrupted_and_resumed_is_uninterrupted(diffusion_config, tmp_path, monkeypatch):
    class PowerCut(Exception):
        pass

    def config(name):
        unet = {**ATTENDING_UNET, "dropout": 0.1}
        latents = str(tmp_path / "latents")
        return diffusion_config(
            tmp_path / name, unet=unet, class_conditional=True, class_embedding_dim=8, latents=latents, total_images=64
        )

    def stop_if_asked(run):
        if run.images_seen == 40:
            raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_if_asked", stop_if_asked)
        with pytest.raises(PowerCut):
            diffusion.train(config("interrupted"))
    assert_equal_tensors(*(weights(diffusion.train(config(name))) for name in ("interrupted", "whole")))
    assert [line["images"] for line in log_lines(tmp_path / "interrupted")] == list(range(8, 65, 8))


def test_a_finished_run_returns_at_once_and_changes_nothing(conditional_run, diffusion_config):
    before = contents(conditional_run)
    config = diffusion_config(conditional_run, class_conditional=True, class_dropout=0.5)
    assert diffusion.train(config) == conditional_run / "pipeline"
    assert contents(conditional_run) == before


def test_classes_that_the_data_does_not_have_are_refused(diffusion_config, garments, small_data, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted(garments.rglob("*.png"))):
        (flat / f"{i}.png").write_bytes(file.read_bytes())
    config = diffusion_config(tmp_path / "run", class_conditional=True, data=replace(small_data, path=str(flat)))
    with pytest.raises(ConfigError, match=r"class_conditional=true, but .*flat has no classes"):
        diffusion.train(config)
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_that_is_none_is_refused_in_one_line(
    diffusion_config, autoencoder_run, conditional_run, tmp_path
):
    (tmp_path / "empty").mkdir()
    shutil.copytree(autoencoder_run / "model", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "block_out_channels": [16, 16]}))
    for autoencoder, message in (
        (tmp_path / "other", "cannot load .*other'"),
        (tmp_path / "empty", "no model in .*empty"),
        (tmp_path / "nowhere", "no model .*nowhere'"),
        (conditional_run / "pipeline" / "unet", "holds a UNet2DModel, not a LooCVQModel"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            diffusion.train(diffusion_config(tmp_path / "run", autoencoder=str(autoencoder)))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unet": {"type": "DiT"}}, r"unet\.type must be one of UNet2DModel, .*, got 'DiT'"),
        ({"unet": {"layers_per_blok": 1}}, "unet has no argument 'layers_per_blok'; did you mean 'layers_per_block'"),
        ({"unet": ATTENDING_UNET}, "UNet2DConditionModel needs class_conditional and class_embedding_dim"),
        ({"scheduler": {"type": "Euler"}}, r"scheduler\.type must be the name of a diffusers scheduler, got 'Euler'"),
        ({"scheduler": {"type": "EDMEulerScheduler"}}, "EDMEulerScheduler"),
        ({"scheduler": {"rescale_betas_zero_snr": True}}, "needs scheduler.prediction_type=v_prediction or sample"),
        ({"scheduler": FLOW, "loss_weighting": "min_snr"}, "flow matching"),
        ({"unet": {**UNET, "sample_size": 8}}, r"unet\.sample_size is 8 in the config, but 16 by the data"),
        ({"unet": {**UNET, "in_channels": 3}}, r"unet\.in_channels is 3 in the config, but 4 by the data"),
        (
            {"unet": {**UNET, "num_class_embeds": 10}, "class_conditional": True},
            r"unet\.num_class_embeds is 10 in the config, but 11 by the data",
        ),
    ],
)
def test_networks_and_schedulers_that_do_not_exist_are_refused(diffusion_config, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        diffusion.train(diffusion_config(tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_nothing_is_clipped_unless_the_config_says_so():
    assert make_scheduler({}).config.clip_sample is False
    assert make_scheduler({"clip_sample": True}).config.clip_sample is True


def test_a_run_does_not_go_on_with_another_first_stage(diffusion_config, autoencoder_run, tmp_path):
    shutil.copytree(autoencoder_run / "model", tmp_path / "model")
    settings = {"autoencoder": str(tmp_path / "model"), "cache_latents": False}
    diffusion.train(diffusion_config(tmp_path / "run", total_images=16, **settings))
    shutil.rmtree(tmp_path / "run" / "pipeline")
    model = LooCVQModel.from_pretrained(tmp_path / "model")
    torch.nn.init.zeros_(model.encoder.conv_in.bias)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"a different autoencoder \(encoder weights\)"):
        diffusion.train(diffusion_config(tmp_path / "run", total_images=32, **settings))
