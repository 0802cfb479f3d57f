"""The log of a run, when it skips a step or stops, and which images it names as unreadable."""

import logging
import math
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from looc_ldm.training import log
from looc_ldm.training.config import LossConfig
from looc_ldm.training.optimization import clip_gradients
from looc_ldm.training.run import Run
from looc_ldm.utils.errors import ConfigError, Terminated, TrainingError, UserError
from tiny import assert_equal_tensors, import_file, log_lines

tiny_trainer = import_file(Path(__file__).with_name("tiny_trainer.py"))
Numbers, config_of, train = tiny_trainer.Numbers, tiny_trainer.config_of, tiny_trainer.train


# Sees all 64 images; 128 steps without checkpoints between.
LONG = {"total_images": 1024, "log_every_images": 64, "checkpoint_every_images": 1024}


def not_finite_in(steps: range):
    """Losses that are not finite in these steps, counted from 0."""
    return lambda run, loss: loss * math.nan if run.images_seen // 8 in steps else loss


@pytest.fixture
def let_pass(monkeypatch):
    """`let_pass(seconds)` moves the clock of the log, which stands still otherwise."""
    now = [1000.0]
    monkeypatch.setattr("looc_ldm.training.log.time.monotonic", lambda: now[0])

    def let_pass(seconds: float) -> None:
        now[0] += seconds

    return let_pass


# Log lines -------------------------------------------------------------------------------------------------------


def test_a_log_interval_is_one_line_of_json(tmp_path):
    train(config_of(tmp_path, total_images=48))
    lines = log_lines(tmp_path)
    assert [line["images"] for line in lines] == [16, 32, 48]
    for line in lines:
        assert line["images_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert 0.05 < line["memory_gib"] < 50
        assert line["learning_rate"] == 1e-2
        assert line["skipped_steps"] == 0
        assert line["loss"] > 0
        assert line["grad_norm"] > 0


@pytest.mark.parametrize("end", [128, 129])
def test_settings_that_would_take_effect_after_the_end_are_named_in_a_warning(end, tmp_path, caplog):
    settings = {
        "optimizer": {"warmup_images": 128},
        "loss": LossConfig(adversarial_weight=1, adversarial_start_images=128),
    }
    Run(config_of(tmp_path, total_images=end, **settings), "model").resume()
    warned = (
        "optimizer.warmup_images=128 and loss.adversarial_start_images=128: the run ends before, at total_images=128"
    )
    assert (warned in caplog.text) == (end == 128)


def test_people_read_by_the_clock_how_far_a_run_is_its_speed_and_the_time_left(tmp_path, caplog, monkeypatch, let_pass):
    """Here every second, for steps of 0.25 s: 8 images per step, 128 in all. The slow first step does not count."""
    monkeypatch.setattr("looc_ldm.training.log.FIRST_PROGRESS_SECONDS", 1)
    monkeypatch.setattr("looc_ldm.training.log.PROGRESS_SECONDS", 1)

    def wait(run, loss):
        let_pass(0.25 if run.images_seen else 5)
        return loss

    with caplog.at_level(logging.INFO, "looc_ldm"):
        train(config_of(tmp_path), at_step=wait)
    first, *said = [record.getMessage() for record in caplog.records]
    assert first.startswith("a new run, processes: 1, cpu")
    loss = log_lines(tmp_path)[1]["loss"]
    assert said[0].startswith(f"40/128 images, 32 images/s, 0.0 min left, loss {loss:.4g}")
    assert [line.split("/")[0] for line in said] == ["40", "72", "104"]


def test_the_logged_loss_is_the_mean_since_the_last_line(tmp_path):
    losses = []

    def keep(run, loss):
        losses.append(loss.item())
        return loss

    train(config_of(tmp_path, total_images=48, gradient_accumulation_steps=2), at_step=keep)
    assert len(losses) == 12
    for place, line in enumerate(log_lines(tmp_path)):
        assert line["loss"] == pytest.approx(sum(losses[4 * place : 4 * place + 4]) / 4, rel=1e-6)


def test_data_wait_is_the_share_of_time_that_the_loop_waits_for_data(tmp_path, let_pass):
    class Slow(Numbers):
        def __getitem__(self, position):
            let_pass(0.01)
            return super().__getitem__(position)

    def busy(run, loss):
        let_pass(0.08)  # as long as the eight images take
        return loss

    train(config_of(tmp_path, total_images=32), Slow(), busy)
    assert log_lines(tmp_path)[-1]["data_wait"] == pytest.approx(0.5)


def test_speed_is_that_of_training_without_evaluations_and_checkpoints(tmp_path, let_pass):
    def step(run, loss):
        let_pass(0.02)
        if run.images_seen in (64, 72):
            with run.log.pause_timer():
                let_pass(0.5)
        if run.images_seen == 96:
            run.accelerator.register_save_state_pre_hook(lambda *arguments: let_pass(0.5))
        return loss

    intervals = {"log_every_images": 64, "checkpoint_every_images": 160}
    train(config_of(tmp_path, total_images=256, **intervals), at_step=step)
    _, evaluated, saved_after, saved = log_lines(tmp_path)
    assert [line["other_seconds"] for line in (evaluated, saved_after, saved)] == pytest.approx([1.0, 0.5, 0.0])
    for line in (evaluated, saved_after, saved):
        assert line["images_per_second"] == pytest.approx(400)


def test_the_first_step_is_left_out_of_speed_where_there_is_another(tmp_path, let_pass):
    def compiling(run, loss):
        let_pass(0.02 if run.images_seen else 1.0)
        return loss

    for interval, speed in ((8, 8), (32, 400)):
        folder = tmp_path / str(interval)
        train(config_of(folder, total_images=64, log_every_images=interval), at_step=compiling)
        line = log_lines(folder)[0]
        assert line["images_per_second"] == pytest.approx(speed)
    assert line["other_seconds"] == pytest.approx(1.0)


def test_figures_of_an_evaluation_get_their_prefix_and_no_place_if_they_are_not_finite(tmp_path):
    def evaluate(run, loss):
        if run.images_seen == 8:
            run.log.write_evaluation(8, {"psnr": 20.5, "fid": math.nan, "protocol": "clean"})
        return loss

    train(config_of(tmp_path, total_images=16), at_step=evaluate)
    assert log_lines(tmp_path)[0] == {"images": 8, "val_psnr": 20.5, "val_protocol": "clean"}


# Steps that are not finite ---------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    train(config_of(tmp_path, total_images=96), at_step=not_finite_in(range(3, 12)))
    assert [line["skipped_steps"] for line in log_lines(tmp_path)] == [0, 1, 3, 5, 7, 9]
    checkpoint = load_file(tmp_path / "checkpoints" / "000000024" / "model.safetensors")
    assert_equal_tensors(torch.load(tmp_path / "model" / "weights.pt"), checkpoint)


def test_values_that_are_not_finite_are_left_out_of_the_means_and_the_log_stays_json(tmp_path):
    clean, torn = tmp_path / "clean", tmp_path / "torn"
    train(config_of(clean, total_images=16))
    train(config_of(torn, total_images=48), at_step=not_finite_in(range(1, 4)))
    first, second, third = log_lines(torn)
    assert first["loss"] != pytest.approx(log_lines(clean)[0]["loss"])  # which holds the second step, too
    assert math.isfinite(first["loss"])
    assert "loss" not in second
    assert "grad_norm" not in second
    assert "loss" in third
    assert "NaN" not in (torn / "metrics.jsonl").read_text()


def test_more_steps_in_a_row_than_allowed_stop_the_run_with_what_was_not_finite_and_the_good_checkpoint(tmp_path):
    message = r"3 steps in a row, up to step 7 \(48 images seen\), .*: loss, grad_norm; the last good checkpoint: 24"
    with pytest.raises(TrainingError, match=message):
        train(config_of(tmp_path, max_skipped_steps=2, keep_last=1), at_step=not_finite_in(range(4, 99)))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000024"]  # none of the skipped steps


def test_a_run_that_is_stopped_while_steps_are_skipped_says_from_which_checkpoint_it_goes_on(tmp_path):
    def skip_and_stop(run, loss):
        if run.images_seen == 40:
            signal.raise_signal(signal.SIGTERM)
        return loss * math.nan if run.images_seen >= 32 else loss

    with pytest.raises(Terminated, match=r"stopped at 48 images; .* again to resume from checkpoint 24"):
        train(config_of(tmp_path), at_step=skip_and_stop)
    run = train(config_of(tmp_path))
    assert (run.images_seen, run.skipped_steps) == (128, 0)


def test_so_many_steps_in_a_row_as_allowed_and_a_good_one_between_go_on(tmp_path):
    def every_third_is_good(run, loss):
        return loss * math.nan if run.images_seen // 8 % 3 else loss

    run = train(config_of(tmp_path, max_skipped_steps=2), at_step=every_third_is_good)
    assert run.skipped_steps == 10


def test_gradients_are_clipped_and_the_norm_before_is_returned():
    model = torch.nn.Linear(2, 1, bias=False)
    for max_norm, expected in ((1.0, [0.6, 0.8]), (0.0, [3.0, 4.0]), (9.0, [3.0, 4.0])):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clip_gradients(Accelerator(cpu=True), model, max_norm) == pytest.approx(5.0)
        assert model.weight.grad[0].tolist() == pytest.approx(expected, rel=1e-5)
        if max_norm != 1.0:
            assert model.weight.grad[0].tolist() == expected  # to the last bit


# Images that cannot be read --------------------------------------------------------------------------------------


def test_of_a_small_set_one_image_may_be_unreadable_and_is_named_once(tmp_path, caplog):
    train(config_of(tmp_path, **LONG, share=0.001), Numbers(unreadable=[7]))
    assert [line for line in caplog.messages if "image 7" in line] == [
        "image 7; the next readable image takes its place"
    ]
    with pytest.raises(TrainingError, match=r"1 of 64 images cannot be read, more than data\.max_unreadable_share=0"):
        train(config_of(tmp_path / "none", **LONG, share=0.0), Numbers(unreadable=[7]))


def test_more_unreadable_images_than_allowed_stop_the_run_after_it_was_saved(tmp_path):
    bad = Numbers(unreadable=range(10))
    config = config_of(tmp_path / "run", **LONG, share=0.1)
    message = r"\d+ of \d+ images cannot be read, .*share=0.1 allows; the warnings in the log name them"
    with pytest.raises(TrainingError, match=message):
        train(config, bad)
    newest = max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert int(newest) == log_lines(tmp_path / "run")[-1]["images"] == 64
    with pytest.raises(TrainingError, match=message):  # the same command goes on and stops again
        train(config, bad)
    run = train(config_of(tmp_path / "run", **LONG, share=0.2), bad)  # with a higher limit it goes on to the end
    assert run.images_seen == 1024


def test_streamed_data_is_judged_by_what_was_seen_of_it(tmp_path):
    ten_percent = Numbers(unreadable=range(6), streamed=True)
    train(config_of(tmp_path / "few", total_images=64, share=0.01), ten_percent)  # ten times say nothing yet
    train(config_of(tmp_path / "allowed", **LONG, share=0.2), ten_percent)
    with pytest.raises(TrainingError, match=r"\d\d of \d+ images cannot be read"):
        train(config_of(tmp_path / "many", **LONG, share=0.01), ten_percent)


def test_the_checkpoint_holds_where_each_lane_goes_on(tmp_path):
    train(config_of(tmp_path, total_images=48))
    run = Run(config_of(tmp_path, total_images=48), "model")
    run.resume()
    assert run.cursors == {0: (0, 0, 0, 31), 1: (1, 0, 0, 39), 2: (2, 0, 0, 47)}


# Length and schedule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_another_length_of_a_cosine_schedule_is_said(tmp_path, caplog, schedule):
    optimizer = {"schedule": schedule}
    train(config_of(tmp_path, total_images=48, optimizer=optimizer))
    train(config_of(tmp_path, total_images=96, optimizer=optimizer))
    assert ("total_images was 48 and is 96" in caplog.text) == (schedule == "cosine")


def test_a_run_whose_data_has_moved_goes_on_and_one_with_another_split_does_not(tmp_path):
    config = config_of(tmp_path, total_images=24)
    train(config)
    there = replace(config, total_images=48, data=replace(config.data, path="/another/disk"))
    assert train(there).images_seen == 48
    with pytest.raises(ConfigError, match=r"data\.split: 'train' -> 'validation'"):
        train(replace(there, data=replace(there.data, split="validation")))


def test_a_run_with_withdrawn_settings_goes_on_if_they_are_at_their_defaults(tmp_path):
    config = config_of(tmp_path, total_images=24)
    train(config)
    file = tmp_path / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["loss"] |= {"lecam_weight": 0.0, "adversarial_ramp_images": 0}
    file.write_text(yaml.safe_dump(settings))
    assert train(replace(config, total_images=48)).images_seen == 48
    settings["loss"]["lecam_weight"] = 0.1
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match=r"loss\.lecam_weight=0\.1 was withdrawn; only 0\.0 is accepted"):
        train(replace(config, total_images=72))


# The folder ------------------------------------------------------------------------------------------------------


def test_one_process_of_several_that_knows_no_other_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):  # as a PyTorchJob sets them
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ConfigError, match="WORLD_SIZE=2, but this process is alone, because LOCAL_RANK is not set"):
        Run(config_of(tmp_path / "run"), "model")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["checkpoints", "previews", "model"])
def test_a_file_where_a_folder_has_to_be_is_refused_at_the_start(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=f"cannot write to '.*{name}': '.*{name}' is not a folder"):
        train(config_of(tmp_path))


@pytest.mark.parametrize("content", [b"", b"seed: [1", b"seed", b"\0\0\0\0", b"seed: \xff"])
def test_damaged_settings_of_a_run_are_an_error_that_names_the_file(tmp_path, content):
    train(config_of(tmp_path, total_images=24))
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"the config '.*config\.yaml'"):
        train(config_of(tmp_path))


@pytest.mark.parametrize("content", ["", '{"images_seen": 24', "[]", "{}", '{"images_seen": "x"}'])
def test_a_damaged_result_is_an_error_that_names_the_file_and_not_a_finished_run(tmp_path, content):
    train(config_of(tmp_path, total_images=24))
    (tmp_path / "model" / "training.json").write_text(content)
    with pytest.raises(UserError, match=r"'.*model/training\.json' is "):
        _ = Run(config_of(tmp_path, total_images=24), "model").folder.finished


def test_work_besides_training_says_every_30_seconds_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr(log, "PROGRESS_SECONDS", 0.05)
    with caplog.at_level("INFO", "looc_ldm"):
        assert list(log.progress((time.sleep(0.02) for _ in range(8)), "encoding latents")) == [None] * 8
    lines = [record.getMessage() for record in caplog.records]
    assert 1 <= len(lines) < 8
    assert all(line.startswith("encoding latents: ") and line.endswith(" left") for line in lines)
