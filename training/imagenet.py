"""ImageNet as it is distributed: training images in folders of their classes, validation images in one flat folder.

The classes of the latter are in a file: Kaggle's `LOC_val_solution.csv`, lists of "file class" as they go with Caffe,
or `ILSVRC2012_validation_ground_truth.txt` of the development kit, whose numbers `meta.mat` explains.
"""

from __future__ import annotations

from pathlib import Path

from looc_ldm.errors import DataError
from looc_ldm.training.sources import IMAGE_SUFFIXES, FileSource, Source


def labelled_validation(splits: dict[str, Source], labels_file: Path) -> FileSource:
    """The images of the split `validation` with the classes that a file gives them, which are those of `train`.

    Raises:
        DataError: The file cannot be read, or file, images and classes do not go together.
    """
    train, validation = splits.get("train"), splits.get("validation")
    if train is None or validation is None or not train.classes or validation.classes:
        raise DataError(
            "data.validation_labels goes with a folder `train` that has a folder for each class and a folder `val` "
            "that has none."
        )
    files = [validation.read(index).content for index in range(len(validation))]
    lines = _lines(labels_file)
    if all(len(line) == 1 and line[0].isdecimal() for line in lines):
        labels = _by_ilsvrc_id([int(line[0]) for line in lines], labels_file, len(files), train.classes)
    else:
        labels = _by_name(lines, labels_file, [Path(file).stem for file in files], train.classes)
    return FileSource(files, labels, train.classes)


def _lines(file: Path) -> list[list[str]]:
    try:
        return [line.split() for line in file.read_text().replace(",", " ").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise DataError(f"cannot read data.validation_labels={str(file)!r}: {reason}.") from None


def _by_name(lines: list[list[str]], file: Path, images: list[str], classes: list[str]) -> list[int]:
    """Labels of images, from lines of the name, with or without a suffix, and the class: its folder or its number."""
    index = {name: label for label, name in enumerate(classes)}
    stated: dict[str, int] = {}
    for name, *words in lines:
        if name == "ImageId":  # the header of Kaggle's file
            continue
        image = Path(name).stem if name.lower().endswith(IMAGE_SUFFIXES) else name
        if not words:
            raise DataError(f"{file}: no class beside {name!r}; lines hold the name of a file and its class.")
        if image in stated:
            raise DataError(f"{file} names {name} twice.")
        label = index.get(words[0], int(words[0]) if words[0].isdecimal() else -1)
        if not 0 <= label < len(classes):
            raise DataError(
                f"{file}: {name} has the class {words[0]!r}, which is neither one of the {len(classes)} folders of the "
                f"training images nor a number below {len(classes)}."
            )
        stated[image] = label
    without = [image for image in images if image not in stated]
    if without:
        raise DataError(f"{file} has no class for {len(without)} of the {len(images)} validation images: {without[0]}.")
    if len(stated) > len(images):
        missing = sorted(stated.keys() - set(images))
        raise DataError(f"{len(missing)} of the {len(stated)} validation images in {file} are missing: {missing[0]}.")
    return [stated[image] for image in images]


def _by_ilsvrc_id(ids: list[int], file: Path, num_images: int, classes: list[str]) -> list[int]:
    """Labels of images in the order of their names, from the numbers of the development kit."""
    if len(ids) != num_images:
        raise DataError(f"{file} has {len(ids)} classes, and there are {num_images} validation images.")
    names = _names_by_ilsvrc_id(file.with_name("meta.mat"))
    index = {name: label for label, name in enumerate(classes)}
    for number in ids:
        if names.get(number) not in index:
            known = f"is {names[number]}, which is no folder of the training images" if number in names else "is none"
            raise DataError(f"{file}: the class {number} {known}.")
    return [index[names[number]] for number in ids]


def _names_by_ilsvrc_id(file: Path) -> dict[int, str]:
    """WordNet ids (n01440764) by the numbers of the development kit, which are not in their order."""
    import scipy.io

    if not file.is_file():
        raise DataError(f"the numbers of the development kit need its meta.mat beside them: {str(file)!r} is missing.")
    try:
        synsets = scipy.io.loadmat(file, squeeze_me=True)["synsets"]
        return {int(number): str(name) for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    except Exception as error:  # what scipy raises on files that are something else has no common base
        raise DataError(f"cannot read {str(file)!r}: {' '.join(str(error).split())}") from None
