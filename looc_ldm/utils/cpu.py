"""Speed on CPUs: choose the number of threads and the implementation of attention."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

# Below this many positions, attention by matrix products is the faster one to train (docs/benchmarks.md).
SHORT_SEQUENCE = 256
# More threads must be this much faster: they lose far more when another process starts to compute.
GAIN = 1.25
WATCH_SECONDS, COLLAPSE = 10, 3  # a share of a core halves the speed; threads beside a busy process lose far more


def use_fastest_threads(step: Callable[[], object], seconds: float = 0.3) -> int:
    """Time `step` with 1, 2, 4, ... threads, up to the cores of this process; keep and return the fastest number.

    Twice the threads are far slower, not faster, as soon as another process is busy: threads wait for each other.
    The environment variable `OMP_NUM_THREADS` decides instead, if it is set.

    Args:
        step: A piece of the work to come, some milliseconds to seconds long. Called at least twice per number.
        seconds: Least time to measure for each number.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = [2**power for power in range(available.bit_length()) if 2**power < available] + [available]
    best, least = 1, float("inf")
    for count in counts:
        torch.set_num_threads(count)
        step()  # picks kernels and starts threads
        calls, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds or not calls:
            step()
            calls += 1
        if elapsed / calls > least / GAIN:
            break
        best, least = count, elapsed / calls
    torch.set_num_threads(best)
    logger.info("%d of %d CPU threads, the fastest number by a short test (OMP_NUM_THREADS sets it)", best, available)
    return best


class SpeedWatch:
    """Notice when a loop becomes far slower than it was, as threads do once another process computes.

    Args:
        clock: Returns seconds that only pass while the loop runs.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._steps, self._since, self._best = 0, clock(), 0.0

    def collapsed(self) -> bool:
        """Count a step; every 10 s, return whether speed is below a third of the best since the last collapse."""
        self._steps += 1
        elapsed = self._clock() - self._since
        if elapsed < WATCH_SECONDS:
            return False
        speed = self._steps / elapsed
        collapsed = speed < self._best / COLLAPSE
        self._steps, self._since, self._best = 0, self._clock(), speed if collapsed else max(self._best, speed)
        return collapsed


def attention_kernel(latents: torch.Tensor) -> AbstractContextManager:
    """Return the context in which a UNet computes attention over latents `(B, c, h, w)` fastest.

    On a CPU, in bfloat16 and for short sequences, the backward pass of PyTorch's fused attention is slow.
    """
    low_precision = torch.is_autocast_enabled("cpu") or latents.dtype == torch.bfloat16
    positions = latents.shape[-2:].numel()
    if latents.device.type == "cpu" and low_precision and torch.is_grad_enabled() and positions <= SHORT_SEQUENCE:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
