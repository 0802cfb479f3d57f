"""FID: mean and covariance of features, added up over batches and processes, and their Fréchet distance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

if TYPE_CHECKING:
    from accelerate import Accelerator


class FeatureMoments:
    """Number, mean and covariance of feature vectors, in float64 on the CPU.

    Up to `dim` vectors are kept as they are: they need no more memory than a covariance, and their Fréchet distance is
    faster and more exact. Further vectors are added, up to `dim` at a time, to the scatter matrix about the mean of all
    vectors so far, so that features far from zero lose no digits (Chan, Golub, LeVeque 1983).

    Args:
        dim (`int`): D, the number of features.

    Attributes:
        dim (`int`): D.
        count (`int` or `None`): n, vectors so far; None if only mean and covariance are known.
    """

    def __init__(self, dim: int):
        self.dim = dim
        self.count: int | None = 0
        self._waiting: list[torch.Tensor] = []  # vectors that are not in mean and scatter yet
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter: torch.Tensor | None = None  # (D, D), sum of (x - mean) (x - mean)^T

    @classmethod
    def from_vectors(cls, vectors: torch.Tensor) -> FeatureMoments:
        """Return the moments of vectors `(n, D)`."""
        moments = cls(vectors.shape[1])
        moments.update(vectors)
        return moments

    @classmethod
    def from_mean_and_covariance(
        cls, mean: torch.Tensor, covariance: torch.Tensor, count: int | None = None
    ) -> FeatureMoments:
        """Take over published statistics: mean `(D,)`, symmetric covariance `(D, D)` with divisor n - 1, and n.

        Raises:
            ValueError: The shapes do not match, the covariance is not symmetric, or a number is not finite.
        """
        mean, covariance = (tensor.detach().cpu().double() for tensor in (mean, covariance))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"mean and covariance must have shapes (D,) and (D, D), got {tuple(mean.shape)} and "
                f"{tuple(covariance.shape)}."
            )
        asymmetry = (covariance - covariance.T).abs().max()
        if not (mean.isfinite().all() and asymmetry <= 1e-6 * covariance.diagonal().abs().max()):  # also for NaN
            raise ValueError("mean and covariance must be finite, and covariance symmetric.")
        moments = cls(len(mean))
        moments.count = count
        moments._mean = mean
        moments._scatter = (covariance + covariance.T) * (moments.degrees_of_freedom / 2)
        return moments

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> FeatureMoments:
        """Restore what `tensors` returned."""
        if "rows" in tensors:
            return cls.from_vectors(tensors["rows"])
        count = int(tensors["count"]) if "count" in tensors else None
        return cls.from_mean_and_covariance(tensors["mean"], tensors["covariance"], count)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything there is to store.

        `rows`, the vectors `(n, D)`, while n <= D; otherwise `mean`, `covariance` and, if known, `count`.
        """
        if self.vectors is not None:
            return {"rows": self.vectors}
        count = {} if self.count is None else {"count": torch.tensor(self.count)}
        return {"mean": self.mean, "covariance": self.covariance, **count}

    @property
    def vectors(self) -> torch.Tensor | None:
        """Vectors `(n, D)` themselves, while there are at most D; otherwise None."""
        if self._scatter is not None:
            return None
        return torch.cat(self._waiting or [torch.empty(0, self.dim, dtype=torch.float64)])

    @property
    def mean(self) -> torch.Tensor:
        """Mean `(D,)`."""
        if self._scatter is None:
            return self.vectors.mean(0)
        self._fold()
        return self._mean

    @property
    def covariance(self) -> torch.Tensor:
        """Covariance `(D, D)`, with divisor n - 1."""
        if self._scatter is None:
            return self.vectors.T.cov()
        self._fold()
        return self._scatter / self.degrees_of_freedom

    @property
    def degrees_of_freedom(self) -> int:
        """Divisor of the scatter matrix: n - 1, or 1 if n is not known."""
        return 1 if self.count is None else self.count - 1

    def update(self, vectors: torch.Tensor) -> None:
        """Add vectors `(n, D)` of any floating type and device."""
        for part in vectors.detach().split(self.dim):
            # Many vectors at a time: each fold reads and writes the whole matrix.
            if sum(map(len, self._waiting)) + len(part) > self.dim:
                self._fold()
            self._waiting.append(part.to("cpu", torch.float64, copy=True))
            self.count += len(part)

    def reduce(self, accelerator: Accelerator) -> None:
        """Add the vectors of all processes, so that each process has the moments of all. Collective.

        The traffic is one D x D matrix, or the vectors themselves if all together are at most D.
        """
        if accelerator.num_processes == 1:
            return
        total = sum(gather_object([self.count]))
        if total <= self.dim:
            self._waiting, self.count = gather_object(self._waiting), total
            return
        self._fold()
        mean = accelerator.reduce((self._mean * (self.count / total)).to(accelerator.device), "sum").cpu()
        apart = self._mean - mean
        scatter = torch.zeros(self.dim, self.dim, dtype=torch.float64) if self._scatter is None else self._scatter
        scatter = scatter.addr(apart, apart, alpha=self.count)
        self._scatter = accelerator.reduce(scatter.to(accelerator.device), "sum").cpu()
        self._mean, self.count = mean, total

    def _fold(self) -> None:
        """Move the waiting vectors into mean and scatter matrix."""
        if not self._waiting:
            return
        vectors = torch.cat(self._waiting)
        self._waiting = []
        if self._scatter is None:
            self._scatter = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        share = len(vectors) / self.count
        mean = vectors.mean(0)
        apart = mean - self._mean
        self._mean = self._mean + apart * share
        self._scatter.addr_(apart, apart, alpha=(1 - share) * len(vectors))
        vectors -= mean
        self._scatter.addmm_(vectors.T, vectors)


def frechet_distance(first: FeatureMoments, second: FeatureMoments) -> float:
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), a squared distance of normal distributions.

    This is FID (Heusel et al. 2017) for features of the Inception network.

    Args:
        first, second (`FeatureMoments`): Moments of features of the same network. The order does not matter.

    Returns:
        `float`: At least 0; 0 for equal moments, up to rounding. It falls with the number of vectors although the
        distribution stays the same, so figures compare only at equal counts.

    Raises:
        ValueError: Fewer than 2 vectors on a side, or different numbers of features.
    """
    if first.dim != second.dim:
        raise ValueError(f"features must have the same dimension, got {first.dim} and {second.dim}.")
    for moments in (first, second):
        if moments.count is not None and moments.count < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 images on each side, got {moments.count}.")
    if first.vectors is None:
        first, second = second, first
    # With S1 = A A^T and S2 = B B^T, S1 S2 has the eigenvalues of the symmetric A^T S2 A, and their roots are the
    # singular values of A^T B. For few vectors A^T is small: it holds the centred vectors.
    a = _factor(first)
    if second.vectors is None:
        covariance = second.covariance
        variance = covariance.trace()
        root = torch.linalg.eigvalsh(a.T @ covariance @ a).clamp(min=0).sqrt().sum()
    else:
        b = _factor(second)
        variance = b.square().sum()
        root = torch.linalg.svdvals(a.T @ b).sum()
    variance += a.square().sum()
    return max(0.0, float((first.mean - second.mean).square().sum() + variance - 2 * root))


def _factor(moments: FeatureMoments) -> torch.Tensor:
    """Return A `(D, r)` with A A^T equal to the covariance."""
    if moments.vectors is not None:
        return (moments.vectors - moments.mean).T / math.sqrt(moments.degrees_of_freedom)
    covariance = moments.covariance
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(covariance)  # the covariance is singular
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps  # the others are rounding
    return vectors[:, kept] * values[kept].sqrt()
