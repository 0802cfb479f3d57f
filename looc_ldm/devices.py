"""The device that a command computes on."""

from __future__ import annotations

import os
from datetime import timedelta

from looc_ldm.errors import UserError

WAIT = timedelta(hours=2)  # a process that has done its share waits for the others


def choose_device(name: str | None):
    """The `torch.device` of a name, or the best there is. Raises UserError for one that there is not."""
    import torch

    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.empty(0, device=name).device
    except Exception as error:  # what backends raise that are not there has no common base
        raise UserError(f"--device {name}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    if device.type == "meta":
        raise UserError(f"--device {name}: it holds no numbers, so that nothing can be computed there.")
    return device


def start_processes(name: str | None):
    """The device of this process, and the `Accelerator` that knows the others; None where there are no others.

    Args:
        name: As for `choose_device`; of several processes each takes a GPU of its own, unless it is "cpu".

    Raises:
        UserError: There is no such device, or one was given to several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return choose_device(name), None
    accelerator = make_accelerator(name)
    return accelerator.device, accelerator


def make_accelerator(name: str | None):
    """The `Accelerator` of one process or several, on the device of that name; see `start_processes`."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if name not in (None, "cpu"):
            raise UserError(f"--device {name}: of several processes each takes its own; only cpu can be given.")
        on_cpu = name == "cpu"
    else:
        device = choose_device(name)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)
        on_cpu = device.type == "cpu"
    return Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)])
