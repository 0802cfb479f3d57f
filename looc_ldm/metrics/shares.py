"""Divide images over processes so that no figure depends on the number of processes.

Process r of R takes whole batches: r, r + R, ... of a list of batches that is the same for any R. So an image goes
through a network in the same batch on any number of processes. Otherwise the last digits of features, and whole codes
of samples, could differ. Features are gathered in the order of one process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

# Images that go through a feature network at a time. On a CPU Inception is a third slower at 64, because memory of its
# large activations is not reused.
AT_A_TIME = {"cpu": 8}
AT_A_TIME_ELSEWHERE = 50
ROWS_OF_A_BATCH = 2**32  # more than any batch has: keys of batch b lie in [b * this, (b + 1) * this)


def _rank(accelerator: Accelerator | None) -> tuple[int, int]:
    """Return (r, R): the index of this process and the number of processes."""
    return (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)


def share_of_batches(count: int, batch_size: int, accelerator: Accelerator | None = None) -> list[range]:
    """Return the batches of this process, each as a range of image numbers, for `count` images in all."""
    rank, processes = _rank(accelerator)
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    return batches[rank::processes]


def places(batch: int, size: int, accelerator: Accelerator | None = None) -> torch.Tensor:
    """Return increasing sort keys, int64 `(size,)`, for the images of number `batch` of this process' batches.

    Images of all processes, sorted by these keys, are in the order of one process.
    """
    rank, processes = _rank(accelerator)
    return (batch * processes + rank) * ROWS_OF_A_BATCH + torch.arange(size)


def at_a_time(device: torch.device | str) -> int:
    """Return the number of images that go through a feature network at a time on this device."""
    return AT_A_TIME.get(torch.device(device).type, AT_A_TIME_ELSEWHERE)
