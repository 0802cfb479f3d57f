"""Tables of code sequences, to train autoregressive priors on: parquet files with one row per image.

`datasets.load_dataset` reads them. docs/looc_format.md describes the columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from looc_ldm.codes.looc_file import MAX_CODEVECTORS, CodesError, ImageCodes, index_dtype
from looc_ldm.utils.errors import DataError, one_line
from looc_ldm.utils.files import is_relative_name, renamed_when_complete

CODES_PER_GROUP = 2**22  # codes in a row group, which is held in memory, at 1 to 4 bytes per code
ROWS_AT_ONCE = 64  # rows that are read at a time


@dataclass(frozen=True)
class TableRow:
    """A row of a table."""

    codes: ImageCodes
    file: str  # name of the image: a relative path with `/`, different in every row
    label: int | None = None  # index of the class


def write_code_table(file: Path, rows: Iterable[TableRow], num_codevectors: int, classes: list[str]) -> None:
    """Write rows to a parquet file atomically, one row group at a time.

    Args:
        file: Parquet file.
        rows: Rows of one codebook, with a label if there are `classes`.
        num_codevectors: K. Codes are stored in the smallest unsigned dtype that holds them.
        classes: Names of the classes; empty for a table without the column `label`.

    Raises:
        DataError: The name of a class or of an image is not UTF-8, as parquet requires.
    """
    for name in classes:
        _check_utf8(name)
    features = _features(num_codevectors, classes)
    schema = features.arrow_schema  # with the features in its metadata, so that `datasets` finds the names of classes
    with renamed_when_complete(file) as partial, pq.ParquetWriter(partial, schema, write_page_checksum=True) as writer:
        for group in _groups(rows):
            writer.write_table(pa.Table.from_pylist(group, schema))


def _check_utf8(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"the name {name!r} is not UTF-8, as --format parquet requires: rename it.") from None


def read_code_table(file: Path) -> Iterator[TableRow]:
    """Yield the rows of a table that `write_code_table` wrote, a few at a time, without their labels.

    Raises:
        CodesError: The file is of a different kind, or damaged.
    """
    columns = ["height", "width", "latent_shape", "num_codevectors", "fingerprint", "file", "codes"]
    for batch in _batches(file, columns):
        values = [batch[name].to_pylist() for name in columns[:-1]]
        for *fields, shape, num_codevectors, fingerprint, name, codes in zip(*values, batch["codes"], strict=True):
            try:
                indices = codes.values.to_numpy(zero_copy_only=False).reshape(shape)
                row = TableRow(ImageCodes(indices, *fields, num_codevectors, fingerprint), name)
            except (ValueError, TypeError) as error:  # TypeError: a side in latent_shape is missing
                raise CodesError(f"cannot read {str(file)!r}: row of {name!r}: {error}") from None
            yield row


def image_names(file: Path) -> list[tuple[str, PurePosixPath]]:
    """Return the name of each image in a table, in order, with the relative path of the PNG file that it becomes.

    `.png` takes the place of the suffix. If a path would then stand for two images, or for an image and a folder,
    `.png` is appended to all names of the table.

    Raises:
        CodesError: The file is of a different kind or damaged, or a name points out of the folder it is put into.
    """
    names = [name for batch in _batches(file, ["file"]) for name in batch["file"].to_pylist()]
    for name in names:
        if not is_relative_name(name):
            raise CodesError(f"cannot read {str(file)!r}: {name!r} is not a relative name of a file.")
    paths = [PurePosixPath(name).with_suffix(".png") for name in names]
    distinct = set(paths)
    if len(distinct) < len(names) or not distinct.isdisjoint(parent for path in paths for parent in path.parents):
        paths = [PurePosixPath(f"{name}.png") for name in names]
    return list(zip(names, paths, strict=True))


def _features(num_codevectors: int, classes: list[str]) -> datasets.Features:
    return datasets.Features(
        {
            "codes": datasets.List(datasets.Value(str(index_dtype(num_codevectors)))),
            **({"label": datasets.ClassLabel(names=classes)} if classes else {}),
            "height": datasets.Value("int32"),
            "width": datasets.Value("int32"),
            "latent_shape": datasets.List(datasets.Value("int32"), length=3),
            "num_codevectors": datasets.Value("int32"),
            "file": datasets.Value("string"),
            "fingerprint": datasets.Value("string"),
        }
    )


def _groups(rows: Iterable[TableRow]) -> Iterator[list[dict]]:
    """Yield the rows of each row group."""
    group, size = [], 0
    for row in rows:
        _check_utf8(row.file)
        codes = row.codes
        columns = {
            "codes": codes.indices.reshape(-1),
            "label": row.label,
            "height": codes.height,
            "width": codes.width,
            "latent_shape": codes.indices.shape,
            "num_codevectors": codes.num_codevectors,
            "file": row.file,
            "fingerprint": codes.fingerprint,
        }
        group.append(columns)
        size += codes.indices.size
        if size >= CODES_PER_GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _batches(file: Path, columns: list[str]) -> Iterator[pa.Table]:
    """Yield these columns of a few rows at a time, in the types of the widest table that `write_code_table` writes."""
    widest = _features(MAX_CODEVECTORS, []).arrow_schema
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as table:
            missing = [name for name in widest.names if name not in table.schema_arrow.names]
            if missing:
                raise CodesError(f"{str(file)!r} is not a table of codes: it has no column {missing[0]!r}.")
            # Other programs widen integers when they write a table again.
            schema = pa.schema([widest.field(name) for name in columns])
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
                rows = pa.Table.from_batches([batch]).select(columns).cast(schema)
                empty = [name for name in columns if rows[name].null_count]
                if empty:
                    raise CodesError(f"cannot read {str(file)!r}: a value of the column {empty[0]!r} is missing.")
                yield rows
    except (OSError, pa.ArrowException) as error:
        raise CodesError(f"cannot read {str(file)!r}: {one_line(error, file)}") from None
