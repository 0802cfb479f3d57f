"""The number of CPU threads of a run: measured without a trace, at the start and after a collapse, and kept."""

import os
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from looc_ldm.training import autoencoder, diffusion, run


@pytest.fixture
def stages(autoencoder_config, diffusion_config):
    return {"autoencoder": (autoencoder, autoencoder_config), "diffusion": (diffusion, diffusion_config)}


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_measuring_threads_changes_no_weight_and_a_run_keeps_its_number(stages, stage, tmp_path, monkeypatch):
    trainer, config_of = stages[stage]
    plain, measured = config_of(tmp_path / "plain"), config_of(tmp_path / "measured")
    trainer.train(plain)
    weights = "checkpoints/000000048/model.safetensors"
    monkeypatch.delenv("OMP_NUM_THREADS")
    tries = []

    def use_fastest_threads(trial):
        trial()
        tries.append(trial)

    monkeypatch.setattr(run, "use_fastest_threads", use_fastest_threads)
    monkeypatch.setattr(run.SpeedWatch, "collapsed", lambda watch: True)
    trainer.train(measured)
    assert len(tries) == 1 + measured.total_images // measured.batch_size
    before, after = load_file(tmp_path / "plain" / weights), load_file(tmp_path / "measured" / weights)
    assert all(torch.equal(before[name], after[name]) for name in before)

    kept = []
    tries.clear()
    monkeypatch.setattr(run.SpeedWatch, "collapsed", lambda watch: False)
    monkeypatch.setattr(torch, "set_num_threads", kept.append)
    trainer.train(replace(measured, total_images=56))
    assert (tries, kept) == ([], [1])
    trainer.train(replace(measured, total_images=64, threads=3))
    assert (tries, kept) == ([], [1, 3])
    assert "OMP_NUM_THREADS" not in os.environ


def test_image_grids_do_not_count_as_slow_steps(autoencoder_config, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(run, "use_fastest_threads", lambda trial: None)
    draw, counted, passed = autoencoder.reconstruction_grid, [], []

    def slow_grid(*arguments):
        time.sleep(0.5)
        return draw(*arguments)

    class Watch(run.SpeedWatch):
        def collapsed(self):
            counted.append(self._clock())
            passed.append(time.monotonic())
            return False

    monkeypatch.setattr(autoencoder, "reconstruction_grid", slow_grid)
    monkeypatch.setattr(run, "SpeedWatch", Watch)
    autoencoder.train(autoencoder_config(tmp_path, total_images=24, preview_every_images=8))
    assert (passed[-1] - passed[0]) - (counted[-1] - counted[0]) >= 2 * 0.5
