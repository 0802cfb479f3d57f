"""Which checkpoints are there, which one a run goes on from, and what it does with a damaged one."""

import contextlib
import json
import logging
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import tiny
from looc_ldm.training.checkpoints import checkpoints_in, images_of, read_state, write_state
from looc_ldm.training.ema import EMA
from looc_ldm.training.log import VOLATILE_KEYS
from looc_ldm.training.optimization import resolve_precision
from looc_ldm.training.run import Run
from looc_ldm.utils.errors import ConfigError, TrainingError

tiny_trainer = tiny.import_file(Path(__file__).with_name("tiny_trainer.py"))
config_of, train = tiny_trainer.config_of, tiny_trainer.train


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


log_lines = partial(tiny.log_lines, without=VOLATILE_KEYS)


def result(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model" / "weights.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of 128 images, with dropout. To be read only."""
    folder = tmp_path_factory.mktemp("whole")
    train(config_of(folder))
    return folder


@pytest.fixture
def half(tmp_path) -> Path:
    """A run of 72 images that has the checkpoints 24, 48 and 72, and is to have 128."""
    train(config_of(tmp_path, total_images=72, keep_last=3))
    shutil.rmtree(tmp_path / "model")
    return tmp_path


# Which are there -------------------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_one_more_each_so_many_images(tmp_path):
    train(config_of(tmp_path, total_images=192, keep_last=1, keep_every_images=72))
    assert names(tmp_path) == ["000000072", "000000144", "000000192"]


def test_with_batches_that_do_not_divide_the_interval_the_first_one_after_it_is_kept(tmp_path):
    train(config_of(tmp_path, total_images=96, keep_last=1, checkpoint_every_images=20, keep_every_images=40))
    assert names(tmp_path) == ["000000040", "000000080", "000000096"]


def test_the_newest_is_the_one_of_most_images_whatever_the_length_of_its_name(tmp_path):
    for images in (999_999_999, 1_000_000_000):
        (tmp_path / f"{images:09d}").mkdir()
    assert max(checkpoints_in(tmp_path), key=images_of).name == "1000000000"


def test_all_of_a_checkpoint_and_of_a_result_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, fsync, replace = set(), os.fsync, os.replace

    def recording(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checking(partial: Path, final: Path) -> None:
        assert {path.stat().st_ino for path in [Path(partial), *Path(partial).rglob("*")]} <= flushed, final
        replace(partial, final)

    monkeypatch.setattr(os, "fsync", recording)
    monkeypatch.setattr(os, "replace", checking)
    train(config_of(tmp_path, total_images=24))
    assert {(tmp_path / name).stat().st_ino for name in ("", "checkpoints")} <= flushed  # the names, too


def test_what_was_being_written_when_a_process_was_killed_is_removed_and_files_are_left_alone(half):
    shutil.copytree(half / "checkpoints" / "000000072", half / "checkpoints" / "000000080.partial")
    (half / "checkpoints" / "000000090").write_text("a note")
    (half / "checkpoints" / "my.partial").write_text("another")
    train(config_of(half, keep_last=3))
    assert names(half) == ["000000090", "000000096", "000000120", "000000128", "my.partial"]


# Which one a run goes on from ------------------------------------------------------------------------------------


def turn_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("model.safetensors", turn_a_bit, "model.safetensors is missing, or does not have the size and SHA-256"),
        ("optimizer.bin", Path.unlink, "optimizer.bin is missing"),
        ("random_states_0.pkl", lambda file: file.write_bytes(bytes(file.stat().st_size)), "random_states_0.pkl is"),
        ("run.json", Path.unlink, "run.json': No such file"),
        ("run.json", lambda file: file.write_text(file.read_text()[:-1]), "run.json' is not a JSON object"),
        ("run.json", lambda file: file.write_text(file.read_text().replace(": 0", ": 1", 1)), "run.json does not have"),
        ("run.json", lambda file: file.write_text('{"files": 3, "images_seen": "x"}'), "run.json does not have"),
        ("run.json", lambda file: file.write_text("[1]"), "run.json' is not a JSON object"),
    ],
)
def test_a_damaged_checkpoint_is_named_in_a_warning_and_the_run_goes_on_from_the_one_before(
    whole, half, caplog, name, damage, reason
):
    newest = half / "checkpoints" / "000000072"
    damage(newest / name)
    train(config_of(half, keep_last=1, total_images=56))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(f"checkpoint {newest} is damaged, an older one is looked for: ")
    assert reason in warning
    assert names(half) == ["000000056", "000000072"]  # it does not take the place of a good one
    train(config_of(half, keep_last=3))
    tiny.assert_equal_tensors(result(half), result(whole))
    assert log_lines(half) == log_lines(whole)


def test_without_any_usable_checkpoint_the_run_is_refused_and_nothing_is_touched(half):
    for checkpoint in checkpoints_in(half / "checkpoints"):
        turn_a_bit(checkpoint / "optimizer.bin")
    log = (half / "metrics.jsonl").read_text()
    with pytest.raises(TrainingError, match=r"^all checkpoints in '.*' are damaged: delete the folder to start"):
        train(config_of(half, keep_last=3))
    assert names(half) == ["000000024", "000000048", "000000072"]
    assert (half / "metrics.jsonl").read_text() == log


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
def test_no_code_of_a_checkpoint_is_executed(half, name):
    for checkpoint in checkpoints_in(half / "checkpoints"):
        state = read_state(checkpoint)
        torch.save(Harmful(half / "harm"), checkpoint / name)
        write_state(checkpoint, state)
    with contextlib.suppress(TrainingError):
        train(config_of(half, keep_last=3))
    assert not (half / "harm").exists()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_averaged_weights_are_saved_as_safetensors_and_loaded(tmp_path, layout):
    def run_with_average() -> tuple[Run, torch.nn.Module, EMA]:
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=layout)
        run, ema = Run(config_of(tmp_path), "model"), EMA(model, halflife_images=8)
        run.resume(ema=ema)
        return run, model, ema

    run, model, ema = run_with_average()
    torch.nn.init.ones_(model.weight)
    ema.update(model, images_seen=8, batch_size=8)
    run.after_step(finite=True)
    run.save_checkpoint()
    stored = load_file(tmp_path / "checkpoints" / "000000008" / "ema.safetensors")
    _, _, loaded = run_with_average()
    tiny.assert_equal_tensors(stored, ema.model.state_dict())
    tiny.assert_equal_tensors(loaded.model.state_dict(), ema.model.state_dict())


# Precision -------------------------------------------------------------------------------------------------------


@pytest.fixture
def restart():
    """`restart()`: what Accelerate keeps of the precision for as long as a process lives is forgotten."""
    restart = partial(AcceleratorState._reset_state, reset_partial_state=True)
    yield restart
    restart()


def test_another_precision_is_refused(half, restart):
    settings = (half / "config.yaml").read_text()
    restart()
    with pytest.raises(ConfigError, match=r"has mixed_precision=no, not bf16: resume as before"):
        train(config_of(half, keep_last=3, mixed_precision="bf16"))
    assert (half / "config.yaml").read_text() == settings
    assert names(half) == ["000000024", "000000048", "000000072"]
    restart()
    train(config_of(half, keep_last=3, mixed_precision="no"))
    assert log_lines(half)[-1]["images"] == 128


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "no")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="is for CPUs")
def test_auto_is_bf16_on_cpus_that_compute_in_it(supported, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    assert resolve_precision("auto") == expected


def test_what_auto_became_is_said_written_down_and_may_be_given_in_its_place(tmp_path, caplog, restart):
    restart()
    caplog.set_level(logging.INFO, "looc_ldm")
    became = resolve_precision("auto")
    train(config_of(tmp_path, total_images=24, mixed_precision="auto"))
    assert f"precision: {became}" in caplog.text
    assert json.loads((tmp_path / "checkpoints" / "000000024" / "run.json").read_text())["mixed_precision"] == became
    train(config_of(tmp_path, total_images=48, mixed_precision=became))
    assert log_lines(tmp_path)[-1]["images"] == 48


# The log ---------------------------------------------------------------------------------------------------------


def test_a_half_written_last_line_does_not_break_resuming(whole, half):
    with open(half / "metrics.jsonl", "a") as file:
        file.write('{"images": 80, "lo')
    train(config_of(half, keep_last=3))
    assert log_lines(half) == log_lines(whole)


def test_scalars_recorded_since_the_last_line_survive_a_checkpoint_between_two_lines(whole, half):
    # 24 and 72 lie between lines at 16, 32, 64 and 80.
    shutil.rmtree(half / "checkpoints" / "000000072")
    shutil.rmtree(half / "checkpoints" / "000000048")
    train(config_of(half, keep_last=3))
    assert log_lines(half) == log_lines(whole)
