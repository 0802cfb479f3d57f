"""Train and measure rows of the paper's tables of small images.

    python benchmarks/tables.py 5 --data FOLDER                      a whole table on all three sets
    python benchmarks/tables.py 1 --row looc-32x4 --sets cifar10 --data FOLDER
    python benchmarks/tables.py 5 --data FOLDER --images 60000 --batch-size 16        one epoch, without a GPU
    python benchmarks/tables.py 5 --data FOLDER --images 600000 --annealed            as equal_bits.py trains
    python benchmarks/tables.py all --list | xargs -P 8 -L 1 python benchmarks/tables.py all --data FOLDER
                                                                     every row, eight at a time on one GPU
    python benchmarks/tables_page.py                                 tables of docs/tables.md

The result of a row on a set is one line of --results. Rows that have a line with the same training are skipped: remove
the line to measure again. An interrupted training resumes from its last checkpoint in --work. Without a GPU, set
OMP_NUM_THREADS to the cores that each of several processes may use.

Checkpoints are chosen on the last 5,000 *training* images (the authors chose theirs on the test set). The test set is
read once, at the end, and measured under both protocols (docs/evaluation.md). rFID and LPIPS need files of weights.

--data holds the folders mnist, fashion_mnist and cifar10, see benchmarks/small_images.py.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from results import RESULTS, ROOT, add_result, circumstances, read_results
from small_images import COUNTS, SETS, check_files, load_images
from small_vqvae import EPOCHS, Training, annealed, small_model, train
from table_rows import ROWS, TABLES, Row

from looc_ldm.images.pixels import to_float
from looc_ldm.metrics import InceptionFeatures, evaluate_reconstruction
from looc_ldm.metrics.lpips import load_lpips
from looc_ldm.utils.errors import one_line_errors

BATCH = 250  # test images at a time


def load_paper() -> dict:
    """Return the paper's figures: `tables` by number, row and set, and their `source`."""
    return json.loads((ROOT / "benchmarks" / "paper_tables.json").read_text())


def load_networks(options: argparse.Namespace) -> dict:
    """Return LPIPS and the Inception features of each protocol; None without a file of weights."""
    networks = {"lpips": None, "clean": None, "paper": None}
    if options.lpips_vgg_weights is not None:
        networks["lpips"] = {"lpips_vgg": load_lpips("vgg", options.lpips_vgg_weights).to(options.device)}
    if options.inception_weights is not None:
        for protocol, resize in (("clean", None), ("paper", 229)):
            networks[protocol] = InceptionFeatures("2048", options.inception_weights, pil_resize=resize)
            networks[protocol].load("cpu")
    return networks


def training_of(images: str, options: argparse.Namespace) -> Training:
    """Return the settings of the command line for a set of images."""
    count = options.images or EPOCHS * COUNTS[images]
    return annealed(count, options.seed) if options.annealed else Training(count, options.batch_size, seed=options.seed)


def run_row(row: Row, images: str, training: Training, networks: dict, options: argparse.Namespace) -> dict:
    """Train and measure one row on one set, and return the result."""
    pixels = load_images(images, options.data, "train")
    channels, side = pixels.shape[1], pixels.shape[-1]
    started_with = circumstances(options.device, "torchvision")  # a checkout may change during a long training
    model, outcome = train(
        lambda: small_model(row.make_quantizer(training.steps), channels, side),
        pixels,
        training,
        options.work / f"{'_'.join([images, row.name, *flags_of(training)]).replace(' ', '')}.pt",
        torch.device(options.device),
        row.objective,
        lambda line: print(f"{images} {row.name}: {line}", flush=True),
    )
    test = load_images(images, options.data, "test")
    figures = {
        protocol: evaluate_reconstruction(
            model, map(to_float, test.split(BATCH)), None, networks[protocol], networks["lpips"], protocol
        )
        for protocol in ("clean", "paper")
    }
    return {
        "row": row.name,
        "method": row.method,
        "set": images,
        "training": asdict(training),
        **outcome,
        **figures,
        **started_with,
        "command": " ".join([f"python benchmarks/tables.py all --row {row.name} --sets {images}", *flags_of(training)]),
    }


def flags_of(training: Training) -> list[str]:
    """Return the settings that are not the published ones as options of the command line."""
    kind, flags = (annealed(1), ["--annealed"]) if training.is_annealed else (Training(1), [])
    changed = {name: value for name, value in asdict(training).items() if value != getattr(kind, name)}
    return flags + [f"--{name.replace('_', '-')} {value}" for name, value in changed.items()]


def parse() -> argparse.Namespace:
    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("table", choices=TABLES, help="number in the paper, or a set of rows of this benchmark")
    parser.add_argument("--row", nargs="+", choices=ROWS, metavar="ROW", help="only these rows of the table")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="sets of images")
    parser.add_argument("--list", action="store_true", help="print the rows and sets as arguments, for xargs -L 1")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with one folder per set")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--work", type=Path, default=Path("runs/tables"), help="folder of checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS / "tables.jsonl", help="file of results")
    parser.add_argument("--lpips-vgg-weights", type=Path, help="file; without it LPIPS is not measured")
    parser.add_argument("--inception-weights", type=Path, help="torch-fidelity's file; without it no rFID")
    group = parser.add_argument_group("training", "The defaults are the published settings.")
    group.add_argument("--images", type=int, help=f"training images to see; None: {EPOCHS} epochs")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--batch-size", type=int, default=Training.batch_size, help="images per step")
    kind.add_argument("--annealed", action="store_true", help="train as equal_bits.py does, in batches of 16")
    group.add_argument("--seed", type=int, default=Training.seed, help="of weights and order")
    options = parser.parse_args()
    rows = dict.fromkeys(options.row or TABLES[options.table])
    outside = [row for row in rows if row not in TABLES[options.table]]
    if outside:
        parser.error(f"table {options.table} has the rows {', '.join(TABLES[options.table])}, not {outside[0]!r}")
    batch = annealed(1).batch_size if options.annealed else options.batch_size
    if batch < 1 or (options.images is not None and options.images < batch):
        parser.error(f"--images {options.images} must be at least one batch of --batch-size {batch}")
    options.jobs = [(ROWS[row], images) for images in dict.fromkeys(options.sets) for row in rows]
    return options


def main() -> None:
    options = parse()
    if options.list:
        print("\n".join(f"--row {row.name} --sets {images}" for row, images in options.jobs))
        return
    with one_line_errors():
        for images in options.sets:
            check_files(images, options.data)
        networks = load_networks(options)
        for row, images in options.jobs:
            training = training_of(images, options)
            about = {"row": row.name, "set": images, "training": asdict(training)}
            result = next((r for r in read_results(options.results) if about.items() <= r.items()), None)
            if result is None:
                result = run_row(row, images, training, networks, options)
                add_result(options.results, result)
            clean, paper = result["clean"], result["paper"]
            psnr = f"PSNR in dB: {clean['psnr']:.2f} clean, {paper['psnr']:.2f} protocol paper"
            print(f"{images} {row.name}: {clean['bits_per_pixel']:.3g} bits per pixel, {psnr}", flush=True)


if __name__ == "__main__":
    main()
