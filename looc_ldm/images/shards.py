"""Find shards of images in a folder: parquet files and WebDataset's tars."""

from __future__ import annotations

import logging
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow.parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from looc_ldm.images.config import DataConfig
from looc_ldm.images.folders import LABEL_FILES, split_folders_of
from looc_ldm.images.source import SPLIT_NAMES
from looc_ldm.utils.errors import DataError, one_line

KINDS = {".parquet": "parquet", ".tar": "webdataset"}  # names in `datasets`, by the suffix of the files

logger = logging.getLogger(__name__)


class Shards(NamedTuple):
    """The shards of a folder.

    Attributes:
        kind (`str`): "parquet" or "webdataset".
        files (`dict[str, list[str]]`): The files of each split.
    """

    kind: str
    files: dict[str, list[str]]

    def builder(self) -> datasets.DatasetBuilder:
        """Return the `DatasetBuilder` that reads the shards."""
        if self.kind == "webdataset":
            return OneImageColumn(data_files=self.files)
        return datasets.load_dataset_builder(self.kind, data_files=self.files)


class OneImageColumn(WebDataset):
    """WebDataset that moves a sample's only image to the column `image`, so that samples may differ in file suffix."""

    @classmethod
    def _get_pipeline_from_tar(cls, tar_path, tar_iterator):
        for sample in super()._get_pipeline_from_tar(tar_path, tar_iterator):
            images = [name for name in sample if name.rsplit(".", 1)[-1].lower() in cls.IMAGE_EXTENSIONS]
            if len(images) == 1:
                sample["image"] = {"bytes": sample.pop(images[0]), "path": f"{sample['__key__']}.{images[0]}"}
            yield sample


def find_shards(folder: Path, config: DataConfig) -> Shards | None:
    """Find the parquet files or WebDataset shards of a folder; None if there are none.

    They are in sub-folders with the names of splits. If there are none, they are in the folder or its `data`
    (as on the hub). The split is then the first split name among the words of a file's name
    (`imagenet1k-train-0003.tar`), else it is `train`.

    Raises:
        DataError: A shard that is damaged, cut off or compressed.
    """
    places = split_folders_of(folder) or [(folder.resolve(), None), (folder.resolve() / "data", None)]
    found: dict[str, dict[str, list[str]]] = {}
    for suffix in KINDS:
        for place, split in places:
            for file in sorted(place.glob(f"*{suffix}")):
                if file.name in LABEL_FILES or not has_images(file):
                    continue
                words = [SPLIT_NAMES.get(word) for word in re.split(r"[-_.]", file.name.lower())]
                split_of_file = split or next(filter(None, words), "train")
                found.setdefault(suffix, {}).setdefault(split_of_file, []).append(str(file))
    if ".tar" in found and ".parquet" in found:  # img2dataset writes tables of metadata beside its shards
        first = next(iter(found[".parquet"].values()))[0]
        del found[".tar" if config.image_column in pyarrow.parquet.read_schema(first).names else ".parquet"]
    return next((Shards(KINDS[suffix], files) for suffix, files in found.items()), None)


def has_images(file: Path) -> bool:
    """Whether a shard is not empty; warn if it is. Always True for remote files.

    Raises:
        DataError: The shard is damaged or compressed, or a tar is cut off, which its reader may not notice.
    """
    if not file.is_file():
        return True
    if file.suffix == ".parquet":
        try:
            rows = pyarrow.parquet.read_metadata(file).num_rows
        except pyarrow.ArrowException as error:
            raise DataError(f"cannot read {file}: {one_line(error)}") from None
        if not rows:
            logger.warning("%s is empty", file)
        return rows > 0
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
