"""Devices and engines: what works, and one line for the rest."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from looc_ldm.utils import distributed
from looc_ldm.utils.devices import choose_device
from looc_ldm.utils.errors import ConfigError, UserError
from tiny import refusal


def test_a_device_that_there_is():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None) == (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))


@pytest.mark.parametrize("name", ["meta", "hpu", "nonsense", "cuda:1000", ""])
def test_a_device_that_nothing_can_be_computed_on_is_one_line(name):
    with pytest.raises(UserError, match=f"--device {name}: ") as caught:
        choose_device(name)
    assert len(str(caught.value).splitlines()) == 1


def test_an_engine_is_accepted_or_refused_in_one_line_that_names_those_that_work(monkeypatch):
    started = SimpleNamespace(num_processes=1)
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: started)
    for started.distributed_type in distributed.ENGINES:
        assert distributed.make_accelerator("cpu") is started
    started.distributed_type = DistributedType.XLA
    with pytest.raises(ConfigError, match="selects the engine XLA, but this command runs on one process, or with"):
        distributed.make_accelerator("cpu")


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "reconstruction", "fashion_mnist", "--data", "fashion_mnist"],
        ["evaluate", "generation", "fashion_mnist", "--data", "fashion_mnist", "--inception-weights", "WEIGHTS"],
        ["cache-latents", "--config", "starter/diffusion", "--autoencoder", "fashion_mnist"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.usefixtures("in_an_empty_folder")
def test_an_engine_that_is_not_installed_is_one_line(command, monkeypatch, capsys, untrained_inception):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    command = [str(untrained_inception) if part == "WEIGHTS" else part for part in command]
    assert "the engine in Accelerate's config or environment cannot be started: " in refusal(capsys, *command)
