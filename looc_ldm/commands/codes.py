"""`looc-ldm encode` and `looc-ldm decode`: images to packed codes or tables of code sequences, and back."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from looc_ldm.autoencoder import LooCVQModel
from looc_ldm.code_table import TableRow, file_names, image_names, read_code_table, write_code_table
from looc_ldm.codes import (
    FINGERPRINT_BYTES,
    HEADER_BYTES,
    CodesError,
    ImageCodes,
    bits_per_code,
    read_codes,
    write_codes,
)
from looc_ldm.commands.many_files import (
    check_targets,
    largest_batch_that_fits,
    one_size_batches,
    pixel_budget,
    read_ahead,
    targets_of,
)
from looc_ldm.commands.options import Decode, Encode
from looc_ldm.commands.shared import load_images, load_model
from looc_ldm.devices import choose_device
from looc_ldm.errors import DataError, UserError
from looc_ldm.files import make_folder, write_image
from looc_ldm.image_codes import check_codes, decode_pixels, encode_pixels, image_of, read_pixels, set_tiling
from looc_ldm.training.image_set import ImageSet
from looc_ldm.training.source import IMAGE_SUFFIXES, Stored


def encode(options: Encode) -> None:
    """Write one .looc file per image, or one table of a data set, and print the rate."""
    if options.format == "parquet":
        _encode_data_set(options)
    else:
        _encode_files(options)


# Files ----------------------------------------------------------------------------------------------------------------


class _LeftOut:
    """Counts and names what could not be read or computed, above the progress bar."""

    def __init__(self):
        self.count = 0

    def add(self, message: str, count: int = 1) -> None:
        self.count += count
        tqdm.write(message, file=sys.stderr)


def _encode_files(options: Encode) -> None:
    for name in ("split", "resolution", "fit"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} goes with --format parquet: a .looc file has its image's own size.")
    targets = targets_of(options.images, IMAGE_SUFFIXES, options.output, ".looc")
    check_targets(targets, options.overwrite)
    model, fingerprint = _load(options)
    device, budget = model.device.type, pixel_budget(model.device.type)
    tally, left_out, written = _Tally(model.config.num_vq_embeddings), _LeftOut(), 0

    def readable() -> Iterator[tuple[np.ndarray, Path, Path]]:
        channels = model.config.in_channels
        for (source, target), result in read_ahead(targets, lambda pair: read_pixels(pair[0], str(pair[0]), channels)):
            try:
                yield result.result(), source, target
            except DataError as error:
                left_out.add(str(error))

    with tqdm(total=len(targets), desc="encoding", unit="img") as bar:
        for batch in one_size_batches(readable(), _size, options.batch_size, device):
            set_tiling(model, math.prod(_size(batch[0])), budget)
            for (pixels, _, target), indices in largest_batch_that_fits(
                batch, lambda part: _encode(model, part), lambda item: left_out.add(_too_large(item[1], _size(item)))
            ):
                codes = ImageCodes(indices, *pixels.shape[:2], tally.num_codevectors, fingerprint)
                make_folder(target.parent)
                written += write_codes(codes, target)
                tally.add(indices.size, math.prod(pixels.shape[:2]))
            bar.update(len(batch))
    if tally.images:
        headers = tally.images * HEADER_BYTES / written
        print(f"{options.output}: {tally.images} images, {written:,} bytes, {headers:.1%} of them headers")
        print(tally.rates())
    if left_out.count:
        raise DataError(f"{left_out.count} of {len(targets)} images could not be encoded and are left out.")


def decode(options: Decode) -> None:
    """Write one PNG per image."""
    # Each file with what its images are called in messages, and the files that they become.
    sources: list[tuple[Path, list[str], list[Path]]] = []
    for source, target in targets_of(options.codes, (".looc", ".parquet"), options.output, ".png"):
        if source.suffix.lower() == ".parquet":
            rows = file_names(source)
            names = [f"{source}, row {row}" for row in rows]
            sources.append((source, names, [target.parent / name for name in image_names(rows)]))
        else:
            sources.append((source, [str(source)], [target]))
    named = [pair for _, names, targets in sources for pair in zip(names, targets, strict=True)]
    check_targets(named, options.overwrite)
    model, fingerprint = _load(options)
    device, budget, left_out = model.device.type, pixel_budget(model.device.type), _LeftOut()

    def readable() -> Iterator[tuple[str, Path, ImageCodes]]:
        for source, names, targets in sources:
            read = 0
            try:
                for codes in _codes_in(source):
                    try:
                        check_codes(codes, model, fingerprint)
                    except CodesError as error:
                        raise CodesError(f"{names[read]!r} is {error}") from None
                    read += 1
                    yield names[read - 1], targets[read - 1], codes
            except CodesError as error:
                rest = len(targets) - read
                left_out.add(f"{error} ({rest} rows are left out)" if rest > 1 else str(error), rest)

    def size(item: tuple[str, Path, ImageCodes]) -> tuple[int, int]:
        return item[2].height, item[2].width

    def compute(batch: list[tuple[str, Path, ImageCodes]]) -> np.ndarray:
        return decode_pixels(model, np.stack([codes.indices for _, _, codes in batch]), *size(batch[0]))

    def write(pair: tuple[tuple[str, Path, ImageCodes], np.ndarray]) -> None:
        (_, target, _), pixels = pair
        make_folder(target.parent)
        write_image(image_of(pixels), target)

    with tqdm(total=len(named), desc="decoding", unit="img") as bar, ThreadPoolExecutor() as pool:
        for batch in one_size_batches(readable(), size, options.batch_size, device):
            set_tiling(model, math.prod(size(batch[0])), budget)
            decoded = largest_batch_that_fits(
                batch, compute, lambda item: left_out.add(_too_large(item[0], size(item)))
            )
            list(pool.map(write, decoded))
            bar.update(len(batch))
    print(f"{options.output}: {len(named) - left_out.count} images")
    if left_out.count:
        raise CodesError(f"{left_out.count} of {len(named)} images could not be decoded and are left out.")


def _codes_in(source: Path) -> Iterator[ImageCodes]:
    """Yield the codes of one `.looc` file, or of each row of a table."""
    if source.suffix.lower() == ".parquet":
        for row in read_code_table(source):
            yield row.codes
    else:
        yield read_codes(source)


# Tables ---------------------------------------------------------------------------------------------------------------


def _encode_data_set(options: Encode) -> None:
    if len(options.images) > 1:
        raise UserError(f"--format parquet takes one data set, got {len(options.images)}.")
    own_size = options.fit == "none"
    if own_size and options.resolution is not None:
        raise UserError("--fit none leaves images at their own size: --resolution goes with crop, adm and pad.")
    data, split = options.images[0], options.split or "train"
    file = options.output / f"{split}.parquet"
    check_targets([(Path(data), file)], options.overwrite)
    model, fingerprint = _load(options)
    fit = "crop" if own_size else options.fit  # None: as in training
    images = load_images(data, replace(options, split=split, fit=fit), options.model, model)
    device, budget = model.device.type, pixel_budget(model.device.type)
    tally = _Tally(model.config.num_vq_embeddings)

    def read(index: int) -> tuple[np.ndarray, str, int | None]:
        stored = images.source.read(index)
        label = stored.label if images.classes else None
        pixels = _at_own_size(images, stored) if own_size else images[index][0].permute(1, 2, 0).numpy()
        return pixels, _name(images, stored, index), label

    def refuse(item: tuple[np.ndarray, str, int | None]) -> None:
        raise DataError(_too_large(item[1], _size(item)))

    def rows() -> Iterator[TableRow]:
        examples = (result.result() for _, result in read_ahead(range(len(images)), read))
        for batch in one_size_batches(examples, _size, options.batch_size, device, in_order=True):
            set_tiling(model, math.prod(_size(batch[0])), budget)
            encoded = largest_batch_that_fits(batch, lambda part: _encode(model, part), refuse)
            for (pixels, name, label), indices in encoded:
                size = pixels.shape[:2]
                tally.add(indices.size, math.prod((not own_size and images.content_size) or size))
                yield TableRow(ImageCodes(indices, *size, tally.num_codevectors, fingerprint), name, label)

    make_folder(options.output)
    with tqdm(rows(), total=len(images), desc="encoding", unit="img", delay=1) as bar:
        write_code_table(file, bar, tally.num_codevectors, images.classes)
    size = file.stat().st_size
    classes = f"{len(images.classes) or 'no'} classes"
    print(f"{file}: {tally.images} images, {classes}, {size:,} bytes, {8 * size / tally.pixels:.4f} bits per pixel")
    print(tally.rates())


def _at_own_size(images: ImageSet, stored: Stored) -> np.ndarray:
    if stored.content is None:
        raise DataError(f"{stored.name} is missing.")
    return read_pixels(stored.content, stored.name, 1 if images.mode == "L" else 3)


def _name(images: ImageSet, stored: Stored, index: int) -> str:
    """Return the name of an image in the table: the path in the folder of images, or split and number."""
    folder = Path(images.config.path).resolve()
    if isinstance(stored.content, str) and Path(stored.content).is_relative_to(folder):
        return Path(stored.content).relative_to(folder).as_posix()
    return f"{images.config.split}/{index:08d}.png"


# What they share ------------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """What was encoded: images, codes, and the pixels that somebody wanted, without padding."""

    num_codevectors: int
    images: int = 0
    codes: int = 0
    pixels: int = 0

    def add(self, codes: int, pixels: int) -> None:
        self.images += 1
        self.codes += codes
        self.pixels += pixels

    def rates(self) -> str:
        packed, ideal = bits_per_code(self.num_codevectors), math.log2(self.num_codevectors)
        rate = self.codes / self.pixels
        return (
            f"codes: {rate * packed:.4f} bits per pixel packed, at ceil(log2 K) = {packed} bits; "
            f"{rate * ideal:.4f} at log2 K = {ideal:.4g} bits"
        )


def _load(options: Encode | Decode) -> tuple[LooCVQModel, str]:
    """Return the model, and the half of its fingerprint that codes carry."""
    model, fingerprint = load_model(options.model, choose_device(options.device), options.dtype)
    return model, fingerprint[: 2 * FINGERPRINT_BYTES]


def _encode(model: LooCVQModel, batch: list[tuple]) -> np.ndarray:
    return encode_pixels(model, np.stack([pixels for pixels, *_ in batch]))


def _size(example: tuple) -> tuple[int, int]:
    """Return height and width of the pixels that an example starts with."""
    return example[0].shape[:2]


def _too_large(name: object, size: tuple[int, int]) -> str:
    return f"not enough memory for {str(name)!r}, of {size[1]}x{size[0]} pixels."
