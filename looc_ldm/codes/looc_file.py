"""`.looc` files: the codes of one image, packed at ceil(log2 K) bits behind a header of 49 bytes.

docs/looc_format.md describes every byte. `looc_ldm.codes.images` encodes and decodes images.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from looc_ldm.utils.errors import UserError
from looc_ldm.utils.files import replace_bytes

MAGIC = b"LOOC"
VERSION = 1
MAX_CODEVECTORS = 2**24
FINGERPRINT_BYTES = 16  # the first half of the model's fingerprint of 32 bytes: enough to tell models apart
# Magic, version, image height and width, h, w, C, K, fingerprint; then the CRC-32 of all this and of the payload.
_FIELDS = struct.Struct("<4sB6I16s")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size


class CodesError(UserError):
    """Codes are damaged, or from a different model."""


@dataclass(frozen=True, eq=False)
class ImageCodes:
    """The codes of one image.

    Args:
        indices (`np.ndarray` of shape `(h, w, C)`, of integers): The codes, in [0, K).
        height: Height of the image in pixels; the network saw it padded to a multiple of its downsampling factor.
        width: Width of the image in pixels.
        num_codevectors: K, at least 2 and at most 2**24.
        fingerprint: 32 hexadecimal digits, the first half of the `model_fingerprint` of the model that made them.

    Raises:
        ValueError: A size or a code is out of range, or the fingerprint has the wrong length.
    """

    indices: np.ndarray
    height: int
    width: int
    num_codevectors: int
    fingerprint: str

    def __post_init__(self):
        indices = self.indices
        if indices.ndim != 3 or indices.dtype.kind not in "iu" or indices.size == 0:
            raise ValueError(f"codes must be integers (h, w, C), got {indices.dtype} of {indices.shape}.")
        if not 2 <= self.num_codevectors <= MAX_CODEVECTORS:
            raise ValueError(f"num_codevectors must be in [2, {MAX_CODEVECTORS}], got {self.num_codevectors}.")
        for name, size in (("height", self.height), ("width", self.width)):
            if not 1 <= size < 2**32:
                raise ValueError(f"{name} must be in [1, 2**32), got {size}.")
        lowest, highest = int(indices.min()), int(indices.max())
        if lowest < 0 or highest >= self.num_codevectors:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"codes must be in [0, {self.num_codevectors}), got {wrong}.")
        if len(bytes.fromhex(self.fingerprint)) != FINGERPRINT_BYTES:
            raise ValueError(f"fingerprint must have {2 * FINGERPRINT_BYTES} digits, got {self.fingerprint!r}.")

    def to_bytes(self) -> bytes:
        """Return the content of a `.looc` file. Equal codes give equal bytes."""
        numbers = (self.height, self.width, *self.indices.shape, self.num_codevectors)
        fields = _FIELDS.pack(MAGIC, VERSION, *numbers, bytes.fromhex(self.fingerprint))
        payload = pack(self.indices, bits_per_code(self.num_codevectors))
        return fields + _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(fields))) + payload

    @classmethod
    def from_bytes(cls, data: bytes) -> ImageCodes:
        """Return the codes in the content of a `.looc` file.

        Raises:
            CodesError: The content is of a different kind or version, or damaged.
        """
        if data[: len(MAGIC)] != MAGIC[: len(data)]:
            raise CodesError("not a .looc file: it does not start with LOOC.")
        if len(data) < HEADER_BYTES:
            raise CodesError(f"cut off: it has {len(data)} bytes, but the header alone has {HEADER_BYTES}.")
        _, version, height, width, h, w, c, num_codevectors, fingerprint = _FIELDS.unpack_from(data)
        if version != VERSION:
            raise CodesError(f"it has version {version} of the format; only version {VERSION} can be read.")
        bits = bits_per_code(num_codevectors)
        expected = HEADER_BYTES + packed_bytes(h * w * c, bits)
        if len(data) != expected:
            reason = "cut off" if len(data) < expected else "followed by something else"
            raise CodesError(f"{reason}: it has {len(data)} bytes, but its header says {expected}.")
        payload = memoryview(data)[HEADER_BYTES:]
        if _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(data[: _FIELDS.size]))) != data[_FIELDS.size : HEADER_BYTES]:
            raise CodesError("damaged: its checksum does not match.")
        # The checksum matches, so any error from here on was made by the program that wrote the file.
        if not 2 <= num_codevectors <= MAX_CODEVECTORS or h * w * c == 0:
            raise CodesError(f"invalid header: {h}x{w}x{c} codes, {num_codevectors} codevectors.")
        try:
            indices = unpack(payload, h * w * c, bits).reshape(h, w, c)
            return cls(indices, height, width, num_codevectors, fingerprint.hex())
        except ValueError as error:
            raise CodesError(f"invalid content: {error}") from None


def read_codes(file: Path) -> ImageCodes:
    """Read a `.looc` file. Raises CodesError, naming the file, if it is damaged."""
    try:
        return ImageCodes.from_bytes(file.read_bytes())
    except OSError as error:
        raise CodesError(f"cannot read {str(file)!r}: {error.strerror}.") from None
    except CodesError as error:
        raise CodesError(f"cannot read {str(file)!r}: {error}") from None


def write_codes(codes: ImageCodes, file: Path) -> int:
    """Write a `.looc` file atomically, and return its size in bytes."""
    content = codes.to_bytes()
    replace_bytes(file, content)
    return len(content)


def bits_per_code(num_codevectors: int) -> int:
    """Return ceil(log2 K)."""
    return (num_codevectors - 1).bit_length()


def packed_bytes(count: int, bits: int) -> int:
    """Return ceil(count * bits / 8), the bytes for `count` codes of `bits` bits each."""
    return -(-count * bits // 8)


def index_dtype(num_codevectors: int) -> np.dtype:
    """Return the smallest unsigned dtype that holds all codes."""
    return np.min_scalar_type(num_codevectors - 1)


def pack(indices: np.ndarray, bits: int) -> bytes:
    """Pack codes in [0, 2**bits), of any shape, in row-major order at `bits` bits each, the highest bit first."""
    as_bits = np.unpackbits(np.ascontiguousarray(indices, dtype=">u4").view(np.uint8).reshape(-1, 4), axis=1)
    return np.packbits(as_bits[:, 32 - bits :]).tobytes()


def unpack(data: bytes | memoryview, count: int, bits: int) -> np.ndarray:
    """Invert `pack`: return codes `(count,)` in the smallest unsigned dtype that holds `bits` bits."""
    as_bits = np.zeros((count, 32), np.uint8)
    as_bits[:, 32 - bits :] = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits).reshape(count, bits)
    return np.packbits(as_bits, axis=1).view(">u4")[:, 0].astype(index_dtype(2**bits))
