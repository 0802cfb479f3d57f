"""Mean and covariance of features, gathered in one pass, in batches, and over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from scipy.linalg.blas import dsyrk

if TYPE_CHECKING:
    from accelerate import Accelerator


class FeatureMoments:
    """Number, mean and covariance of feature vectors, in float64 on the CPU.

    The first `dim` rows are kept as they are: they take no more memory than a covariance, and the Fréchet distance of
    few rows is found from them faster and more exactly. Further rows are folded, some at a time, into the scatter
    matrix about the mean of all rows so far, so that features far from zero lose no digits and the figures do not
    depend on how the rows were batched (Chan, Golub, LeVeque 1983).

    Args:
        dim (`int`): D, the number of features.

    Attributes:
        dim (`int`): D.
        count (`int` or `None`): n, rows so far; None where only mean and covariance were given.

    Raises:
        ValueError: `dim` is less than 1.
    """

    def __init__(self, dim: int):
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}.")
        self.dim = dim
        self.count: int | None = 0
        self._waiting: list[torch.Tensor] = []  # rows that are not in the scatter matrix yet
        self._folded = 0  # rows in the two tensors below
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter: torch.Tensor | None = None  # its upper triangle; what is below the diagonal means nothing

    @classmethod
    def from_rows(cls, rows: torch.Tensor) -> FeatureMoments:
        """Of all rows at once, `(n, D)`."""
        if rows.ndim != 2:
            raise ValueError(f"rows must have shape (n, D), got {tuple(rows.shape)}.")
        moments = cls(rows.shape[1])
        moments.update(rows)
        return moments

    @classmethod
    def from_mean_and_covariance(
        cls, mean: torch.Tensor, covariance: torch.Tensor, count: int | None = None
    ) -> FeatureMoments:
        """Of statistics that somebody else has computed.

        Args:
            mean (`torch.Tensor`): `(D,)`.
            covariance (`torch.Tensor`): `(D, D)`, symmetric, with divisor n - 1.
            count (`int`, *optional*): n, at least 2. Without it nothing can be added.

        Raises:
            ValueError: The shapes do not fit, the covariance is not symmetric, something is not finite, or `count` is
                less than 2.
        """
        mean, covariance = (tensor.detach().cpu().double() for tensor in (mean, covariance))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"mean and covariance must have shapes (D,) and (D, D), got {tuple(mean.shape)} and "
                f"{tuple(covariance.shape)}."
            )
        if count is not None and count < 2:
            raise ValueError(f"count must be at least 2, got {count}.")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("mean and covariance must be finite.")
        if (covariance - covariance.T).abs().max() > 1e-6 * covariance.diagonal().abs().max():
            raise ValueError("covariance must be symmetric.")
        moments = cls(len(mean))
        moments.count = count
        moments._mean = mean.clone()
        # Without a number of rows the covariance stands for itself, as that of two rows would.
        moments._folded = 2 if count is None else count
        moments._scatter = (covariance + covariance.T) * ((moments._folded - 1) / 2)
        return moments

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> FeatureMoments:
        """What `tensors` has given."""
        if "rows" in tensors:
            return cls.from_rows(tensors["rows"])
        count = int(tensors["count"]) if "count" in tensors else None
        return cls.from_mean_and_covariance(tensors["mean"], tensors["covariance"], count)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All there is to keep, for instance in a safetensors file.

        Returns:
            `dict`: float64 `rows` `(n, D)` while n <= D, otherwise `mean` `(D,)`, `covariance` `(D, D)` and, where it
            is known, `count` as an int64 scalar.
        """
        rows = self.rows
        if rows is not None:
            return {"rows": rows}
        count = {} if self.count is None else {"count": torch.tensor(self.count)}
        return {"mean": self.mean.clone(), "covariance": self.covariance, **count}

    @property
    def rows(self) -> torch.Tensor | None:
        """The rows themselves, `(n, D)`, while there are at most D; otherwise None."""
        if self._scatter is not None:
            return None
        return torch.cat(self._waiting or [torch.empty(0, self.dim, dtype=torch.float64)])

    @property
    def mean(self) -> torch.Tensor:
        """`(D,)`. Raises ValueError where there are no rows."""
        if self.count == 0:
            raise ValueError("there is no mean of no rows.")
        if self._scatter is None:
            return self.rows.mean(0)
        self._fold()
        return self._mean

    @property
    def covariance(self) -> torch.Tensor:
        """`(D, D)`, with divisor n - 1. Raises ValueError for fewer than 2 rows."""
        self._check_count()
        if self._scatter is None:
            centred = self.centred_rows()
            return centred.T @ centred / (self.count - 1)
        upper = self.scatter_triangle().triu_()
        return (upper + upper.triu(1).T) / self.degrees_of_freedom

    @property
    def degrees_of_freedom(self) -> int:
        """What the scatter matrix is divided by: n - 1, or 1 where n is not known."""
        return (2 if self.count is None else self.count) - 1

    def scatter_triangle(self) -> torch.Tensor:
        """A copy `(D, D)` of the sum of squares about the mean: its upper triangle, anything below the diagonal.

        Raises ValueError where the rows themselves are kept.
        """
        if self._scatter is None:
            raise ValueError("there is no scatter matrix while the rows are kept.")
        self._fold()
        return self._scatter.clone()

    @property
    def total_variance(self) -> float:
        """The trace of the covariance. Raises ValueError for fewer than 2 rows."""
        self._check_count()
        if self._scatter is None:
            return float(self.centred_rows().square().sum()) / (self.count - 1)
        self._fold()
        return float(self._scatter.diagonal().sum()) / self.degrees_of_freedom

    def centred_rows(self) -> torch.Tensor | None:
        """The rows minus their mean, `(n, D)`, while there are at most D; otherwise None."""
        rows = self.rows
        return None if rows is None else rows.sub_(rows.mean(0))

    def update(self, rows: torch.Tensor) -> None:
        """Add rows `(n, D)` of any floating type and device. Raises ValueError for another shape."""
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"rows must have shape (n, {self.dim}), got {tuple(rows.shape)}.")
        self._check_known()
        if len(rows) == 0:
            return
        for part in rows.detach().split(self.dim):
            # Many rows at a time: each fold reads and writes the whole matrix.
            if self.count - self._folded + len(part) > self.dim:
                self._fold()
            self._waiting.append(part.cpu().to(torch.float64, copy=True))
            self.count += len(part)

    def reduce(self, accelerator: Accelerator) -> None:
        """Add the rows of all processes: each ends with the moments of all. A collective.

        Traffic is one D x D matrix, or the rows where all together are at most D.
        """
        if accelerator.num_processes == 1:
            return
        self._check_known()
        device = accelerator.device
        counts, folded = accelerator.gather(torch.tensor([[self.count, self._folded]], device=device)).T.tolist()
        total = sum(counts)
        if total <= self.dim and not any(folded):
            padded = torch.zeros(max(counts), self.dim, dtype=torch.float64)
            padded[: self.count] = self.rows
            shares = accelerator.gather(padded.to(device)).cpu().view(len(counts), max(counts), self.dim)
            self._waiting = [share[:count] for share, count in zip(shares, counts, strict=True)]
            self.count = total
            return
        self._fold()
        mean = accelerator.reduce((self._mean * (self.count / total)).to(device), "sum").cpu()
        scatter = torch.zeros(self.dim, self.dim, dtype=torch.float64) if self._scatter is None else self._scatter
        apart = self._mean - mean
        scatter = scatter.addr(apart, apart, alpha=self.count)
        self._scatter = accelerator.reduce(scatter.to(device), "sum").cpu()
        self._mean, self._folded, self.count = mean, total, total

    def _fold(self) -> None:
        """Move the waiting rows into the scatter matrix."""
        if not self._waiting:
            return
        rows = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
        self._waiting = []
        mean = rows.mean(0)
        self._shift(len(rows), mean)
        rows.sub_(mean)
        # Fortran's matrices are the transposed ones, and its lower triangle is the upper one here.
        scatter = dsyrk(1.0, rows.numpy().T, beta=1.0, c=self._scatter.numpy().T, lower=1, overwrite_c=1)
        self._scatter = torch.from_numpy(scatter.T)

    def _shift(self, count: int, mean: torch.Tensor) -> None:
        """Move the mean to that of all when `count` rows of this `mean` are added; their own scatter follows."""
        if self._scatter is None:
            self._scatter = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        total = self._folded + count
        apart = mean - self._mean
        self._mean = self._mean + apart * (count / total)
        self._scatter.addr_(apart, apart, alpha=self._folded * count / total)  # apart apart^T
        self._folded = total

    def _check_known(self) -> None:
        if self.count is None:
            raise ValueError("nothing can be added to a mean and a covariance whose number of rows is not known.")

    def _check_count(self) -> None:
        if self.count is not None and self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}.")
