"""Measure the sizes of JPEG, WebP and lossless files of 1,000 test images, for docs/tables.md.

    python benchmarks/image_codecs.py --data FOLDER

Every tenth test image is a file of its own and counts with its headers. Writes results/image_codecs.jsonl with a line
for each set, codec and quality. --data is that of benchmarks/tables.py.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from results import RESULTS, replace_results
from small_images import SETS, load_images

from looc_ldm.analysis.rate_distortion import CODECS, codec_curve
from looc_ldm.images.pixels import to_pil
from looc_ldm.utils.errors import one_line_errors


def measure(images: str, data: Path) -> list[dict]:
    """Return the lines of a set."""
    pixels = load_images(images, data, "test")[::10]
    lines = [{"codec": codec, **asdict(point)} for codec in CODECS for point in codec_curve(pixels, codec)]
    lossless = {"lossless png": ("PNG", {"optimize": True}), "lossless webp": ("WEBP", {"lossless": True})}
    for codec, (format, settings) in lossless.items():
        lines.append({"codec": codec, "bits_per_pixel": bits_per_pixel(pixels, format, **settings)})
    grey = torch.full_like(pixels[:1], 128)  # hardly more than headers
    rate = bits_per_pixel(grey, "JPEG", quality=1, optimize=True)
    lines.append({"codec": "jpeg of one grey", "bits_per_pixel": rate})
    about = {"command": "python benchmarks/image_codecs.py --data FOLDER", "pillow": version("pillow")}
    return [{"set": images, "images": len(pixels), **line, **about} for line in lines]


def bits_per_pixel(pixels: torch.Tensor, format: str, **settings) -> float:
    """Return the size of uint8 images `(n, C, H, W)`, each stored as a file."""
    size = 0
    for image in pixels:
        file = io.BytesIO()
        to_pil(image).save(file, format, **settings)
        size += file.tell()
    return 8 * size / (len(pixels) * pixels.shape[2] * pixels.shape[3])


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
