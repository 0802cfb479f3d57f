"""Tables of code sequences: parquet files that `datasets.load_dataset` reads, a row an image.

`docs/looc_format.md` describes the columns. What autoregressive priors are trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from looc_ldm.codes.looc_file import CodesError, ImageCodes, index_dtype
from looc_ldm.utils.files import is_relative_name, renamed_when_complete

CODES_PER_GROUP = 2**22  # of a row group: what is held in memory, at 1 to 4 bytes a code
ROWS_AT_ONCE = 64  # read at a time
COLUMNS = ("codes", "height", "width", "latent_shape", "num_codevectors", "file", "fingerprint")


@dataclass(frozen=True)
class TableRow:
    """A row of a table.

    Args:
        codes: The codes of the image.
        file: Name of the image: a relative path with `/`, different in every row.
        label: Index of the class; None where there are no classes.
    """

    codes: ImageCodes
    file: str
    label: int | None = None


def write_code_table(file: Path, rows: Iterable[TableRow], num_codevectors: int, classes: list[str]) -> None:
    """Write rows to a parquet file, beside its place and then renamed, a row group at a time.

    Args:
        file: Parquet file.
        rows: All of one codebook, with a label if there are `classes`.
        num_codevectors: K. Codes are stored as the smallest unsigned integers that hold them.
        classes: Names of the classes; empty for a table without the column `label`.
    """
    features = _features(num_codevectors, classes)
    schema = features.arrow_schema  # with the features in its metadata, so that `datasets` finds the names of classes
    with renamed_when_complete(file) as partial, pq.ParquetWriter(partial, schema, write_page_checksum=True) as writer:
        for group in _groups(rows):
            writer.write_table(_table(group, schema))


def read_code_table(file: Path) -> Iterator[TableRow]:
    """The rows of a table that `write_code_table` wrote, a few at a time, without their labels.

    Raises:
        CodesError: Another kind of file, or one that is damaged.
    """
    for batch in _record_batches(file, COLUMNS):
        for i in range(batch.num_rows):
            codes, *rest = (batch.column(name)[i] for name in COLUMNS)
            height, width, shape, num_codevectors, name, fingerprint = (value.as_py() for value in rest)
            try:
                missing = [column for column in COLUMNS if not batch.column(column)[i].is_valid]
                if missing:
                    raise ValueError(f"its {missing[0]} is missing.")
                indices = codes.values.to_numpy(zero_copy_only=False).reshape(shape)
                row = TableRow(ImageCodes(indices, height, width, num_codevectors, fingerprint), name)
            except (ValueError, TypeError) as error:  # TypeError: a side in latent_shape that is missing
                raise CodesError(f"cannot read {str(file)!r}: row of {name!r}: {error}") from None
            yield row


def file_names(file: Path) -> list[PurePosixPath]:
    """The names of the images in a table, in order.

    Raises:
        CodesError: Another kind of file, one that is damaged, or a name that points out of the folder it is put into.
    """
    names = []
    for batch in _record_batches(file, ("file",)):
        try:
            read = batch.column("file").to_pylist()
        except UnicodeDecodeError:
            raise CodesError(f"cannot read {str(file)!r}: the name of a file is not UTF-8.") from None
        for name in read:
            if not is_relative_name(name or ""):
                raise CodesError(f"cannot read {str(file)!r}: {name!r} is not a relative name of a file.")
            names.append(PurePosixPath(name))
    return names


def image_names(names: list[PurePosixPath]) -> list[PurePosixPath]:
    """The names of the PNG files that the images in a table become.

    `.png` takes the place of the suffix. Where then two images would become one file, or one a file and another a file
    in a folder of that name, `.png` is appended to all names of the table.
    """
    replaced = [name.with_suffix(".png") for name in names]
    distinct = set(replaced)
    if len(distinct) == len(names) and distinct.isdisjoint(parent for name in replaced for parent in name.parents):
        return replaced
    return [name.with_name(f"{name.name}.png") for name in names]


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


def _groups(rows: Iterable[TableRow]) -> Iterator[list[TableRow]]:
    group, size = [], 0
    for row in rows:
        group.append(row)
        size += row.codes.indices.size
        if size >= CODES_PER_GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _table(rows: list[TableRow], schema: pa.Schema) -> pa.Table:
    flat = [row.codes.indices.reshape(-1) for row in rows]
    offsets = pa.array([0, *accumulate(len(codes) for codes in flat)], pa.int32())
    values = pa.array(np.concatenate(flat), schema.field("codes").type.value_type)
    columns = {
        "codes": pa.ListArray.from_arrays(offsets, values),
        "label": [row.label for row in rows],
        "height": [row.codes.height for row in rows],
        "width": [row.codes.width for row in rows],
        "latent_shape": [row.codes.indices.shape for row in rows],
        "num_codevectors": [row.codes.num_codevectors for row in rows],
        "file": [row.file for row in rows],
        "fingerprint": [row.codes.fingerprint for row in rows],
    }
    return pa.table({name: columns[name] for name in schema.names}, schema)


def _is_text(found: pa.DataType) -> bool:
    return pa.types.is_string(found) or pa.types.is_large_string(found)


def _is_list_of_integers(found: pa.DataType) -> bool:
    kinds = pa.types
    is_list = kinds.is_list(found) or kinds.is_large_list(found) or kinds.is_fixed_size_list(found)
    return is_list and kinds.is_integer(found.value_type)


# By column. Integers of other widths are taken: other programs widen them when they write a table again.
_EXPECTED = {
    **dict.fromkeys(("codes", "latent_shape"), (_is_list_of_integers, "lists of integers")),
    **dict.fromkeys(("height", "width", "num_codevectors"), (pa.types.is_integer, "integers")),
    **dict.fromkeys(("file", "fingerprint"), (_is_text, "text")),
}


def _record_batches(file: Path, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as table:
            missing = [name for name in COLUMNS if name not in table.schema_arrow.names]
            if missing:
                raise CodesError(f"{str(file)!r} is not a table of codes: it has no column {missing[0]!r}.")
            for name, (is_right, expected) in _EXPECTED.items():
                found = table.schema_arrow.field(name).type
                if not is_right(found):
                    raise CodesError(
                        f"{str(file)!r} is not a table of codes: its column {name!r} holds {found}, not {expected}."
                    )
            yield from table.iter_batches(ROWS_AT_ONCE, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise CodesError(f"cannot read {str(file)!r}: {' '.join(str(error).split())}") from None
