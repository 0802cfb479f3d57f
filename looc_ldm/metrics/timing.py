"""Where the time of an evaluation goes: waiting for images, the feature networks, or statistics."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class Stopwatch:
    """Seconds by name. With a device, what it was given to do is waited for, so that the time is its own."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Count the time of this block under `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def waiting(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items, with the time that each takes to come."""
        iterator = iter(items)
        end = object()
        while True:
            with self.running(name):
                item = next(iterator, end)
            if item is end:
                return
            yield item

    def shares(self) -> str:
        """In words, largest first: "network 81 %, images 15 %, statistics 4 % of 92.0 s"."""
        total = sum(self.seconds.values())
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        words = ", ".join(f"{name} {seconds / max(total, 1e-9):.0%}" for name, seconds in ordered)
        return f"{words} of {total:.1f} s"
