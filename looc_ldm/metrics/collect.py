"""Collect features of images batch by batch, and bring them together from all processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from looc_ldm.metrics.frechet import FeatureMoments

if TYPE_CHECKING:
    from accelerate import Accelerator

BLOCK = 1024  # vectors that each process sends at a time: a GPU holds the blocks of all processes at once


@dataclass
class Features:
    """Features of a set of images by one network."""

    moments: FeatureMoments  # count, mean and covariance over all images
    vectors: torch.Tensor | None  # features (n, D), float32 on the CPU, if they were kept
    logits: torch.Tensor | None  # (n, classes), float32 on the CPU, if the network gives them
    labels: torch.Tensor | None = None  # classes, int64 (n,), if the caller has set them


class FeatureCollector:
    """Collect features batch by batch.

    Args:
        keep_vectors (`bool`): Keep the features themselves, for KID, CMMD, precision and recall, and class-averaged
            FID. Otherwise only their moments stay, and memory does not grow with the number of images.
    """

    def __init__(self, keep_vectors: bool):
        self.keep_vectors = keep_vectors
        self.moments: FeatureMoments | None = None
        self._kept: dict[str, list[torch.Tensor]] = {}

    def update(self, outputs: Mapping[str, torch.Tensor], places: torch.Tensor) -> None:
        """Add a batch.

        Args:
            outputs (`Mapping`): `features` `(B, D)` and, if the network has them, `logits` `(B, classes)`.
            places (`torch.Tensor`): Positions of the images among the images of all processes, integers `(B,)`
                (`looc_ldm.metrics.shares.places`).
        """
        features = outputs["features"]
        if self.moments is None:
            self.moments = FeatureMoments(features.shape[1])
        self.moments.update(features)
        vectors = features.float() if self.keep_vectors else None
        kept = {"vectors": vectors, "logits": outputs.get("logits"), "places": places}
        for name, tensor in kept.items():
            if tensor is not None:
                # A copy: a slice would keep the whole output of the network alive.
                self._kept.setdefault(name, []).append(tensor.detach().to("cpu", copy=True))

    def collect(self, accelerator: Accelerator | None = None) -> Features:
        """Return the features of all processes. Collective; call it once.

        Every process gets the moments. The main process also gets the vectors and logits, in the order of their places;
        the others get None.

        Raises:
            ValueError: There are no images at all, or features are not finite.
        """
        dims = [] if self.moments is None else [self.moments.dim]
        if accelerator is not None:  # a process without images does not know how many features there are
            dims = gather_object(dims)
        if not dims:
            raise ValueError("there are no images to collect features of.")
        moments = self.moments or FeatureMoments(dims[0])
        kept = {name: torch.cat(self._kept.pop(name)) for name in list(self._kept)}
        if accelerator is not None and accelerator.num_processes > 1:
            kept = _gather(kept, moments.count, accelerator)
            moments.reduce(accelerator)
        if not moments.mean.isfinite().all():
            raise ValueError("the features are not finite.")
        return Features(moments, kept.get("vectors"), kept.get("logits"))


def _gather(kept: dict[str, torch.Tensor], count: int, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Return the tensors of all processes on the main process, in the order of "places"; nothing on the others."""
    blocks: list[dict[str, torch.Tensor]] = []
    for start in range(0, max(gather_object([count])), BLOCK):
        block = {name: tensor[start : start + BLOCK].clone() for name, tensor in kept.items()}
        found = gather_object([block])
        if accelerator.is_main_process:
            blocks += [block for block in found if block]
    together = {name: torch.cat([block[name] for block in blocks]) for name in (blocks[0] if blocks else ())}
    if "places" in together:
        order = together["places"].argsort()
        together = {name: tensor[order] for name, tensor in together.items()}
    return together
