"""FID of a Fashion-MNIST pipeline against the whole test set, beside that of the same pipeline with an untrained UNet.

    python benchmarks/fashion_mnist_fid.py PIPELINE FOLDER_WITH_THE_IDX_FILES --inception-weights FILE \
        --feature-layer 768

The test set is used here only: training and every choice of a setting used the training set. Samples have the classes
in equal shares, as the test set has. Images are padded to 32x32 on both sides.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from small_images import read_images

from looc_ldm.commands.record import versions
from looc_ldm.errors import UserError, one_line_errors
from looc_ldm.files import check_folder, replace_text
from looc_ldm.fingerprint import model_fingerprint
from looc_ldm.metrics import InceptionFeatures
from looc_ldm.metrics.extractors import LAYERS
from looc_ldm.metrics.generation import collect_features, generation_figures
from looc_ldm.pipelines.loading import load_pipeline
from looc_ldm.pipelines.sampling import sample_images

BATCH = 100
SEED = 0  # of the samples
RESULT = Path(__file__).resolve().parent / "results" / "fashion_mnist_fid.json"


def command() -> str:
    """What was typed, with the names of files alone: their folders differ from machine to machine."""
    words = sys.argv[1:]
    if "--out" in words:  # where the figures go is no part of how they come about
        del words[words.index("--out") : words.index("--out") + 2]
    words = [Path(word).name if "/" in word and not word.startswith("benchmarks/") else word for word in words]
    return " ".join(["python", "benchmarks/fashion_mnist_fid.py", *words])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder, or starter")
    parser.add_argument("images", type=Path, help="folder of t10k-images-idx3-ubyte.gz")
    parser.add_argument("--inception-weights", type=Path, help="torch-fidelity's; downloaded if not given")
    parser.add_argument("--feature-layer", choices=LAYERS, default="2048", help="default: 2048, the published one")
    parser.add_argument("--samples", type=PositiveInt, default=2000, help="drawn from each model (default: 2000)")
    parser.add_argument("--steps", type=PositiveInt, default=25, help="of the scheduler (default: 25)")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="default: 2")
    parser.add_argument("--trained-only", action="store_true", help="not beside an untrained UNet")
    parser.add_argument("--out", type=Path, default=RESULT, help="default: benchmarks/results/fashion_mnist_fid.json")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    check_folder(options.out.parent)
    try:
        features = InceptionFeatures(options.feature_layer, options.inception_weights)
        features.check()
    except (OSError, ValueError) as error:
        raise UserError(f"--inception-weights: {error}") from None
    reference = F.pad(read_images("fashion_mnist", options.images, "test"), (2, 2, 2, 2))
    pipe = load_pipeline(options.pipeline)
    labels = [i % len(pipe.config.id2label) for i in range(options.samples)]
    inception = features.identity()
    del inception["weights"]  # a path; their SHA-256 stays
    results = {
        "command": command(),
        "reference": f"Fashion-MNIST test set, {len(reference)} images, padded to 32x32",
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "seed": SEED,
        "bits_per_pixel": pipe.vqvae.bits_per_image(32, 32) / 28**2,
        "fingerprints": {name: model_fingerprint(getattr(pipe, name)) for name in ("vqvae", "unet")},
        "inception": inception,
        "versions": versions(),
    }
    networks = {"inception": features.load("cpu")}
    real = collect_features(reference.split(BATCH), networks, networks)
    for name in ("trained",) if options.trained_only else ("trained", "untrained"):
        if name == "untrained":
            torch.manual_seed(0)
            pipe.unet = type(pipe.unet).from_config(pipe.unet.config).eval()
        samples = sample_images(
            pipe,
            labels,
            seed=SEED,
            batch_size=BATCH,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
        )
        batches = (torch.stack(list(islice(samples, BATCH))) for _ in range(0, len(labels), BATCH))
        generated = collect_features(batches, networks, networks)
        counts = {"images_first": len(labels), "images_second": len(reference)}
        figures = generation_figures(("fid", "kid"), generated, real, {"inception": features.name})
        results[name] = {"protocol": "clean", **counts, **figures}
        print(name, results[name], flush=True)
    replace_text(options.out, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main(parse())
