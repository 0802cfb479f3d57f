"""Mean and standard deviation of latents, measured in parts that add up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from operator import add

import torch

from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.scaling import encode_latents

SCALING_IMAGES = 2_000  # images whose latents are measured if not all of them are encoded


@dataclass(frozen=True)
class Moments:
    """Sums over latents, which give means and deviations. Sums of parts can be added.

    Attributes:
        count (`int`): Values of a channel.
        total, squares (`tuple[float, ...]`): Sum and sum of squares of each channel; empty before the first latents.
    """

    count: int = 0
    total: tuple[float, ...] = ()
    squares: tuple[float, ...] = ()

    @classmethod
    def of(cls, latents: torch.Tensor) -> Moments:
        """Sum up latents `(B, c, h, w)`, in float64."""
        wide = latents.cpu().double().transpose(0, 1).flatten(1)  # (c, B * h * w)
        return cls(wide.shape[1], tuple(wide.sum(1).tolist()), tuple(wide.square().sum(1).tolist()))

    def __add__(self, other: Moments) -> Moments:
        if not self.count or not other.count:
            return self if self.count else other
        total = tuple(map(add, self.total, other.total))
        return Moments(self.count + other.count, total, tuple(map(add, self.squares, other.squares)))

    @property
    def channel_mean(self) -> list[float]:
        """Mean of each channel."""
        return [total / self.count for total in self.total]

    @property
    def channel_std(self) -> list[float]:
        """Standard deviation of each channel about its mean."""
        pairs = zip(self.channel_mean, self.squares, strict=True)
        return [math.sqrt(max(squares / self.count - mean**2, 0.0)) for mean, squares in pairs]

    @property
    def standard_deviation(self) -> float:
        """Standard deviation of all values about their common mean."""
        count = self.count * len(self.total)
        return math.sqrt(max(sum(self.squares) / count - (sum(self.total) / count) ** 2, 0.0))


def measure_latents(model: LooCVQModel, batches: Iterable[torch.Tensor]) -> Moments:
    """Measure mean and deviation of the latents of images `(B, C, H, W)` in [-1, 1].

    To whiten each channel: `model.register_to_config(scaling_factor=1.0, latents_mean=moments.channel_mean,
    latents_std=moments.channel_std)`.
    """
    moments = Moments()
    for batch in batches:
        moments += Moments.of(encode_latents(model, batch.to(model.device), scaled=False))
    return moments


def measure_scaling_factor(model: LooCVQModel, batches: Iterable[torch.Tensor]) -> float:
    """Return 1 / standard deviation of the latents of images `(B, C, H, W)` in [-1, 1].

    Raises:
        ValueError: There are no images, or all latents are equal.
    """
    moments = measure_latents(model, batches)
    if not moments.count or not moments.standard_deviation:
        raise ValueError(f"no scaling factor: {'all latents are equal' if moments.count else 'there are no images'}.")
    return 1 / moments.standard_deviation
