"""Compare quantizers at equal bits in the small VQ-VAE, several seeds each.

    python benchmarks/equal_bits.py --data FOLDER --sets fashion_mnist --quantizers looc-8x256x3 fsq-8 --seeds 1 2 3
    python benchmarks/equal_bits.py --data FOLDER --list | xargs -P 2 -L 1 python benchmarks/equal_bits.py --data FOLDER

Each training is one line of results/equal_bits.jsonl: the PSNR of the mean error of the 10,000 test images, with the
weights chosen on the last 5,000 training images. Trainings that have a line are skipped, and interrupted ones resume.
Without --quantizers: LooC, FSQ, GSQ, BSQ and RQ at about 0.5, 2 and 4 bits per pixel on Fashion-MNIST and CIFAR-10.
Set OMP_NUM_THREADS=1 for each of several processes.

Names: looc-CxKxd is LooC with C codes of K codevectors of d channels per position (n_q = C d), euclidean distance and
the rotation trick; looc-CxKxd-st passes gradients straight through, looc-CxKxd-cosine has cosine distance,
looc-CxKxd-s2 has s = 2 and four times the rate; gsq-CxKxd; fsq-C has levels (8, 5, 5), fsq-Cx16x16 has levels
(16, 16); bsq-C and lfq-C with 8 bits per code; rq-C, simvq-C, pq-C, factorized and cvq with 256 codevectors per
code. A latent position stands for 16 pixels.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import torch
from results import RESULTS, add_result, circumstances, read_results
from small_images import load_images
from small_vqvae import annealed, held_out_error, small_model, train

from looc_ldm import LooCQuantizer, baselines
from looc_ldm.utils.errors import UserError, one_line_errors

FILE = RESULTS / "equal_bits.jsonl"
SETS = ("fashion_mnist", "cifar10")
IMAGES = 120_000  # training images, with repeats
MAIN = (  # 1, 4 and 8 codes of about 8 bits per position: 0.5, 2 and 4 bits per pixel
    *("looc-1x256x8-st", "gsq-1x256x8", "fsq-1x16x16", "bsq-1", "rq-1"),
    *("looc-4x256x3-st", "gsq-4x256x4", "fsq-4x16x16", "bsq-4", "rq-4"),
    *("looc-8x256x2", "gsq-8x256x3", "fsq-8x16x16", "bsq-8", "rq-8"),
)
WIDTH = 128  # channels of the latents if the quantizer projects to fewer by itself


def looc(codes: int, codevectors: int, dim: int, *flags: str) -> LooCQuantizer:
    return LooCQuantizer(
        codes * dim,
        codevectors,
        dim,
        interpolation_factor=2 if "s2" in flags else 1,
        distance="cosine" if "cosine" in flags else "euclidean",
        gradient="straight-through" if "st" in flags else "rotation",
    )


def gsq(codes: int, codevectors: int, dim: int) -> baselines.GroupSphericalQuantizer:
    return baselines.GroupSphericalQuantizer(codes * dim, codevectors, dim)


def fsq(codes: int, *levels: int) -> baselines.FiniteScalarQuantizer:
    return baselines.FiniteScalarQuantizer(WIDTH, levels or (8, 5, 5), codes)


def cvq() -> LooCQuantizer:
    return LooCQuantizer(
        64,
        256,
        64,
        interpolation_factor=1,
        distance="cosine",
        codebook_update="gradient",
        gradient="straight-through",
    )


# By method: what follows it in a name, after a hyphen, and the quantizer of these numbers and flags.
METHODS = {
    "looc": (r"\d+x\d+x\d+(-cosine)?(-s2)?(-st)?", looc),
    "gsq": (r"\d+x\d+x\d+", gsq),
    "fsq": (r"\d+(x\d+)*", fsq),
    "bsq": (r"\d+", lambda codes: baselines.BinarySphericalQuantizer(WIDTH, 8, codes)),
    "lfq": (r"\d+", lambda codes: baselines.LookupFreeQuantizer(WIDTH, 8, codes)),
    "rq": (r"\d+", lambda codes: baselines.ResidualQuantizer(WIDTH, 256, codes, kmeans_init=True)),
    "simvq": (r"\d+", lambda codes: baselines.ResidualSimVQQuantizer(WIDTH, 256, codes)),
    "pq": (r"\d+", lambda codes: baselines.ProductQuantizer(4 * codes, 256, 4, gradient="straight-through")),
    "factorized": ("", lambda: baselines.FactorizedQuantizer(WIDTH, 256, 8)),
    "cvq": ("", cvq),
}


def make_quantizer(name: str) -> torch.nn.Module:
    """Return the quantizer of a name. Raises UserError for an unknown one."""
    method, _, rest = name.partition("-")
    pattern, make = METHODS.get(method, (None, None))
    if pattern is None or not re.fullmatch(pattern, rest):
        raise UserError(f"no quantizer {name!r}, see --help.")
    sizes, *flags = rest.split("-")
    return make(*map(int, re.findall(r"\d+", sizes)), *flags)


def run(images: str, name: str, seed: int, options: argparse.Namespace) -> None:
    """Train and measure one quantizer, and add its line to the results."""
    pixels = load_images(images, options.data, "train")
    channels, side = pixels.shape[1], pixels.shape[-1]
    training = annealed(options.images, seed)
    started_with = circumstances("cpu")  # a checkout may change during a training
    checkpoint = options.work / f"{images}_{name}_{seed}_{options.images}.pt"
    model, outcome = train(
        lambda: small_model(make_quantizer(name), channels, side),
        pixels,
        training,
        checkpoint,
        torch.device("cpu"),
        log=lambda line: print(f"{name}: {line}", flush=True),
    )
    mse = held_out_error(model, load_images(images, options.data, "test"))
    line = {
        "set": images,
        "quantizer": name,
        "n_q": model.quantize.vq_embed_dim,
        "bits_per_pixel": model.quantize.bits_per_position / 16,
        "seed": seed,
        "psnr": 10 * math.log10(4 / mse),
        "images": options.images,
        "learning_rate": training.learning_rate,
        "validation_psnr": 10 * math.log10(4 / outcome["validation_mse"]),
        "chosen_at_images": outcome["chosen_at_images"],
        "minutes": outcome["seconds"] / 60,
        **started_with,
    }
    add_result(options.results, line)
    checkpoint.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--quantizers", nargs="+", default=MAIN, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--images", type=int, default=IMAGES, help="training images, with repeats")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with one folder per set")
    parser.add_argument("--work", type=Path, default=Path("runs/equal_bits"), help="folder of checkpoints")
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--list", action="store_true", help="print the trainings as arguments, for xargs -L 1")
    options = parser.parse_args()
    jobs = [(s, name, seed) for s in options.sets for name in options.quantizers for seed in options.seeds]
    if options.list:
        print("\n".join(f"--sets {s} --quantizers {name} --seeds {seed}" for s, name, seed in jobs))
        return
    keys = ("set", "quantizer", "seed", "images")
    with one_line_errors():
        done = {tuple(line[key] for key in keys) for line in read_results(options.results)}
        for images, name, seed in jobs:
            if (images, name, seed, options.images) not in done:
                run(images, name, seed, options)


if __name__ == "__main__":
    main()
