"""`looc-ldm encode` and `looc-ldm decode`: images to packed codes or tables of code sequences, and back."""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from looc_ldm.arguments import DATA_HELP, FITS, add_device_option, add_dtype_option, positive
from looc_ldm.commands.many_files import (
    check_targets,
    one_size_batches,
    pixel_budget,
    read_ahead,
    targets_of,
    those_that_fit,
)
from looc_ldm.commands.shared import as_user_errors, choose_device, load_images
from looc_ldm.errors import DataError, ModelError, UserError

FORMATS = ("looc", "parquet")


def add_parsers(commands) -> None:
    """Add `encode` and `decode` to the commands of `looc-ldm`."""
    encode = commands.add_parser(
        "encode",
        help="images to packed codes (.looc), or to a table of code sequences",
        description="Encode images with the first stage of a model. --format looc makes a .looc file of every image, "
        "at the image's own size; sub-folders are kept. --format parquet makes one table of a data set, with labels, "
        "that datasets.load_dataset reads, of images of one size. Images are taken as a viewer shows them: turned as "
        "their EXIF data says, transparent ones on white, the first frame of several.",
    )
    encode.add_argument("model", metavar="MODEL", help="autoencoder or pipeline: folder, hub id or starter")
    encode.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help=f"image files and folders of images; with --format parquet one data set: {DATA_HELP}",
    )
    encode.add_argument(
        "--output", type=Path, required=True, help="folder for NAME.looc of every image, or for SPLIT.parquet"
    )
    encode.add_argument("--format", choices=FORMATS, default="looc", help="of the codes (default: looc)")
    table = encode.add_argument_group("with --format parquet")
    table.add_argument("--split", help="which split of the data set (default: train)")
    table.add_argument(
        "--resolution", type=positive, help="side of the images in pixels (default: what the model was trained at)"
    )
    table.add_argument(
        "--fit",
        choices=(*FITS, "none"),
        help="how images become square, random_crop at the centre; none leaves each at its own size, so that sequences "
        "differ in length "
        "(default: as in the model's training, as far as its folder says, else crop)",
    )
    _add_shared_options(encode)
    encode.set_defaults(command=_encode)

    decode = commands.add_parser(
        "decode",
        help="packed codes back to images",
        description="Decode .looc files, and tables of `looc-ldm encode --format parquet`, to PNG files. Codes that "
        "are damaged or of another model are named and left out.",
    )
    decode.add_argument("model", metavar="MODEL", help="the model that encoded them: folder, hub id or starter")
    decode.add_argument("codes", metavar="CODES", nargs="+", help=".looc or .parquet files, or folders of them")
    decode.add_argument("--output", type=Path, required=True, help="folder for the PNG files; sub-folders are kept")
    _add_shared_options(decode)
    decode.set_defaults(command=_decode)


def _add_shared_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace files (default: refuse where there are any)")
    parser.add_argument(
        "--batch-size",
        type=positive,
        help="images of one size that go through the network at a time (default: as many as make 2**18 pixels on a "
        "CPU, 2**21 on others)",
    )
    add_device_option(parser)
    add_dtype_option(parser)


def _encode(options: argparse.Namespace) -> None:
    if options.format == "parquet":
        _encode_data_set(options)
    else:
        _encode_files(options)


def _encode_files(options: argparse.Namespace) -> None:
    import numpy as np
    from tqdm.auto import tqdm

    from looc_ldm.codes import HEADER_BYTES, ImageCodes, write_codes
    from looc_ldm.files import make_folder
    from looc_ldm.image_codes import encode_pixels, read_pixels, set_tiling
    from looc_ldm.training.sources import IMAGE_SUFFIXES

    for name in ("split", "resolution", "fit"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} goes with --format parquet: a .looc file has its image's own size.")
    targets = targets_of(options.images, IMAGE_SUFFIXES, options.output, ".looc")
    check_targets(targets, options.overwrite)
    model, fingerprint = _load(options)
    channels, num_codevectors = model.config.in_channels, model.config.num_vq_embeddings
    done, left_out, size = _Tally(num_codevectors), 0, 0
    budget = pixel_budget(model.device.type)

    def leave_out(message: str) -> None:
        nonlocal left_out
        left_out += 1
        tqdm.write(message, file=sys.stderr)

    def readable() -> Iterator[tuple[np.ndarray, Path, Path]]:
        for (source, target), result in read_ahead(targets, lambda pair: read_pixels(pair[0], str(pair[0]), channels)):
            try:
                yield result.result(), source, target
            except DataError as error:
                leave_out(str(error))

    def encode(batch: list[tuple[np.ndarray, Path, Path]]) -> np.ndarray:
        return encode_pixels(model, np.stack([pixels for pixels, _, _ in batch]))

    batches = one_size_batches(readable(), _size, options.batch_size, model.device.type)
    with tqdm(total=len(targets), desc="encoding", unit="img") as bar, as_user_errors(ValueError):
        for batch in batches:
            set_tiling(model, math.prod(_size(batch[0])), budget)
            encoded = those_that_fit(batch, encode, lambda item: leave_out(_too_large(item[1], _size(item))))
            for (pixels, _, target), codes in encoded:
                coded = ImageCodes(codes, *pixels.shape[:2], num_codevectors, fingerprint)
                make_folder(target.parent)
                size += write_codes(coded, target)
                done.add(codes.size, math.prod(pixels.shape[:2]))
            bar.update(len(batch))
    if done.images:
        share = done.images * HEADER_BYTES / size
        print(f"{options.output}: {done.images} images, {size:,} bytes, {share:.1%} of them headers")
        print(done.rates())
    if left_out:
        raise DataError(f"{left_out} of {len(targets)} images could not be encoded and are left out.")


def _encode_data_set(options: argparse.Namespace) -> None:
    import numpy as np
    from tqdm.auto import tqdm

    from looc_ldm.code_table import TableRow, write_code_table
    from looc_ldm.codes import ImageCodes
    from looc_ldm.files import make_folder
    from looc_ldm.image_codes import encode_pixels, set_tiling

    if len(options.images) > 1:
        raise UserError(f"--format parquet takes one data set, got {len(options.images)}.")
    own_size = options.fit == "none"
    if own_size and options.resolution is not None:
        raise UserError("--fit none leaves images at their own size: --resolution goes with crop, adm and pad.")
    options.data, options.split = options.images[0], options.split or "train"
    file = options.output / f"{options.split}.parquet"
    check_targets([(Path(options.data), file)], options.overwrite)
    model, fingerprint = _load(options)
    options.fit = "crop" if own_size else options.fit  # None: as in training
    images = load_images(options, model)
    num_codevectors = model.config.num_vq_embeddings
    done = _Tally(num_codevectors)

    def read(index: int) -> tuple[np.ndarray, str, int | None]:
        stored = images.source.read(index)
        label = stored.label if images.classes else None
        pixels = _at_own_size(images, stored) if own_size else images[index][0].permute(1, 2, 0).numpy()
        return pixels, _name(images, stored, index), label

    def encode(batch: list[tuple[np.ndarray, str, int | None]]) -> np.ndarray:
        return encode_pixels(model, np.stack([pixels for pixels, _, _ in batch]))

    def refuse(item: tuple[np.ndarray, str, int | None]) -> None:
        raise DataError(_too_large(item[1], _size(item)))

    def rows() -> Iterator[TableRow]:
        examples = (result.result() for _, result in read_ahead(range(len(images)), read))
        for batch in one_size_batches(examples, _size, options.batch_size, model.device.type, in_order=True):
            set_tiling(model, math.prod(_size(batch[0])), pixel_budget(model.device.type))
            for (pixels, name, label), codes in those_that_fit(batch, encode, refuse):
                size = pixels.shape[:2]
                done.add(codes.size, math.prod((not own_size and images.content_size) or size))
                yield TableRow(ImageCodes(codes, *size, num_codevectors, fingerprint), name, label)

    make_folder(options.output)
    with as_user_errors(ValueError), tqdm(rows(), total=len(images), desc="encoding", unit="img", delay=1) as bar:
        write_code_table(file, bar, num_codevectors, images.classes)
    size = file.stat().st_size
    classes = f"{len(images.classes) or 'no'} classes"
    print(f"{file}: {done.images} images, {classes}, {size:,} bytes, {8 * size / done.pixels:.4f} bits per pixel")
    print(done.rates())


def _decode(options: argparse.Namespace) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    from tqdm.auto import tqdm

    from looc_ldm.code_table import file_names, image_names
    from looc_ldm.codes import CodesError, ImageCodes
    from looc_ldm.files import make_folder, write_image
    from looc_ldm.image_codes import check_codes, decode_pixels, image_of, set_tiling

    # Of each file, what its images are called in messages, and the files that they become.
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
    budget, left_out = pixel_budget(model.device.type), 0

    def leave_out(message: str, count: int = 1) -> None:
        nonlocal left_out
        left_out += count
        tqdm.write(message, file=sys.stderr)

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
                leave_out(f"{error} ({rest} rows are left out)" if rest > 1 else str(error), rest)

    def decode(batch: list[tuple[str, Path, ImageCodes]]) -> np.ndarray:
        codes = batch[0][2]
        return decode_pixels(model, np.stack([codes.indices for _, _, codes in batch]), codes.height, codes.width)

    def too_large(item: tuple[str, Path, ImageCodes]) -> None:
        leave_out(_too_large(item[0], (item[2].height, item[2].width)))

    def write(item: tuple[str, Path, ImageCodes], pixels: np.ndarray) -> None:
        make_folder(item[1].parent)
        write_image(image_of(pixels), item[1])

    batches = one_size_batches(
        readable(), lambda item: (item[2].height, item[2].width), options.batch_size, model.device.type
    )
    with tqdm(total=len(named), desc="decoding", unit="img") as bar, ThreadPoolExecutor() as pool:
        for batch in batches:
            set_tiling(model, batch[0][2].height * batch[0][2].width, budget)
            list(pool.map(lambda pair: write(*pair), those_that_fit(batch, decode, too_large)))
            bar.update(len(batch))
    print(f"{options.output}: {len(named) - left_out} images")
    if left_out:
        raise CodesError(f"{left_out} of {len(named)} images could not be decoded and are left out.")


def _codes_in(source: Path):
    """The codes of one `.looc` file, or of each row of a table."""
    from looc_ldm.code_table import read_code_table
    from looc_ldm.codes import read_codes

    if source.suffix.lower() == ".parquet":
        return (row.codes for row in read_code_table(source))
    return iter([read_codes(source)])


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
        from looc_ldm.codes import bits_per_code

        packed, ideal = bits_per_code(self.num_codevectors), math.log2(self.num_codevectors)
        rate = self.codes / self.pixels
        return (
            f"codes: {rate * packed:.4f} bits per pixel packed, at ceil(log2 K) = {packed} bits; "
            f"{rate * ideal:.4f} at log2 K = {ideal:.4g} bits"
        )


def _load(options: argparse.Namespace):
    import torch

    from looc_ldm.image_codes import MODES, short_fingerprint
    from looc_ldm.loading import load_autoencoder

    device = choose_device(options.device)
    model = load_autoencoder(options.model)
    if model.config.in_channels not in MODES:
        raise ModelError(f"images have 1 (grey) or 3 channels, the model asks for {model.config.in_channels}.")
    fingerprint = short_fingerprint(model)  # of the weights as they are stored, whatever the dtype that is asked for
    dtype = getattr(torch, options.dtype)
    if dtype != torch.float32:
        model = load_autoencoder(options.model, dtype)
    return model.to(device), fingerprint


def _size(example: tuple) -> tuple[int, int]:
    """Height and width of the pixels that an example starts with."""
    return example[0].shape[:2]


def _too_large(name: object, size: tuple[int, int]) -> str:
    return f"not enough memory for {str(name)!r}, of {size[1]}x{size[0]} pixels."


def _at_own_size(images, stored):
    from looc_ldm.image_codes import read_pixels

    if stored.content is None:
        raise DataError(f"{stored.name} is missing.")
    file = io.BytesIO(stored.content) if isinstance(stored.content, bytes) else stored.content
    return read_pixels(file, stored.name, 1 if images.mode == "L" else 3)


def _name(images, stored, index: int) -> str:
    """Of the image in the table: the path in the folder of images, or split and number."""
    folder = Path(images.config.path).resolve()
    if isinstance(stored.content, str) and Path(stored.content).is_relative_to(folder):
        return Path(stored.content).relative_to(folder).as_posix()
    return f"{images.config.split}/{index:08d}.png"
