"""Precision of feature networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_float32(device: torch.device | str) -> Iterator[None]:
    """Compute in float32 on this device: without autocast, and without TF32 in convolutions.

    cuDNN has TF32 on by default; features of a GPU would then differ from those of a CPU in the fourth digit.
    """
    backend = torch.backends.cudnn
    settings = {name: getattr(backend, name) for name in ("enabled", "benchmark", "deterministic")}
    with torch.autocast(torch.device(device).type, enabled=False), backend.flags(**settings, allow_tf32=False):
        yield
