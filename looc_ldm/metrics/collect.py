"""Features of images as they come, batch by batch, and brought together from all processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from looc_ldm.metrics.moments import FeatureMoments

if TYPE_CHECKING:
    from accelerate import Accelerator

BLOCK = 1024  # rows of each process that travel at a time: on a GPU they are held once for every process


@dataclass
class Features:
    """What figures are computed from.

    Attributes:
        moments (`FeatureMoments`): Of all images.
        rows (`torch.Tensor` or `None`): Features `(n, D)`, float32 on the CPU, where they were kept.
        logits (`torch.Tensor` or `None`): `(n, classes)`, float32 on the CPU, where the network gave them.
        count (`int`): n.
        labels (`torch.Tensor` or `None`): Classes, int64 `(n,)`, where somebody has set them.
    """

    moments: FeatureMoments
    rows: torch.Tensor | None
    logits: torch.Tensor | None
    count: int
    labels: torch.Tensor | None = None


class FeatureCollector:
    """Takes features batch by batch. Without `keep_rows` only their moments stay, whatever the number of images.

    Args:
        keep_rows (`bool`): Whether the features themselves are needed: by KID, CMMD, precision and recall and the FID
            of classes.
    """

    def __init__(self, keep_rows: bool):
        self.keep_rows = keep_rows
        self.moments: FeatureMoments | None = None
        self._rows: list[torch.Tensor] = []
        self._logits: list[torch.Tensor] = []
        self._places: list[torch.Tensor] = []

    def update(self, outputs: Mapping[str, torch.Tensor], places: torch.Tensor | None = None) -> None:
        """Add a batch.

        Args:
            outputs (`Mapping`): `features` `(B, D)` and, if the network has them, `logits` `(B, classes)`.
            places (`torch.Tensor`, *optional*): Where the images stand among those of all processes, integers `(B,)`
                (`looc_ldm.metrics.shares.places`).

        Raises:
            ValueError: Shapes that do not fit, or logits or places in some batches only.
        """
        features, logits = outputs["features"], outputs.get("logits")
        if features.ndim != 2:
            raise ValueError(f"features must have shape (B, D), got {tuple(features.shape)}.")
        for name, tensor, kept in (("logits", logits, self._logits), ("places", places, self._places)):
            if tensor is not None and len(tensor) != len(features):
                raise ValueError(f"{name} must be as many as the features, {len(features)}, got {len(tensor)}.")
            if self.moments is not None and (tensor is not None) != bool(kept):
                raise ValueError(f"{name} must come with all batches or with none.")
        if self.moments is None:
            self.moments = FeatureMoments(features.shape[1])
        self.moments.update(features)
        if self.keep_rows:
            self._rows.append(features.detach().to("cpu", torch.float32, copy=True))
        if logits is not None:
            self._logits.append(logits.detach().to("cpu", torch.float32, copy=True))
        if places is not None:
            self._places.append(places.detach().to("cpu", torch.int64, copy=True))

    def collect(self, accelerator: Accelerator | None = None) -> Features:
        """Bring everything together, once. A collective.

        Afterwards every process has the moments of all, and the main process also the rows and logits, in the order of
        their places, or, of one process without these, in that of `update` (None elsewhere).

        Raises:
            ValueError: There are no images at all, or the processes have seen features of different kinds.
        """
        moments = self.moments
        layout = [
            0 if moments is None else moments.count,
            0 if moments is None else moments.dim,
            self._logits[0].shape[1] if self._logits else 0,
            int(bool(self._places)),
        ]
        layouts = torch.tensor([layout])
        if accelerator is not None:  # a process without images does not know what the others have
            layouts = accelerator.gather(layouts.to(accelerator.device)).cpu()
        counts = layouts[:, 0]
        seen = layouts[counts > 0, 1:].unique(dim=0)
        if len(seen) != 1:
            raise ValueError(
                "there are no images to collect features of."
                if len(seen) == 0
                else f"the processes have (features, logits, places) of different kinds: {seen.tolist()}."
            )
        dim, classes, placed = seen[0].tolist()
        moments = moments or FeatureMoments(dim)
        if accelerator is not None:
            moments.reduce(accelerator)
        rows = _brought(self._rows, (dim,), torch.float32, counts, accelerator) if self.keep_rows else None
        logits = _brought(self._logits, (classes,), torch.float32, counts, accelerator) if classes else None
        places = _brought(self._places, (), torch.int64, counts, accelerator) if placed else None
        if places is not None and not bool((places.diff() > 0).all()):
            order = places.argsort()
            rows, logits = (None if tensor is None else tensor[order] for tensor in (rows, logits))
        return Features(moments, rows, logits, int(counts.sum()))


def _brought(
    parts: list[torch.Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    counts: torch.Tensor,
    accelerator: Accelerator | None,
) -> torch.Tensor | None:
    """The rows of all processes on the main process, in an order of their own; None on the others. Empties `parts`."""
    share = torch.cat([torch.empty(0, *shape, dtype=dtype), *parts])
    parts.clear()  # not to hold all twice
    if accelerator is None or accelerator.num_processes == 1:
        return share
    blocks = []
    for start in range(0, int(counts.max()), BLOCK):
        length = min(BLOCK, int(counts.max()) - start)
        part = share[start : start + length]
        padded = F.pad(part, (0, 0) * (part.ndim - 1) + (0, length - len(part)))
        gathered = accelerator.gather(padded.to(accelerator.device))
        if accelerator.is_main_process:
            gathered = gathered.cpu().unflatten(0, (-1, length))  # (R, length, ...)
            there = start + torch.arange(length) < counts[:, None]
            blocks.append(gathered[there])
    return torch.cat(blocks) if accelerator.is_main_process else None
