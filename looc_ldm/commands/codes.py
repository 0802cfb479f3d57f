"""`looc-ldm encode` and `looc-ldm decode`: images to packed codes or tables of code sequences, and back."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from looc_ldm.codes.images import check_codes, decode_pixels, encode_pixels, image_of, read_pixels
from looc_ldm.codes.looc_file import (
    FINGERPRINT_BYTES,
    HEADER_BYTES,
    CodesError,
    ImageCodes,
    bits_per_code,
    read_codes,
    write_codes,
)
from looc_ldm.codes.table import TableRow, image_names, read_code_table, write_code_table
from looc_ldm.commands.many_files import check_targets, compute_in_batches, read_ahead, targets_of
from looc_ldm.commands.options import Decode, Encode
from looc_ldm.commands.shared import load_images, load_model, use_fastest_threads_to_reconstruct
from looc_ldm.images.source import IMAGE_SUFFIXES
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.utils.devices import choose_device
from looc_ldm.utils.errors import DataError, UserError
from looc_ldm.utils.files import make_folder, write_image


class _Image(NamedTuple):
    """An image to encode: uint8 pixels `(H, W, channels)`, name, file that its codes become, and class."""

    pixels: np.ndarray
    name: str
    target: Path | None = None
    label: int | None = None


class _Coded(NamedTuple):
    """An image to decode: its codes, its name in messages, and the file that it becomes."""

    codes: ImageCodes
    name: str
    target: Path


def encode(options: Encode) -> None:
    """Write one .looc file per image, or one table of a data set, and print the rate."""
    if options.format == "parquet":
        _encode_data_set(options)
    else:
        _encode_files(options)


def _encode_files(options: Encode) -> None:
    if (options.split, options.resolution, options.fit) != (None, None, None):
        raise UserError("--split, --resolution and --fit need --format parquet: a .looc file has its image's own size.")
    targets = targets_of(options.images, IMAGE_SUFFIXES, options.output, ".looc")
    check_targets(targets, options.overwrite)
    model, fingerprint = _load(options)
    images = codes = pixels = written = 0

    def read(pair: tuple[Path, Path]) -> _Image:
        source, target = pair
        return _Image(read_pixels(source, str(source), model.config.in_channels), str(source), target)

    def readable() -> Iterator[_Image]:
        for _, image in read_ahead(targets, read):
            try:
                yield image.result()
            except DataError as error:
                _warn(error)

    with tqdm(total=len(targets), desc="encoding", unit="img") as bar:
        for image, packed in _encoded(model, fingerprint, readable(), options):
            if packed is None:
                _warn(_too_large(image.name, image.pixels.shape))
                continue
            make_folder(image.target.parent)
            written += write_codes(packed, image.target)
            images, codes, pixels = images + 1, codes + packed.indices.size, pixels + packed.height * packed.width
            bar.update()
    if images:
        headers = images * HEADER_BYTES / written
        print(f"{options.output}: {images} images, {written:,} bytes, {headers:.1%} of them headers")
        print(_rates(codes / pixels, model.config.num_vq_embeddings))
    if images < len(targets):
        raise DataError(f"{len(targets) - images} of {len(targets)} images could not be encoded and are left out.")


def _encode_data_set(options: Encode) -> None:
    if len(options.images) > 1:
        raise UserError(f"--format parquet takes one data set, got {len(options.images)}.")
    own_size = options.fit == "none"
    data, split = options.images[0], options.split or "train"
    file = options.output / f"{split}.parquet"
    check_targets([(data, file)], options.overwrite)
    model, fingerprint = _load(options)
    num_codevectors = model.config.num_vq_embeddings
    fit = "crop" if own_size else options.fit  # None: as in training
    images = load_images(data, replace(options, split=split, fit=fit), model)
    folder = Path(images.config.path).resolve()
    codes = pixels = 0

    def read(index: int) -> _Image:
        stored = images.source.read(index)
        if own_size:
            found = read_pixels(stored.content, stored.name, model.config.in_channels)
        else:
            found = images.to_item(stored)[0].permute(1, 2, 0).numpy()
        name = f"{images.config.split}/{index:08d}.png"
        if isinstance(stored.content, str) and Path(stored.content).is_relative_to(folder):
            name = Path(stored.content).relative_to(folder).as_posix()
        return _Image(found, name, label=stored.label if images.classes else None)

    def rows() -> Iterator[TableRow]:
        nonlocal codes, pixels
        readable = (image.result() for _, image in read_ahead(range(len(images)), read))
        for image, packed in _encoded(model, fingerprint, readable, options):
            if packed is None:
                raise DataError(_too_large(image.name, image.pixels.shape))
            codes += packed.indices.size
            # Without fitting each image has its own size; padding is not counted.
            content = None if own_size else images.content_size
            pixels += math.prod(content or (packed.height, packed.width))
            yield TableRow(packed, image.name, image.label)

    make_folder(options.output)
    with tqdm(rows(), total=len(images), desc="encoding", unit="img") as bar:
        write_code_table(file, bar, num_codevectors, images.classes)
    size = file.stat().st_size
    classes = f"{len(images.classes) or 'no'} classes"
    print(f"{file}: {len(images)} images, {classes}, {size:,} bytes, {8 * size / pixels:.4f} bits per pixel")
    print(_rates(codes / pixels, num_codevectors))


def _encoded(
    model: LooCVQModel, fingerprint: str, images: Iterator[_Image], options: Encode
) -> Iterator[tuple[_Image, ImageCodes | None]]:
    """Yield each image with its codes; None if memory does not suffice."""
    found = compute_in_batches(
        images,
        lambda image: image.pixels.shape[:2],
        lambda batch: encode_pixels(model, np.stack([image.pixels for image in batch])),
        model,
        options.batch_size,
    )
    for image, indices in found:
        height, width, _ = image.pixels.shape
        if indices is None:
            yield image, None
        else:
            yield image, ImageCodes(indices, height, width, model.config.num_vq_embeddings, fingerprint)


def _rates(codes_per_pixel: float, num_codevectors: int) -> str:
    packed, ideal = bits_per_code(num_codevectors), math.log2(num_codevectors)
    return (
        f"codes: {codes_per_pixel * packed:.4f} bits per pixel packed, at ceil(log2 K) = {packed} bits; "
        f"{codes_per_pixel * ideal:.4f} at log2 K = {ideal:.4g} bits"
    )


def decode(options: Decode) -> None:
    """Write one PNG per image."""
    # For each file, the names of its images in messages, and the files that they become.
    sources: list[tuple[Path, list[tuple[str, Path]]]] = []
    for source, target in targets_of(options.codes, (".looc", ".parquet"), options.output, ".png"):
        if source.suffix.lower() == ".parquet":
            rows = image_names(source)
            sources.append((source, [(f"{source}, row {row}", target.parent / name) for row, name in rows]))
        else:
            sources.append((source, [(str(source), target)]))
    targets = [pair for _, pairs in sources for pair in pairs]
    check_targets(targets, options.overwrite)
    model, fingerprint = _load(options)

    def readable() -> Iterator[_Coded]:
        for source, pairs in sources:
            is_table = source.suffix.lower() == ".parquet"
            stored = (row.codes for row in read_code_table(source)) if is_table else map(read_codes, [source])
            try:
                for codes, (name, target) in zip(stored, pairs, strict=True):
                    check_codes(codes, model, fingerprint, repr(name))
                    yield _Coded(codes, name, target)
            except CodesError as error:  # no further row of the table is read
                _warn(error)

    def decode_batch(batch: list[_Coded]) -> np.ndarray:
        indices = np.stack([image.codes.indices for image in batch])
        return decode_pixels(model, indices, batch[0].codes.height, batch[0].codes.width)

    def write(pair: tuple[_Coded, np.ndarray | None]) -> bool:
        image, pixels = pair
        if pixels is None:
            _warn(_too_large(image.name, (image.codes.height, image.codes.width)))
            return False
        make_folder(image.target.parent)
        write_image(image_of(pixels), image.target)
        return True

    decoded = compute_in_batches(
        readable(), lambda image: (image.codes.height, image.codes.width), decode_batch, model, options.batch_size
    )
    with tqdm(read_ahead(decoded, write), "decoding", len(targets), unit="img") as bar:  # PNGs are written in threads
        written = sum(is_written.result() for _, is_written in bar)
    print(f"{options.output}: {written} images")
    if written < len(targets):
        raise CodesError(f"{len(targets) - written} of {len(targets)} images could not be decoded and are left out.")


def _load(options: Encode | Decode) -> tuple[LooCVQModel, str]:
    """Return the model, and the first 32 digits of its fingerprint, which `.looc` files store."""
    model, fingerprint = load_model(options.model, choose_device(options.device), options.dtype)
    use_fastest_threads_to_reconstruct(model)
    return model, fingerprint[: 2 * FINGERPRINT_BYTES]


def _warn(message: object) -> None:
    """Print a message above the progress bar."""
    tqdm.write(str(message), file=sys.stderr)


def _too_large(name: str, shape: tuple[int, ...]) -> str:
    return f"not enough memory for {name!r}, of {shape[1]}x{shape[0]} pixels."
