"""Classes of samples and of real images brought to one numbering, which is that of the real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from looc_ldm.utils.errors import UserError


@dataclass
class ComparedLabels:
    """Labels of both sides in one numbering.

    Attributes:
        generated, reference (`torch.Tensor`): int64 `(n,)`, `(m,)`.
        names (`Mapping[int, str]`, *optional*): Of the numbers.
    """

    generated: torch.Tensor
    reference: torch.Tensor
    names: Mapping[int, str] | None


def class_folder(label: int | str | None, pipe) -> str:
    """The sub-folder of samples of a class: its name, as far as a folder can have it, or its number; none without.

    Of a folder like that `compared_labels` knows the classes again.
    """
    names = pipe.config.id2label or {}
    if label is None:
        return ""
    (label,) = pipe.get_label_ids([label])
    name = names.get(label, str(label))
    return _as_folder(name) if list(names.values()).count(name) < 2 else f"{_as_folder(name)} ({label})"


def _as_folder(name: str) -> str:
    return name.replace("/", "-").replace("\\", "-")


def labels_to_draw(pipe, reference, count: int) -> tuple[list[int | None], torch.Tensor | None]:
    """The class that each of `count` samples is drawn as.

    Where the classes of the reference are those of the model, they are drawn in the shares that they have there, else
    all classes of the model in equal shares.

    Returns:
        The labels of the pipeline, None for no class; and, where they come from the reference, their numbers there.
    """
    if not pipe.num_class_embeds:
        return [None] * count, None
    own = [label for label in range(pipe.num_class_embeds) if label != pipe.config.null_class_label]
    label_of = None if reference.labels is None else _labels_of_pipe(pipe, own, reference)
    if label_of is None:
        return [own[i * len(own) // count] for i in range(count)], None
    # From places at even distances: samples and reference then have the same share of each class.
    drawn_from = reference.labels.sort().values[torch.arange(count) * len(reference.labels) // count]
    return [label_of[label] for label in drawn_from.tolist()], drawn_from


def _labels_of_pipe(pipe, own: list[int], reference) -> Mapping[int, int] | None:
    """The pipeline's label of each class of the reference: by name, or, where one of the two has only numbers, by
    number if both have as many. None where the classes are others."""
    found = {label: pipe.labels.get(name.casefold(), []) for label, name in reference.classes.items()}
    if found and all(len(labels) == 1 for labels in found.values()):
        return {label: labels[0] for label, labels in found.items()}
    own_names = [name for name, labels in pipe.labels.items() if set(labels) & set(own)]
    if all(any(not name.isdecimal() for name in names) for names in (own_names, reference.classes.values())):
        return None  # other names: numbers would match classes with strangers
    numbers = sorted(reference.classes) or reference.labels.unique().tolist()
    if len(numbers) != len(own) or numbers != list(range(len(own))):
        return None
    return dict(enumerate(own))


def compared_labels(samples, reference, drawn_from: torch.Tensor | None, draws: bool) -> ComparedLabels:
    """The labels that class_fid is computed by.

    Args:
        samples, reference: The sets of images.
        drawn_from: Of samples that a model draws, their classes in the reference, as `labels_to_draw` has them.
        draws: Whether a model draws the samples.

    Raises:
        UserError: A side has no classes, or they cannot be matched.
    """
    if reference.labels is None:
        raise UserError("class_fid needs classes, and the reference has none: give it sub-folders, one a class.")
    names = reference.classes or None
    if drawn_from is not None:
        return ComparedLabels(drawn_from, reference.labels, names)
    if samples.labels is None:
        raise UserError(
            "class_fid needs classes, and the samples have none: give them sub-folders, one a class, or an npz arr_1."
        )
    if draws:
        raise UserError(
            "class_fid: the classes of the reference cannot be matched with those of the model, by name or by number."
        )
    if not samples.classes:  # of an npz: numbers
        if names is not None and not 0 <= int(samples.labels.min()) <= int(samples.labels.max()) < len(names):
            raise UserError(
                f"class_fid: labels of the samples are in {int(samples.labels.min())}..{int(samples.labels.max())}, "
                f"and the reference has {len(names)} classes."
            )
        return ComparedLabels(samples.labels, reference.labels, names)
    if names is None:
        raise UserError("class_fid: classes of the samples have names, and those of the reference only numbers.")
    number_of = {_as_folder(name): label for label, name in names.items()} | {n: label for label, n in names.items()}
    unknown = [name for name in samples.classes.values() if name not in number_of]
    if unknown:
        raise UserError(f"class_fid: the reference has no class {unknown[0]!r}, which the samples have.")
    renumbered = torch.tensor([number_of[samples.classes[label]] for label in range(len(samples.classes))])
    return ComparedLabels(renumbered[samples.labels], reference.labels, names)
