"""The device that a command computes on."""

from __future__ import annotations

from looc_ldm.errors import UserError


def choose_device(name: str | None):
    """The `torch.device` of a name, or the best there is. Raises UserError for one that there is not."""
    import torch

    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
