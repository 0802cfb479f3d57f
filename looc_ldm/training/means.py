"""Means of scalars over the steps of a log interval."""

from __future__ import annotations

import math

import torch


class Means:
    """Means of scalars that are recorded step by step. Values that are not finite are left out.

    Sums stay on the device, so that recording does not wait for it.

    Args:
        device (`torch.device`): Where the scalars are.
    """

    def __init__(self, device: torch.device):
        self.device = device
        # By the names that are recorded together: sums and counts, float32 (2, names); and the latest values.
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}
        self._latest: dict[tuple[str, ...], torch.Tensor] = {}

    def record(self, **values: torch.Tensor | float) -> None:
        """Take in scalars of one forward pass."""
        names = tuple(values)
        latest = torch.stack([self._scalar(value) for value in values.values()])
        finite = latest.isfinite()
        sums = torch.stack([torch.where(finite, latest, 0), finite.float()])
        self._sums[names] = self._sums[names] + sums if names in self._sums else sums
        self._latest[names] = latest

    def _scalar(self, value: torch.Tensor | float) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.detach().float().reshape(()).to(self.device)
        return torch.full((), float(value), device=self.device)

    def not_finite(self) -> list[str]:
        """Return the names of the scalars whose latest value is not finite. Waits for the device."""
        pairs = (pair for names, values in self._latest.items() for pair in zip(names, values.tolist(), strict=True))
        return [name for name, value in pairs if not math.isfinite(value)]

    def state(self) -> list[dict]:
        """Return what was recorded since the last `reset`, as JSON holds it. Waits for the device."""
        lists = [(names, *sums.tolist()) for names, sums in self._sums.items()]
        return [{"names": list(names), "sums": sums, "counts": counts} for names, sums, counts in lists]

    def reset(self, state: list[dict] | None = None) -> None:
        """Forget what was recorded, or go on from a `state`."""
        self._sums = {
            tuple(part["names"]): torch.tensor([part["sums"], part["counts"]], device=self.device)
            for part in state or []
        }


def means_of(states: list[list[dict]]) -> dict[str, float]:
    """Return the means over several processes' `Means.state`, without scalars that were never finite."""
    totals: dict[str, list[float]] = {}
    for part in (part for state in states for part in state):
        for name, value, count in zip(part["names"], part["sums"], part["counts"], strict=True):
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += value
            total[1] += count
    return {name: value / count for name, (value, count) in totals.items() if count}
