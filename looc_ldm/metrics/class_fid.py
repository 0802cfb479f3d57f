"""FID within each class, averaged over classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from looc_ldm.metrics.frechet import FeatureMoments, frechet_distance


@dataclass(frozen=True)
class ClassFID:
    """FID within each class, by the name of the class."""

    mean: float  # over the classes of `per_class`, with equal weights
    per_class: dict[str, float]
    skipped: dict[str, str]  # classes with fewer than 2 images on a side, and the reason in words
    # Counted classes with fewer images than features on a side, and the smaller count: their covariances are singular,
    # and their FID is larger than that of more images.
    biased: dict[str, int]


def class_averaged_fid(
    generated: torch.Tensor,
    generated_labels: torch.Tensor,
    reference: torch.Tensor,
    reference_labels: torch.Tensor,
    names: Mapping[int, str] | None = None,
) -> ClassFID:
    """Return FID within each class, which is high for a generator that ignores its label.

    Args:
        generated, reference (`torch.Tensor`): Features `(n, D)` and `(m, D)`.
        generated_labels, reference_labels (`torch.Tensor`): Integers `(n,)` and `(m,)`.
        names (`Mapping[int, str]`, *optional*): Name of each label; other labels are their own names.

    Raises:
        ValueError: Two labels have one name, or no class has 2 images on both sides.
    """
    labels = torch.cat([generated_labels, reference_labels]).unique().tolist()
    name_of = {label: str(label if names is None else names.get(label, label)) for label in labels}
    if len(set(name_of.values())) < len(name_of):
        raise ValueError(f"each class must have a name of its own, got {list(name_of.values())}.")
    per_class, skipped, biased = {}, {}, {}
    for label, name in name_of.items():
        sides = generated[generated_labels == label], reference[reference_labels == label]
        counts = [len(features) for features in sides]
        if min(counts) < 2:
            skipped[name] = f"{counts[0]} generated and {counts[1]} reference images; FID needs 2 of each"
            continue
        per_class[name] = frechet_distance(*map(FeatureMoments.from_vectors, sides))
        if min(counts) < generated.shape[1]:
            biased[name] = min(counts)
    if not per_class:
        raise ValueError("no class has at least 2 generated and 2 reference images.")
    return ClassFID(sum(per_class.values()) / len(per_class), per_class, skipped, biased)
