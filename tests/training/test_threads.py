"""The number of CPU threads of a run: measured without a trace, at the start and after a collapse, and kept."""

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from looc_ldm.training import autoencoder, diffusion, run
from tiny import assert_equal_tensors


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
    assert_equal_tensors(load_file(tmp_path / "measured" / weights), load_file(tmp_path / "plain" / weights))

    kept = []
    tries.clear()
    monkeypatch.setattr(run.SpeedWatch, "collapsed", lambda watch: False)
    monkeypatch.setattr(torch, "set_num_threads", kept.append)
    trainer.train(replace(measured, total_images=56))
    assert (tries, kept) == ([], [1])
    trainer.train(replace(measured, total_images=64, threads=3))
    assert (tries, kept) == ([], [1, 3])
    assert "OMP_NUM_THREADS" not in os.environ
