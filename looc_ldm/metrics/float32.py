"""The precision that feature networks compute in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_float32(device: torch.device | str) -> Iterator[None]:
    """Float32 on this device, whatever surrounds it: without autocast, and convolutions without TF32.

    cuDNN has TF32 on by default; features of a GPU would then differ from those of a CPU in the fourth digit.
    """
    backend = torch.backends.cudnn
    settings = {name: getattr(backend, name) for name in ("enabled", "benchmark", "deterministic")}
    with torch.autocast(torch.device(device).type, enabled=False), backend.flags(**settings, allow_tf32=False):
        yield
