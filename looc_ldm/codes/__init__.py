"""Codes on disk: `.looc` files and tables."""

from looc_ldm.codes.looc_file import (
    CodesError,
    ImageCodes,
    bits_per_code,
    index_dtype,
    pack,
    packed_bytes,
    read_codes,
    unpack,
    write_codes,
)

__all__ = [
    "CodesError",
    "ImageCodes",
    "bits_per_code",
    "index_dtype",
    "pack",
    "packed_bytes",
    "read_codes",
    "unpack",
    "write_codes",
]
