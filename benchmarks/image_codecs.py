"""Store 1,000 test images as JPEG, WebP and lossless files, for docs/tables.md and docs/choosing_sizes.md.

    python benchmarks/image_codecs.py --data FOLDER

Every tenth test image is a file of its own and counts with its headers. Writes results/image_codecs.jsonl with a line
for each set, codec and quality. --data is that of benchmarks/tables.py.
"""

from __future__ import annotations

import argparse
import io
import math
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from results import RESULTS, replace_results
from small_images import SETS, load_images

from looc_ldm.analysis.rate_distortion import CODECS, QUALITIES
from looc_ldm.images.pixels import to_pil
from looc_ldm.utils.errors import one_line_errors


def measure(images: str, data: Path) -> list[dict]:
    """Return the lines of a set; PSNR is that of the mean error of all images, as in equal_bits.py."""
    pixels = load_images(images, data, "test")[::10]
    lines = []
    for codec, settings in CODECS.items():
        for quality in QUALITIES:
            rate, mse = store(pixels, codec.upper(), quality=quality, **settings)
            lines.append({"codec": codec, "quality": quality, "bits_per_pixel": rate, "psnr": 10 * math.log10(1 / mse)})
    lossless = {"lossless png": ("PNG", {"optimize": True}), "lossless webp": ("WEBP", {"lossless": True})}
    for codec, (format, settings) in lossless.items():
        lines.append({"codec": codec, "bits_per_pixel": store(pixels, format, **settings)[0]})
    grey = torch.full_like(pixels[:1], 128)  # hardly more than headers
    lines.append({"codec": "jpeg of one grey", "bits_per_pixel": store(grey, "JPEG", quality=1, optimize=True)[0]})
    about = {"command": "python benchmarks/image_codecs.py --data FOLDER", "pillow": version("pillow")}
    return [{"set": images, "images": len(pixels), **line, **about} for line in lines]


def store(pixels: torch.Tensor, format: str, **settings) -> tuple[float, float]:
    """Store uint8 images `(n, C, H, W)`, each as a file; return bits per pixel and the mean squared error in [0, 1]."""
    size = error = 0
    for image in map(to_pil, pixels):
        file = io.BytesIO()
        image.save(file, format, **settings)
        size += file.tell()
        original, decoded = (np.asarray(shown, np.float64) for shown in (image, Image.open(file).convert(image.mode)))
        error += np.square((original - decoded) / 255).sum()
    return 8 * size / (len(pixels) * pixels.shape[2] * pixels.shape[3]), error / pixels.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with one folder per set")
    options = parser.parse_args()
    with one_line_errors():
        for images in SETS:
            lines = measure(images, options.data)
            replace_results(RESULTS / "image_codecs.jsonl", lines, ["set", "codec", "quality"])
            print(f"{images}: {len(lines)} lines")


if __name__ == "__main__":
    main()
