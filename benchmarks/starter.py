"""Make the bundled model of garments: both stages on Fashion-MNIST, in half precision, measured.

    python benchmarks/starter.py FOLDER_WITH_THE_IDX_FILES --lpips-weights FILE --inception-weights FILE

Takes a few hours on two CPU cores. Trains with the configs starter/autoencoder and starter/diffusion into --work, on
55,000 of the 60,000 training images; 5,000 are held out. The same command resumes. Writes

- looc_ldm/data/models/fashion_mnist: the averaged weights of both stages in half precision (the codebook in single
  precision), configs, and the card, whose prose is written by hand and whose figures `looc-ldm evaluate` measured;
- the FID against the test set as a line of results/fid.jsonl, and docs/starter.png.

Settings were chosen on held-out training images; the test set is read for the last figure only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import bundle_fashion_mnist
from bundling import bundle, call, grid, save_in_half_precision
from results import DOCS, RESULTS, replace_results, revision

from looc_ldm.metrics import InceptionFeatures
from looc_ldm.metrics.extractors import LAYERS
from looc_ldm.metrics.lpips import load_lpips
from looc_ldm.utils.errors import UserError, one_line_errors
from looc_ldm.utils.files import write_image

MOST_BYTES = 12 * 2**20
STEPS = 25
SAMPLES_PER_CLASS = 10
SAMPLES = 2000  # for FID
SPLITS = {"train": slice(0, 5500), "validation": slice(5500, 6000)}  # per class


def train(options: argparse.Namespace) -> Path:
    """Train both stages, and return the folder of the second stage's run."""
    data = options.work / "fashion-mnist"
    if not (data / "test.parquet").is_file():
        data.mkdir(parents=True, exist_ok=True)
        bundle_fashion_mnist.write(options.images, "train", SPLITS, data)
        bundle_fashion_mnist.write(options.images, "t10k", {"test": slice(None)}, data)
    autoencoder, diffusion = options.work / "autoencoder", options.work / "diffusion"
    lpips = [] if options.lpips_weights is None else ["--loss.lpips_weights", options.lpips_weights]
    first = ["--config", "starter/autoencoder", "--data.path", data, "--output_dir", autoencoder]
    call("train", "autoencoder", *first, *lpips)
    second = ["--config", "starter/diffusion", "--data.path", data, "--output_dir", diffusion]
    call("train", "diffusion", *second, "--autoencoder", autoencoder / "model")
    return diffusion


def ship(run: Path, options: argparse.Namespace) -> None:
    """Put the pipeline of a run, in half precision, measured and with its card, into the package."""
    half = options.work / "fashion_mnist"
    folder = half / "pipeline"
    pipe = save_in_half_precision(run / "pipeline", folder)
    settings = {"num_inference_steps": STEPS, "guidance_scale": options.guidance_scale}
    write_image(grid(pipe, SAMPLES_PER_CLASS, **settings), half / "samples.png")

    data, records = options.work / "fashion-mnist", [half / f"{name}.json" for name in ("reconstruction", "generation")]
    inception = ["--feature-layer", options.feature_layer]
    if options.inception_weights is not None:
        inception += ["--inception-weights", options.inception_weights]
    call("evaluate", "reconstruction", folder, "--data", data, "--split", "validation", "--output", records[0])
    sampling = ["--images", SAMPLES, "--steps", STEPS, "--guidance-scale", options.guidance_scale, *inception]
    for split, record in (("validation", records[1]), ("test", half / "fid.json")):
        call("evaluate", "generation", folder, "--reference", data, "--split", split, "--output", record, *sampling)
    bundle(folder, "fashion_mnist", records, half / "samples.png", MOST_BYTES, DOCS / "starter.png")
    figures = json.loads((half / "fid.json").read_text())
    names = ("protocol", "images_first", "images_second", "num_inference_steps", "guidance_scale", "bits_per_pixel")
    features = [name for name in figures if name.startswith(("fid@", "kid@"))]
    result = {"model": "fashion_mnist", **{name: figures[name] for name in (*features, *names)}, "code": revision()}
    replace_results(RESULTS / "fid.jsonl", [result | {"command": "python benchmarks/starter.py FOLDER"}], ["model"])


def check(options: argparse.Namespace) -> None:
    """Raise an error for a file that is missing or wrong, which would otherwise show after hours."""
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    weights = filter(None, (options.lpips_weights, options.inception_weights))
    for file in (*(options.images / name for name in names), *weights):
        if not file.is_file():
            raise UserError(f"no file {str(file)!r}.")
    load_lpips("alex", options.lpips_weights)
    InceptionFeatures(options.feature_layer, options.inception_weights).load("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of train- and t10k-images-idx3-ubyte.gz and their labels")
    parser.add_argument("--work", type=Path, default=Path("runs/starter"), help="folder of the trainings")
    parser.add_argument("--lpips-weights", type=Path, help="AlexNet's; torchvision downloads them if not given")
    parser.add_argument("--inception-weights", type=Path, help="torch-fidelity's; downloaded if not given")
    parser.add_argument(
        "--feature-layer", choices=LAYERS, default="768", help="of the FID; that of the shipped card (default: 768)"
    )
    parser.add_argument("--guidance-scale", type=float, default=1.5, help="as chosen on the held-out images")
    options = parser.parse_args()
    with one_line_errors():
        check(options)
        try:
            ship(train(options), options)
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)  # it has said why


if __name__ == "__main__":
    main()
