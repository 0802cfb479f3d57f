"""Make the bundled images from Fashion-MNIST's files.

    python benchmarks/bundle_fashion_mnist.py FOLDER_WITH_THE_IDX_FILES
    python benchmarks/bundle_fashion_mnist.py FOLDER_WITH_THE_IDX_FILES OUT

The first 800 training images of each class become `train.parquet`, and the next 100 `validation.parquet`: 28x28 grey
PNGs and their classes. With OUT, the files are written there, and the whole test set becomes `test.parquet`, a
reference for `looc-ldm evaluate generation`. The bundled data holds nothing of the test set.
"""

import gzip
import io
import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
SPLITS = {"train": slice(0, 800), "validation": slice(800, 900)}  # per class


def read_idx(path: Path, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def png(pixels: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


def write(source: Path, part: str, splits: dict[str, slice], out: Path) -> None:
    """Write splits of a part of the set, "train" or "t10k". A split is a slice of each class, in the file's order."""
    images = read_idx(source / f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = read_idx(source / f"{part}-labels-idx1-ubyte.gz", 8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    for split, chosen in splits.items():
        rows = np.sort(np.concatenate([np.flatnonzero(labels == label)[chosen] for label in range(len(CLASSES))]))
        table = {"image": [png(images[i]) for i in rows], "label": labels[rows].tolist()}
        datasets.Dataset.from_dict(table, features=features).to_parquet(out / f"{split}.parquet")


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    source, *given = map(Path, sys.argv[1:])
    (out,) = given or [Path(__file__).resolve().parent.parent / "looc_ldm" / "data" / "fashion_mnist"]
    write(source, "train", SPLITS, out)
    if given:
        write(source, "t10k", {"test": slice(None)}, out)


if __name__ == "__main__":
    main()
