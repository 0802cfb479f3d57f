"""Stage 1 end to end: what a run leaves behind, and that neither an interruption nor more processes change it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from looc_ldm import LooCVQModel
from looc_ldm.training import autoencoder
from looc_ldm.training.config import AutoencoderConfig, EvaluationConfig
from looc_ldm.training.config_parsing import load_config
from looc_ldm.training.data import float_batches, load_image_sets
from looc_ldm.training.log import VOLATILE_KEYS
from looc_ldm.training.losses import PatchDiscriminator
from looc_ldm.training.run import Run
from looc_ldm.training.run_folder import RunFolder
from looc_ldm.utils.errors import ConfigError
from tiny import contents, log_lines, sgd, weights

# A PatchGAN with few layers, whose start falls into the run.
ADVERSARIAL = {
    "adversarial_weight": 0.1,
    "adversarial_start_images": 16,
    "discriminator_channels": 8,
    "discriminator_layers": 1,
}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


class PowerCut(Exception):
    pass


@pytest.fixture
def cut_power_at(monkeypatch):
    """`cut_power_at(40)`: the next run ends in PowerCut after 40 images."""

    def at(images: int) -> None:
        def stop_if_asked(run):
            if run.images_seen == images:
                raise PowerCut

        monkeypatch.setattr(Run, "stop_if_asked", stop_if_asked)

    return at


# The result ------------------------------------------------------------------------------------------------------


def test_the_result_loads_with_a_measured_scaling_factor(autoencoder_run, small_data):
    model = LooCVQModel.from_pretrained(autoencoder_run / "model").eval()
    train, _ = load_image_sets(replace(small_data, flip=False), channels=1)
    with torch.no_grad():
        latents = torch.cat([model.encode(batch).latents for batch in float_batches(train)])
    assert model.config.scaling_factor == pytest.approx(1 / latents.std(correction=0).item(), rel=1e-3)
    assert model(train[0][0][None].float()).sample.shape == (1, 1, 32, 32)


def test_the_live_weights_are_the_variant_non_ema(autoencoder_run):
    averaged = LooCVQModel.from_pretrained(autoencoder_run / "model")
    live = LooCVQModel.from_pretrained(autoencoder_run / "model", variant="non_ema")
    assert not torch.equal(averaged.encoder.conv_in.weight, live.encoder.conv_in.weight)
    assert torch.equal(averaged.quantize.codebook, live.quantize.codebook)
    assert live.config.scaling_factor == averaged.config.scaling_factor


def test_a_run_leaves_previews_a_log_checkpoints_and_its_config(autoencoder_run, autoencoder_config):
    assert [file.name for file in sorted((autoencoder_run / "previews").iterdir())] == [
        "000000024.png",
        "000000048.png",
    ]
    with Image.open(autoencoder_run / "previews" / "000000048.png") as grid:
        # Eight originals, with the averaged weights, with the live ones; the caption below
        assert grid.width == 8 * 32
        caption = grid.crop((0, 3 * 32, *grid.size)).convert("L")
        assert caption.height > 10
        assert caption.getextrema() == (0, 255)
    lines = log_lines(autoencoder_run)
    assert [line["images"] for line in lines] == [8, 16, 24, 32, 40, 48]
    assert lines[-1]["loss_pixel"] < lines[0]["loss_pixel"]
    assert sorted(folder.name for folder in (autoencoder_run / "checkpoints").iterdir()) == ["000000024", "000000048"]
    assert list((autoencoder_run / "logs").glob("events.out.tfevents.*"))
    saved = load_config(AutoencoderConfig, str(autoencoder_run / "config.yaml"))
    assert saved == autoencoder_config(autoencoder_run, tracker="tensorboard")


def test_the_result_says_what_it_measured_and_after_how_many_images(autoencoder_run):
    description = json.loads((autoencoder_run / "model" / "training.json").read_text())
    assert description["images_seen"] == 48
    assert description["validation"]["psnr"] > 0
    assert description["validation"]["data"] == description["facts"]["data set"] == description["data"]["path"]
    assert description["settings"]["batch_size"] == description["facts"]["batch size"]
    assert description["data"]["fit"] == "pad"


def test_the_logged_loss_is_the_sum_of_its_weighted_terms(autoencoder_config, tmp_path):
    loss = {**ADVERSARIAL, "adversarial_start_images": 0, "reconstruction_weight": 2.0, "quantizer_weight": 0.5}
    autoencoder.train(autoencoder_config(tmp_path, loss=loss, total_images=8))
    (line,) = log_lines(tmp_path)
    expected = (
        2 * line["loss_pixel"] + 0.5 * line["loss_quantizer"] + line["adversarial_weight"] * line["loss_generator"]
    )
    assert line["loss"] == pytest.approx(expected, rel=1e-4)
    assert line["loss_discriminator"] == pytest.approx(1, abs=0.2)  # an untrained one tells nothing apart


@pytest.mark.parametrize(("share", "seen"), [(1.0, 8), (0.25, 2), (0.01, 1)])
def test_lpips_sees_its_share_of_each_batch(autoencoder_config, tmp_path, monkeypatch, share, seen):
    class Recording(torch.nn.Module):
        counts = []

        def forward(self, first, second, autocast=False):
            self.counts.append((len(first), len(second)))
            return (first - second).square().mean((1, 2, 3), keepdim=True)

    lpips = Recording()
    monkeypatch.setattr(autoencoder, "load_lpips", lambda network, weights: lpips)
    loss = {"lpips_weight": 1.0, "lpips_share": share}
    autoencoder.train(autoencoder_config(tmp_path, loss=loss, total_images=8, batch_size=8))
    assert Recording.counts[0] == (seen, seen)


def test_all_terms_together_on_the_bundled_images(test_data, autoencoder_config, bundled, tmp_path):
    lpips = {
        "lpips_weight": 1.0,
        "lpips_network": "alex",
        "lpips_weights": str(test_data / "metrics" / "alexnet_features_fp32.safetensors"),
    }
    data = replace(bundled[0].config, validation_images=16, num_workers=0)
    config = autoencoder_config(tmp_path, loss={**ADVERSARIAL, **lpips}, data=data)
    model = LooCVQModel.from_pretrained(autoencoder.train(config))
    assert model.config.scaling_factor > 0
    lines = log_lines(tmp_path)
    assert "loss_discriminator" not in lines[1]  # 16 images
    assert {"loss_lpips", "loss_generator", "loss_discriminator", "adversarial_weight"} <= lines[2].keys()
    assert all(line["loss_lpips"] > 0 for line in lines)


# Steps -----------------------------------------------------------------------------------------------------------


def checkpoint_of(folder: Path, images: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: networks, averages, and the moments of the optimizers."""
    place = folder / "checkpoints" / f"{images:09d}"
    tensors = {}
    for file in sorted(place.glob("*.safetensors")):
        tensors |= {f"{file.name}.{name}": tensor for name, tensor in load_file(file).items()}
    for file in sorted(place.glob("optimizer*.bin")):
        for index, state in torch.load(file)["state"].items():
            tensors |= {f"{file.name}.{index}.{name}": tensor for name, tensor in state.items()}
    return tensors


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("network", ["autoencoder", "discriminator"])
def test_a_step_whose_gradients_are_not_finite_changes_nothing_and_is_counted(
    autoencoder_config, tmp_path, monkeypatch, network, accumulation
):
    passes = []
    forward, judge = LooCVQModel.forward, PatchDiscriminator.forward

    def reconstruct(model, *arguments, **options):
        output = forward(model, *arguments, **options)
        if model.training:
            passes.append(None)
            if network == "autoencoder" and len(passes) == 3 * accumulation:  # the last pass of the third step
                output.sample = output.sample * torch.nan
        return output

    def not_finite(discriminator, images):
        bad = network == "discriminator" and len(passes) == 3 * accumulation
        return judge(discriminator, images) * (
            torch.nan if bad and next(discriminator.parameters()).requires_grad else 1
        )

    monkeypatch.setattr(LooCVQModel, "forward", reconstruct)
    monkeypatch.setattr(PatchDiscriminator, "forward", not_finite)
    monkeypatch.setattr(Run, "skipping", False)  # a checkpoint of that step, too
    config = autoencoder_config(
        tmp_path,
        loss={**ADVERSARIAL, "adversarial_start_images": 0},
        total_images=32,
        checkpoint_every_images=8,
        keep_last=9,
        gradient_accumulation_steps=accumulation,
    )
    autoencoder.train(replace(config, preview_every_images=10**6))
    assert [line["skipped_steps"] for line in log_lines(tmp_path)] == [0, 0, 1, 1]
    before, after, later = (checkpoint_of(tmp_path, images) for images in (16, 24, 32))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if network == "autoencoder":
        assert not changed
    else:  # the autoencoder did step; the discriminator, its moments did not
        assert {name.split(".")[0] for name in changed} == {"model", "optimizer", "ema"}
    moved = {name.rsplit(".", 1)[0].split(".")[0] for name in after if not torch.equal(after[name], later[name])}
    assert moved == {"model", "model_1", "optimizer", "optimizer_1", "ema"}


def test_a_skipped_step_has_neither_a_checkpoint_nor_a_grid(autoencoder_config, tmp_path, monkeypatch):
    after_step = Run.after_step
    monkeypatch.setattr(Run, "after_step", lambda run, finite: after_step(run, finite and run.images_seen != 16))
    intervals = {"checkpoint_every_images": 8, "preview_every_images": 8, "keep_last": 9}
    autoencoder.train(autoencoder_config(tmp_path, total_images=32, **intervals))
    for folder in ("checkpoints", "previews"):
        names = sorted(path.stem for path in (tmp_path / folder).iterdir())
        assert names == ["000000008", "000000016", "000000032"]


def test_the_patchgan_starts_when_it_should_and_follows_the_learning_rate(autoencoder_config, tmp_path):
    loss = {**ADVERSARIAL, "adversarial_start_images": 8, "adaptive_weight": False}
    config = autoencoder_config(tmp_path, loss=loss, checkpoint_every_images=8, keep_last=9)
    config = replace(config, optimizer=replace(config.optimizer, warmup_images=64), preview_every_images=10**6)
    autoencoder.train(config)
    lines = log_lines(tmp_path)
    assert "adversarial_weight" not in lines[0]
    assert [line["adversarial_weight"] for line in lines[1:]] == pytest.approx([0.1] * 5)
    for file in ("optimizer.bin", "optimizer_1.bin"):
        state = torch.load(tmp_path / "checkpoints" / "000000048" / file)
        assert state["param_groups"][0]["lr"] == pytest.approx(2e-3 * 41 / 64)  # the rate of the step after 40 images


def test_measuring_while_it_runs_changes_nothing(autoencoder_config, tmp_path):
    measured = EvaluationConfig(every_images=16, images=8)
    with_it = autoencoder.train(autoencoder_config(tmp_path / "measured", evaluation=measured))
    without = autoencoder.train(autoencoder_config(tmp_path / "plain"))
    assert largest_difference(weights(with_it), weights(without)) == 0
    lines = [line for line in log_lines(tmp_path / "measured") if "val_psnr" in line]
    assert [line["images"] for line in lines] == [16, 32, 48]
    assert all(line["val_images"] == 8 and line["val_bits_per_pixel"] > 0 for line in lines)


@pytest.mark.slow
def test_compiled_training_goes_the_same_way_past_the_start_of_the_patchgan(autoencoder_config, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", wraps_compile(compiled))
    # Straight through: with turned gradients a near-tie of two codevectors parts weights further, see test_divided.py.
    # Of one step, tests/test_compile_and_export.py shows that compiled turned gradients are the eager ones.
    same = {"loss": ADVERSARIAL, "model": {"gradient": "straight-through"}, "total_images": 32}
    runs = {
        name: weights(autoencoder.train(autoencoder_config(tmp_path / name, **same, compile=name == "compiled")))
        for name in ("plain", "compiled")
    }
    assert compiled == ["LooCVQModel"]
    assert largest_difference(runs["plain"], runs["compiled"]) < 1e-3


def wraps_compile(compiled: list[str]):
    """`Module.compile`, which writes down what it compiled."""
    compile = torch.nn.Module.compile

    def recording(module, *arguments, **options):
        compiled.append(type(module).__name__)
        compile(module, *arguments, **options)

    return recording


# Going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ["closest", "random"])
def test_interrupted_and_resumed_is_uninterrupted(autoencoder_config, tmp_path, cut_power_at, monkeypatch, anchor):
    def config(name):
        model = {"anchor": anchor}
        return autoencoder_config(tmp_path / name, model, ADVERSARIAL, total_images=64, gradient_accumulation_steps=2)

    with monkeypatch.context():
        cut_power_at(40)
        with pytest.raises(PowerCut):
            autoencoder.train(config("interrupted"))
    monkeypatch.undo()
    assert [line["images"] for line in log_lines(tmp_path / "interrupted")] == [8, 16, 24, 32, 40]
    resumed, whole = (weights(autoencoder.train(config(name))) for name in ("interrupted", "whole"))
    assert largest_difference(resumed, whole) == 0
    logs = [log_lines(tmp_path / name, without=VOLATILE_KEYS) for name in ("interrupted", "whole")]
    assert logs[0] == logs[1]  # lines written after the checkpoint are there once


def test_more_images_than_at_first_give_the_run_of_that_length(autoencoder_config, tmp_path):
    autoencoder.train(autoencoder_config(tmp_path / "longer", total_images=24))
    longer = weights(autoencoder.train(autoencoder_config(tmp_path / "longer")))
    assert largest_difference(longer, weights(autoencoder.train(autoencoder_config(tmp_path / "whole")))) == 0


def test_a_finished_run_returns_at_once_and_changes_nothing(autoencoder_run, autoencoder_config):
    before = contents(autoencoder_run)
    config = autoencoder_config(autoencoder_run, tracker="tensorboard")
    assert autoencoder.train(config) == autoencoder_run / "model"
    assert contents(autoencoder_run) == before


def test_a_changed_config_is_refused_with_the_difference_and_overwrites_nothing(autoencoder_run, autoencoder_config):
    before = contents(autoencoder_run)
    with pytest.raises(
        ConfigError, match=r"other settings \(seed: 0 -> 7; model.anchor: None -> 'none'\).*--init-from"
    ):
        autoencoder.train(autoencoder_config(autoencoder_run, model={"anchor": "none"}, seed=7))
    assert contents(autoencoder_run) == before


def test_a_result_of_fewer_images_is_not_taken_for_the_finished_run(
    autoencoder_config, tmp_path, cut_power_at, monkeypatch
):
    autoencoder.train(autoencoder_config(tmp_path, total_images=24))
    monkeypatch.setattr(RunFolder, "writing_result", lambda folder: (_ for _ in ()).throw(PowerCut))
    with pytest.raises(PowerCut):
        autoencoder.train(autoencoder_config(tmp_path, preview_every_images=10**6))
    assert (tmp_path / "previews" / "000000048.png").is_file()  # the last grid comes before the result
    monkeypatch.undo()
    autoencoder.train(autoencoder_config(tmp_path))
    assert json.loads((tmp_path / "model" / "training.json").read_text())["images_seen"] == 48


def test_a_resolution_that_does_not_divide_is_refused_before_anything_is_written(
    autoencoder_config, small_data, tmp_path
):
    with pytest.raises(ConfigError, match=r"data\.resolution must be a multiple of 2, .* got 31"):
        autoencoder.train(autoencoder_config(tmp_path / "run", data=replace(small_data, resolution=31)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("loss", [{}, {**ADVERSARIAL, "adversarial_start_images": 0, "adaptive_weight": False}])
def test_two_accumulated_halves_are_the_whole_batch(autoencoder_config, tmp_path, monkeypatch, loss):
    monkeypatch.setattr(autoencoder, "adamw", sgd)
    start, whole, halves = (
        weights(
            autoencoder.train(
                autoencoder_config(
                    tmp_path / str(i),
                    {"anchor": "none"},
                    loss,
                    total_images=16,
                    batch_size=16,
                    gradient_accumulation_steps=accumulation,
                    optimizer=replace(autoencoder_config(tmp_path).optimizer, learning_rate=rate),
                )
            )
        )
        for i, (accumulation, rate) in enumerate([(1, 0.0), (1, 0.1), (2, 0.1)])
    )
    assert largest_difference(start, whole) > 1e-3
    assert largest_difference(whole, halves) < 1e-6


def test_a_run_does_not_go_on_with_other_data(autoencoder_config, garments, tmp_path, caplog):
    folder = tmp_path / "garments"
    shutil.copytree(garments, folder)
    config = autoencoder_config(tmp_path / "run", total_images=16)
    config = replace(config, data=replace(config.data, path=str(folder)))
    autoencoder.train(config)
    first, second, *_ = sorted(folder.rglob("*.png"))[1:]  # the first one is held out
    second.write_bytes(first.read_bytes())  # a file that was repaired is no other data
    autoencoder.train(replace(config, total_images=32))
    assert "some training images are not what they were" in caplog.text
    (folder / first.parent.name / "more.png").write_bytes(first.read_bytes())
    with pytest.raises(
        ConfigError, match=r"different data set \(labels, number of images: 64 -> 65\): bring that back"
    ):
        autoencoder.train(replace(config, total_images=48))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "000000032"


def test_an_image_grid_is_there_within_a_minute_whatever_the_interval(autoencoder_config, tmp_path, monkeypatch):
    monkeypatch.setattr("looc_ldm.training.log.FIRST_PREVIEW_SECONDS", 0)
    autoencoder.train(autoencoder_config(tmp_path, preview_every_images=1000))
    grids = sorted(file.name for file in (tmp_path / "previews").iterdir())
    assert grids == ["000000008.png", "000000048.png"]  # after the first step, and at the end
