"""Match the classes of a model or of samples with the classes of a reference; name the folders of classes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from looc_ldm.commands.image_sets import DrawnImages
from looc_ldm.utils.errors import UserError

FOLDER_BYTES = 90  # in a name; the number of a class may follow
DEVICE = re.compile(r"(con|prn|aux|nul|(com|lpt)\d)(\.|$)", re.IGNORECASE)  # Windows has no folder of such a name


def class_folders(names: Mapping[int, str]) -> dict[int, str]:
    """Return a folder name for each class: valid on every system, unique without case, at most 100 bytes."""
    folders: dict[int, str] = {}
    taken: set[str] = set()
    for label, name in names.items():
        valid = re.sub(r'[\x00-\x1f<>:"/\\|?*]', "-", name).encode(errors="ignore")[:FOLDER_BYTES]
        # Folders that begin with a dot or "__" are hidden.
        stem = valid.decode(errors="ignore").lstrip("._ ").rstrip(". ") or str(label)
        stem = f"-{stem}" if DEVICE.match(stem) else stem
        folder, number = stem, label
        while folder.casefold() in taken:
            folder, number = f"{stem} ({number})", number + 1
        taken.add(folder.casefold())
        folders[label] = folder
    return folders


def labels_to_draw(pipe, reference, count: int) -> tuple[list[int | None], torch.Tensor | None]:
    """Return a class for each of `count` samples.

    If all images of the reference have one of the model's classes, each class gets its share of the reference, else all
    get equal shares.

    Returns:
        The pipeline's labels, None for no class; and, if they come from the reference, their numbers there.
    """
    if not pipe.num_class_embeds:
        return [None] * count, None
    own = pipe.class_ids
    all_have_one = reference.labels is not None and bool((reference.labels >= 0).all())
    label_of = _labels_of_pipe(pipe, own, reference) if all_have_one else None
    if label_of is None:
        return [own[i * len(own) // count] for i in range(count)], None
    # From places at even distances: samples and reference then have the same share of each class.
    drawn_from = reference.labels.sort().values[torch.arange(count) * len(reference.labels) // count]
    return [label_of[label] for label in drawn_from.tolist()], drawn_from


def _labels_of_pipe(pipe, own: list[int], reference) -> Mapping[int, int] | None:
    """Return the pipeline's label of each class of the reference; None if the classes differ.

    Classes match by name; if one side has only numbers and both have as many classes, by number.
    """
    found = {label: pipe.labels.get(name.casefold(), []) for label, name in reference.classes.items()}
    if found and all(len(labels) == 1 for labels in found.values()):
        return {label: labels[0] for label, labels in found.items()}
    own_names = [name for name, labels in pipe.labels.items() if set(labels) & set(own)]
    if all(any(not name.isdecimal() for name in names) for names in (own_names, reference.classes.values())):
        return None  # numbers would match different classes
    numbers = sorted(reference.classes) or reference.labels.unique().tolist()
    return dict(enumerate(own)) if numbers == list(range(len(own))) else None


def compared_labels(samples, reference, drawn_from: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the labels of the samples `(n,)` and of the reference `(m,)`, both numbered as in the reference.

    `drawn_from` comes from `labels_to_draw`. Raises UserError if a side has no classes, or they cannot be matched.
    """
    for images, side in ((samples, "samples have"), (reference, "reference has")):
        if images.labels is None:
            raise UserError(f"class_fid: the {side} no classes: give it one sub-folder per class.")
        if (images.labels < 0).any():
            raise UserError(f"class_fid: the {side} images without a class.")
    if drawn_from is not None:
        return drawn_from, reference.labels
    if isinstance(samples, DrawnImages):
        raise UserError("class_fid: the model and the reference have different classes, by name and by number.")
    names = reference.classes
    if not samples.classes:  # an npz has only numbers
        if names and not set(samples.labels.tolist()) <= set(names):
            raise UserError(f"class_fid: labels of the samples must be in [0, {len(names)}), as in the reference.")
        return samples.labels, reference.labels
    number_of = {folder: label for label, folder in class_folders(names).items()}
    number_of |= {name: label for label, name in names.items()}
    unknown = [name for name in samples.classes.values() if name not in number_of]
    if unknown:
        raise UserError(f"class_fid: the reference has no class {unknown[0]!r}, which the samples have.")
    renumbered = torch.tensor([number_of[samples.classes[label]] for label in range(len(samples.classes))])
    return renumbered[samples.labels], reference.labels
