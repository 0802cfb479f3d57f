"""Start several processes, run code on the main one, and stop all together, so that none waits for one that has ended.

Functions marked *collective* must be called by every process.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list
from safetensors import SafetensorError

from looc_ldm.utils.devices import choose_device
from looc_ldm.utils.errors import ConfigError, TrainingError, UserError, one_line

T = TypeVar("T")

# Engines that commands outside of training run with: they compute on each process by itself.
ENGINES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
WAIT = timedelta(hours=2)  # limit of waiting for a process that evaluates or writes
# torch.save reports what the disk refuses as a RuntimeError with one of these in it.
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos", "iostream")


def make_accelerator(name: str | None) -> Accelerator:
    """Return the `Accelerator` for one or several processes.

    Args:
        name: One process: a device, as in `choose_device`. Several processes: "cpu", or None for one GPU per process.

    Raises:
        UserError: There is no such device, a GPU was named for several processes, or Accelerate cannot start the engine
            that its config or environment selects.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if name not in (None, "cpu"):
            raise UserError(f"--device {name}: several processes take one GPU each; only --device cpu may be given.")
        on_cpu = name == "cpu"
    else:
        device = choose_device(name)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)
        on_cpu = device.type == "cpu"
    try:
        accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)])
    except Exception as error:  # each engine raises its own error if its package is not installed
        raise ConfigError(
            f"the engine in Accelerate's config or environment cannot be started: {one_line(error)}"
        ) from error
    if accelerator.distributed_type not in ENGINES:
        raise ConfigError(
            f"Accelerate's config or environment selects the engine {accelerator.distributed_type.value}, but this "
            f"command runs on one process, or with {', '.join(engine.value for engine in ENGINES[1:])}."
        )
    refuse_lone_process(accelerator)
    return accelerator


def refuse_lone_process(accelerator: Accelerator) -> None:
    """Raise ConfigError if WORLD_SIZE is greater than 1, but this process is not connected to others."""
    count = os.environ.get("WORLD_SIZE", "1")
    if accelerator.num_processes == 1 and count != "1":
        raise ConfigError(
            f"WORLD_SIZE={count}, but this process is alone, because LOCAL_RANK is not set: start the processes with "
            "torchrun or accelerate launch, or unset WORLD_SIZE."
        )


def wait_for_gloo(accelerator: Accelerator) -> None:
    """Give Gloo's threads the interpreter's lock for a moment, before the group of processes is freed.

    They need it to let go of the tensors of the last collectives. Freeing the group waits for these threads without
    giving up the lock, for ever (PyTorch 2.11).
    """
    if accelerator.num_processes > 1:
        time.sleep(0.1)


def on_main(accelerator: Accelerator | None, make: Callable[[], T]) -> T:
    """Call `make` on the main process; return its result, or raise its ValueError, on every process. Collective."""
    if accelerator is None or accelerator.num_processes == 1:
        return make()
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [make(), None]
        except ValueError as error:
            outcome = [None, error]
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Raise a one-line TrainingError if a write in this block fails.

    A process that fails does not wait for the others: its launcher ends them.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports what the disk refuses as a RuntimeError of its writer.
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_WRITER):
            raise
        raise TrainingError(f"cannot write {what} in {str(folder)!r}: {one_line(error)}.") from error


# Weights divided over processes (FSDP 2), for UNets that are too large for DDP ---------------------------------------


def prepare_fsdp(accelerator: Accelerator) -> bool:
    """Make FSDP compute the numbers of DDP; return whether FSDP is used.

    Accelerate's own mixed precision for FSDP rounds everything that enters a module, and with it the timesteps of flow
    matching (999.4 and 1000 are one number in bfloat16), and sums gradients in bfloat16. Without it the weights stay
    float32 and the loop's autocast holds.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
    accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # reading shards unpickles what they hold
    return True


def gather_full_model(model: nn.Module, template: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Return the unsharded model. Under FSDP: a CPU copy of `template`, complete on rank 0 only. Collective."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.unwrap_model(model)
    weights = accelerator.get_state_dict(model)
    copied = copy.deepcopy(template).cpu()
    if accelerator.is_main_process:
        copied.load_state_dict(weights)
    return copied
