"""Size of the chunks in which segments and similarities are processed, to limit temporary memory."""

from __future__ import annotations

import torch

# On CPUs 4 MiB of float32, about a core's second-level cache, where it was fastest; on GPUs 256 MiB, so that a step is
# a few large kernels.
CHUNK_ELEMENTS = 2**20
GPU_CHUNK_ELEMENTS = 2**26


def chunk_elements(device: torch.device) -> int:
    """Return how many numbers a temporary may hold on a device."""
    return CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS
