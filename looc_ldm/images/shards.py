"""Shards of images: parquet files and WebDataset's tars in a folder, and what `datasets` needs to know of them."""

from __future__ import annotations

import logging
import re
import tarfile
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from looc_ldm.images.config import DataConfig
from looc_ldm.images.folders import split_folders_of
from looc_ldm.images.source import SPLIT_NAMES
from looc_ldm.utils.errors import DataError

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}  # of datasets, by the suffix of shards
# Fields of WebDataset that hold the image of a sample, besides those of the first samples.
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "JPG", "JPEG", "PNG")

logger = logging.getLogger(__name__)


class Shards(NamedTuple):
    """Shards of a folder.

    Attributes:
        builder (`str`): Name of the builder of `datasets`.
        files (`dict[str, list[str]]`): The files of each split.
        features (`datasets.Features`, *optional*): The columns; None if the files say.
        images (`tuple[str, ...]`): Columns of which each row has its image in one; empty if the files say.
    """

    builder: str
    files: dict[str, list[str]]
    features: datasets.Features | None = None
    images: tuple[str, ...] = ()


def find_shards(folder: Path, config: DataConfig) -> Shards | None:
    """Find the parquet files or WebDataset shards of a folder; None if there are none.

    They lie in sub-folders that are splits, or if there are none, in the folder or in its `data` (as on the hub).
    The split is then the first word of a file's name that is one (`imagenet1k-train-0003.tar`), else it is `train`.

    Raises:
        DataError: A tar that is cut off or compressed.
    """
    places = split_folders_of(folder) or [(folder.resolve(), None), (folder.resolve() / "data", None)]
    found: dict[str, dict[str, list[str]]] = {}
    for suffix in BUILDERS:
        for place, split in places:
            for file in sorted(place.glob(f"*{suffix}")):
                if suffix == ".tar" and not has_images(file):
                    continue
                words = [SPLIT_NAMES.get(word) for word in re.split(r"[-_.]", file.name.lower())]
                split_of_file = split or next(filter(None, words), "train")
                found.setdefault(suffix, {}).setdefault(split_of_file, []).append(str(file))
    if ".tar" in found and ".parquet" in found:  # img2dataset writes tables of metadata beside its shards
        first = next(iter(found[".parquet"].values()))[0]
        del found[".tar" if config.image_column in pa.parquet.read_schema(first).names else ".parquet"]
    if ".tar" in found:
        return _web_dataset(found[".tar"], config)
    return Shards("parquet", found[".parquet"]) if found else None


def has_images(file: Path) -> bool:
    """Whether a tar holds anything; a warning says if it does not. Files elsewhere do.

    Raises:
        DataError: It is compressed, or cut off, which the archive's reader may take for its end.
    """
    if file.suffix != ".tar" or not file.is_file():
        return True
    with file.open("rb") as tar:
        head = tar.read(tarfile.BLOCKSIZE)
        if head.startswith(b"\x1f\x8b"):
            raise DataError(f"cannot read {file}: the archive is compressed with gzip; shards must not be.")
        tar.seek(max(file.stat().st_size - tarfile.BLOCKSIZE, 0))
        if any(tar.read()):
            raise DataError(f"cannot read {file}: the archive is cut off, as it does not end in zeros.")
    if not any(head):
        logger.warning("%s is empty", file)
    return any(head)


def _web_dataset(files: dict[str, list[str]], config: DataConfig) -> Shards:
    """Find the columns of tars. `datasets` alone knows one kind of image only, that of the first samples."""
    first = next(iter(files.values()))[0]
    with tarfile.open(first) as tar:
        members = ((member.name, tar.extractfile(member)) for member in tar if member.isfile())
        samples = list(islice(WebDataset._get_pipeline_from_tar(first, members), 5))

    def is_image(field: str) -> bool:
        return field.rsplit(".", 1)[-1].lower() in WebDataset.IMAGE_EXTENSIONS

    for sample in samples:
        if sum(map(is_image, sample)) > 1 and config.image_column not in sample:
            raise DataError(f"data.image_column={config.image_column!r}: {config.path} has {', '.join(sample)}.")
    others = [{name: value for name, value in sample.items() if not is_image(name)} for sample in samples]
    tables = [pa.Table.from_pylist([sample]) for sample in others]
    features = datasets.Features.from_arrow_schema(pa.concat_tables(tables, promote_options="default").schema)
    seen = {name: None for sample in samples for name in sample if is_image(name)}
    images = tuple(dict.fromkeys((*seen, *IMAGE_FIELDS)))
    features |= {name: datasets.Image() for name in images}
    return Shards("webdataset", files, datasets.Features(features), images)
