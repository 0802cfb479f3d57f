"""Which of Accelerate's engines train, and that the config decides rather than Accelerate's environment variables."""

from pathlib import Path

import accelerate
import pytest
from accelerate.utils import DistributedType

from looc_ldm.training.config import DiffusionConfig
from looc_ldm.training.run import Run
from looc_ldm.utils.errors import ConfigError
from tiny import import_file

tiny_trainer = import_file(Path(__file__).with_name("tiny_trainer.py"))
config_of, train = tiny_trainer.config_of, tiny_trainer.train


def stage_2(folder):
    return DiffusionConfig(str(folder), tracker="none", mixed_precision="no")


@pytest.mark.parametrize(
    ("make_config", "engine", "trains"),
    [
        *((make_config, engine, True) for make_config in (config_of, stage_2) for engine in ("NO", "MULTI_GPU")),
        (stage_2, "FSDP", True),
        (config_of, "FSDP", False),
        (stage_2, "XLA", False),
    ],
)
def test_other_engines_are_refused_in_one_sentence_before_anything_is_written(
    tmp_path, monkeypatch, make_config, engine, trains
):
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", DistributedType(engine))
    monkeypatch.setattr(accelerate.Accelerator, "is_fsdp2", True)
    if trains:
        Run(make_config(tmp_path / "run"), "result")
        return
    with pytest.raises(
        ConfigError, match=f"selects the engine {engine}, but .* one process or DDP on CPUs or GPUs"
    ) as caught:
        Run(make_config(tmp_path / "run"), "result")
    assert ("FSDP 2" in str(caught.value)) == (make_config is stage_2)
    assert not (tmp_path / "run").exists()


def test_an_engine_that_accelerate_cannot_import_is_refused_as_well(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="selects the engine DEEPSPEED, "):
        Run(stage_2(tmp_path / "run"), "result")
    assert not (tmp_path / "run").exists()


def test_the_first_version_of_fsdp_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(accelerate.Accelerator, "is_fsdp2", False)
    with pytest.raises(ConfigError, match=r"FSDP with fsdp_version 1, but .* or with FSDP 2"):
        Run(stage_2(tmp_path / "run"), "result")


def test_settings_win_over_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    seen = []
    train(config_of(tmp_path, gradient_accumulation_steps=2), at_step=lambda run, loss: seen.append(run) or loss)
    assert len(seen) == 2 * 16
    assert seen[-1].accelerator.state.dynamo_plugin.backend == "NO"
    assert seen[-1].accelerator.mixed_precision == "no"
