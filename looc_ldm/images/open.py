"""Open what `data.path` names: a folder of images, tables, shards, LMDBs, or a data set on the hub."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import datasets
import pyarrow as pa
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

import looc_ldm
from looc_ldm.images import lsun
from looc_ldm.images.config import DataConfig
from looc_ldm.images.folders import ALL, first_image, image_folder, split_folders_of
from looc_ldm.images.shards import find_shards
from looc_ldm.images.source import SPLIT_NAMES, Source
from looc_ldm.images.tables import open_tables
from looc_ldm.utils.errors import DataError, one_line

BUNDLED = Path(looc_ldm.__file__).resolve().parent / "data"  # one folder of parquet files per data set


def names_of_split(name: str | None) -> tuple[str, ...]:
    """Return the names that a split may have: the one in the setting, or the usual one (`validation` for `val`)."""
    return tuple(dict.fromkeys((name, SPLIT_NAMES.get(name.lower(), name)))) if name else ()


def split_name(splits: Iterable[str], setting: str, config: DataConfig) -> str:
    """Return the split that `data.split` or `data.validation_split` names.

    Raises:
        DataError: There is none.
    """
    name = getattr(config, setting)
    for called in names_of_split(name):
        if called in splits:
            return called
    hint = ""
    if setting == "validation_split" and not config.streaming:
        hint = " --data.validation_split null holds out some of the training images."
    raise DataError(f"data.{setting}={name!r}: {config.path} has the splits {', '.join(splits)}.{hint}")


def open_sources(config: DataConfig, wanted: Collection[str] | None = None) -> dict[str, Source]:
    """Return the splits of what `data.path` names.

    Args:
        wanted: Names of the splits to read labels for; all if not given. Other splits of a table get no labels, since
            their labels may be invalid.

    Raises:
        DataError: The data does not exist, cannot be loaded, or does not fit `data.num_classes`.
    """
    try:
        splits = _open_sources(config, wanted)
    except DataError:
        raise
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot load data.path={config.path!r}: {_reason(error)}") from error
    for name, source in splits.items():
        if source.classes and config.num_classes not in (None, len(source.classes)):
            raise DataError(
                f"data.num_classes={config.num_classes}: the split {name} of {config.path} has "
                f"{len(source.classes)} classes."
            )
    if config.num_classes is not None and not any(source.classes for source in splits.values()):
        raise DataError(f"data.num_classes={config.num_classes}: {config.path} has no labels.")
    return splits


def _open_sources(config: DataConfig, wanted: Collection[str] | None) -> dict[str, Source]:
    folder = folder_of(config)
    if folder is None:
        check_on_hub(config)
        rows = datasets.load_dataset(config.path, config.name, revision=config.revision)
        return open_tables(rows, config, wanted)
    if (folder / "dataset_dict.json").is_file():
        return open_tables(datasets.load_from_disk(folder), config, wanted)
    if (folder / "dataset_info.json").is_file():
        return open_tables({"train": datasets.load_from_disk(folder)}, config, wanted)
    shards = find_shards(folder, config) if config.split != ALL else None
    if shards is not None:
        if first_image(folder) is not None:
            raise DataError(f"{folder} holds images beside {shards.kind} files: give a folder of only one kind.")
        builder = shards.builder()
        builder.download_and_prepare()
        return open_tables(builder.as_dataset(), config, wanted)
    lmdbs = lsun.find_lmdbs(folder)
    if lmdbs is not None:
        return {split: lsun.LmdbSource(lmdb) for split, lmdb in lmdbs.items()}
    return image_folder(folder, [] if config.split == ALL else split_folders_of(folder), config)


def folder_of(config: DataConfig) -> Path | None:
    """Return the folder that `data.path` names; None if it is the id of a data set on the hub.

    Raises:
        DataError: The path is neither a bundled data set, a folder, nor a hub id.
    """
    bundled = sorted({file.parent.name for file in BUNDLED.glob("*/*.parquet")})  # these folders also hold a model
    folder = BUNDLED / config.path if config.path in bundled else Path(config.path).expanduser()
    if config.path and folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or config.path.count("/") != 1:
        raise DataError(
            f"data.path={config.path!r} is neither bundled ({', '.join(bundled)}), a folder, nor a hub id (user/name)."
        )
    return None


def check_on_hub(config: DataConfig) -> None:
    """Raise DataError at once if the hub lacks the data set or cannot be reached; `datasets` would retry for 20 s."""
    try:
        HfApi().dataset_info(config.path, timeout=10)
    except RepositoryNotFoundError:
        raise DataError(f"there is no folder {config.path!r}, nor a data set of that name on the hub.") from None
    except Exception as error:  # errors of networks have no common base
        user, name = config.path.split("/")
        prepared = Path(datasets.config.HF_DATASETS_CACHE) / f"{user}___{datasets.naming.camelcase_to_snakecase(name)}"
        if not prepared.is_dir():  # otherwise `datasets` reads its cache
            message = f"there is no folder {config.path!r}; the hub cannot be reached: {one_line(error)}"
            raise DataError(message) from None


def _reason(error: Exception) -> str:
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__  # the error itself only says that something happened
    return " ".join(str(error).strip().split("\n")[:2]) or type(error).__name__
