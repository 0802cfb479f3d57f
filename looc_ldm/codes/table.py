"""Tables of code sequences, to train autoregressive priors on: parquet files with one row per image.

`datasets.load_dataset` reads them. `docs/looc_format.md` describes the columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from looc_ldm.codes.looc_file import CodesError, ImageCodes, index_dtype
from looc_ldm.utils.errors import DataError, one_line
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
    """Write rows to a parquet file, beside its place and then renamed, one row group at a time.

    Args:
        file: Parquet file.
        rows: All of one codebook, with a label if there are `classes`.
        num_codevectors: K. Codes are stored as the smallest unsigned integers that hold them.
        classes: Names of the classes; empty for a table without the column `label`.

    Raises:
        DataError: The name of a class or of an image is not UTF-8, which parquet asks for.
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
        raise DataError(f"the name {name!r} is not UTF-8, which --format parquet asks for: rename it.") from None


def read_code_table(file: Path) -> Iterator[TableRow]:
    """Yield the rows of a table that `write_code_table` wrote, a few at a time, without their labels.

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
    """Return the names of the images in a table, in order.

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
    """Return the names of the PNG files that the images in a table become.

    `.png` takes the place of the suffix. If a name would then stand for two images, or for an image and a folder,
    `.png` is appended to all names of the table.
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


def _groups(rows: Iterable[TableRow]) -> Iterator[list[dict]]:
    """Yield the rows of each row group, by column."""
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
        raise CodesError(f"cannot read {str(file)!r}: {one_line(error)}") from None
