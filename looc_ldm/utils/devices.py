"""The device that a command computes on."""

from __future__ import annotations

import torch

from looc_ldm.utils.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """Return the device of a name, or the best there is. Raises UserError if there is none of that name."""
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.empty(0, device=name).device
    except Exception as error:  # what backends raise that are not there has no common base
        raise UserError(f"--device {name}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    if device.type == "meta":
        raise UserError(f"--device {name}: it holds no numbers, so that nothing can be computed there.")
    return device
