"""Make the bundled model of flowers: both stages on photographs, in half precision, measured.

    python benchmarks/flowers.py FOLDER --lpips-weights FILE --inception-weights FILE

FOLDER holds TensorFlow's flower photos (CC BY 2.0), 128x128 pixels, in the splits train and validation with one
sub-folder per class. Trains with `looc-ldm train photos` and the settings in TRAINING into --work; the same command
resumes. With --pipeline, a pipeline that is trained already is measured and bundled instead. Writes

- looc_ldm/data/models/flowers: the averaged weights of both stages in half precision (the codebook in single
  precision), configs, and the card, whose prose is written by hand and whose figures `looc-ldm evaluate` measured;
- results/flowers.jsonl: figures against the validation photographs, of samples, of training photographs (no samples
  can be closer), of their reconstructions (the limit of the first stage), and of samples of an untrained UNet;
- docs/flowers.png, and in --work the page samples.html with the samples that are closest to training photographs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from bundling import bundle, call, grid, save_in_half_precision
from results import DOCS, RESULTS, replace_results, revision
from torch.utils.data import Subset

from looc_ldm import LooCLDMPipeline
from looc_ldm.images.config import DataConfig
from looc_ldm.images.image_set import load_image_set, spread
from looc_ldm.images.pixels import to_uint8
from looc_ldm.metrics.extractors import LAYERS
from looc_ldm.metrics.samples import npz_writer
from looc_ldm.training.data import float_batches
from looc_ldm.utils.errors import one_line_errors
from looc_ldm.utils.files import write_image

TRAINING = ["--resolution", "64", "--hours", "1.75"]
MOST_BYTES = 24 * 2**20
COMMAND = "python benchmarks/flowers.py FOLDER"
STEPS = 25
SAMPLES_PER_CLASS = 8
METRICS = ("fid", "kid", "precision_recall")
RESULT_NAMES = ("images_first", "images_second", "num_inference_steps", "guidance_scale", "bits_per_pixel", "images")


def train(options: argparse.Namespace) -> Path:
    """Train both stages, and return the pipeline."""
    weights = ["--lpips-weights", options.lpips_weights] if options.lpips_weights else []
    call("train", "photos", options.images, "--output", options.work / "run", *TRAINING, *weights)
    return max((options.work / "run").glob("diffusion*/pipeline"), key=lambda folder: folder.parent.name)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Measure a saved pipeline beside what it can be compared with; return the records by the name of the images."""
    work = options.work
    inception = ["--feature-layer", options.feature_layer]
    if options.inception_weights:
        inception += ["--inception-weights", options.inception_weights]
    lpips = ["--lpips-vgg-weights", options.lpips_weights] if options.lpips_weights else []
    real = ["--data", options.images, "--split", "validation", *inception]
    sampling = ["--images", options.samples, "--steps", STEPS, "--guidance-scale", options.guidance_scale]

    pipe = LooCLDMPipeline.from_pretrained(folder)
    config = DataConfig(path=str(options.images), split="train", resolution=pipe.vqvae.config.sample_size, fit="crop")
    images = load_image_set(config, channels=3)
    chosen = Subset(images, spread(len(images), options.samples).tolist())
    write_npz(work / "training.npz", float_batches(chosen), len(chosen))
    with torch.inference_mode():
        decoded = (pipe.vqvae(batch).sample for batch in float_batches(chosen))
        write_npz(work / "reconstructed.npz", decoded, len(chosen))
    torch.manual_seed(0)
    pipe.unet = type(pipe.unet).from_config(pipe.unet.config)
    pipe.save_pretrained(work / "untrained")

    memorization = ("memorization", "--training-data", options.images)
    sets = {
        "samples": (folder, *memorization, *sampling),
        "training photographs": (work / "training.npz",),
        "training photographs, reconstructed": (work / "reconstructed.npz", *memorization),
        "samples of an untrained UNet": (work / "untrained", *sampling),
    }
    records = {name: work / f"{name.replace(',', '').replace(' ', '_')}.json" for name in sets}
    for name, (samples, *more) in sets.items():
        call("evaluate", "generation", samples, *real, "--output", records[name], "--metrics", *METRICS, *more)
    records["validation photographs, reconstructed"] = work / "reconstruction.json"
    metrics = ["--metrics", "psnr", "ssim", "l1", "lpips_vgg", "rfid", "kid", "--output", work / "reconstruction.json"]
    call("evaluate", "reconstruction", folder, *real, *lpips, *metrics)
    return records


def rename_data(file: Path, name: str) -> None:
    """Name the training data as in the figures: the pipeline may be trained on a folder of a different name."""
    trained_on = json.loads(file.read_text())["data"]["path"]
    file.write_text(file.read_text().replace(json.dumps(trained_on), json.dumps(name)))


def write_npz(file: Path, batches: Iterable[torch.Tensor], count: int) -> None:
    """Write images in [-1, 1] as ADM's layout of samples."""
    with npz_writer(file, count) as writer:
        for batch in batches:
            writer.add(to_uint8(batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of the splits train and validation")
    parser.add_argument("--work", type=Path, default=Path("runs/flowers"), help="folder of training and figures")
    parser.add_argument("--pipeline", type=Path, help="pipeline to bundle; trained into --work if not given")
    parser.add_argument("--lpips-weights", type=Path, help="torchvision's VGG16; downloaded if not given")
    parser.add_argument("--inception-weights", type=Path, help="torch-fidelity's; downloaded if not given")
    parser.add_argument("--feature-layer", choices=LAYERS, default="768", help="of FID and the others (default: 768)")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="of the samples (default: 2)")
    parser.add_argument("--samples", type=int, default=1000, help="images of each set (default: 1000)")
    parser.add_argument("--measure-only", action="store_true", help="bundle nothing, and leave the results as they are")
    options = parser.parse_args()
    with one_line_errors():
        try:
            trained = options.pipeline or train(options)
            folder = options.work / "flowers" / "pipeline"  # the folder above names the card
            pipe = save_in_half_precision(trained, folder)
            rename_data(folder / "training.json", options.images.name)
            settings = {"num_inference_steps": STEPS, "guidance_scale": options.guidance_scale}
            write_image(grid(pipe, SAMPLES_PER_CLASS, **settings), options.work / "grid.png")
            records = measure(folder, options)
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)  # it has said why
        results = []
        for name, file in records.items():
            record = json.loads(file.read_text())
            figures = {key: value for key, value in record.items() if isinstance(value, float) or key in RESULT_NAMES}
            results.append({"set": name, **figures, "code": revision(), "command": COMMAND})
            print(json.dumps(results[-1]))
        if not options.measure_only:
            cards = [records["validation photographs, reconstructed"], records["samples"]]
            bundle(folder, "flowers", cards, options.work / "grid.png", MOST_BYTES, DOCS / "flowers.png")
            replace_results(RESULTS / "flowers.jsonl", results, ["set"])


if __name__ == "__main__":
    main()
