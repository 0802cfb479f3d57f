"""Choose the device that a command computes on."""

from __future__ import annotations

import torch

from looc_ldm.utils.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """Return the named device, or the best there is. Raises UserError if there is no such device."""
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.empty(0, device=name).device
    except Exception as error:  # errors of missing backends have no common base
        raise UserError(f"--device {name}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    if device.type == "meta":
        raise UserError(f"--device {name}: it holds no numbers, so nothing can be computed on it.")
    return device
