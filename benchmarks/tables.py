r"""The paper's tables of small images, measured: train the rows of a table, and measure them on the test sets.

    python benchmarks/tables.py 5 --data FOLDER                           a whole table, all three sets
    python benchmarks/tables.py 1 --row looc-32x4 --sets cifar10 --data FOLDER
    python benchmarks/tables.py rates --data FOLDER --device cuda --jobs 8   every quantizer, eight at a time
    python benchmarks/tables.py 5 --data FOLDER --budget 60000 --batch-size 16 --jobs 2      one epoch, without a GPU
    python benchmarks/tables.py recipes --row looc-256x4-ema-rotation --data FOLDER --budget 600000 --batch-size 16 \
        --annealed --bf16                                                 the most of ten epochs
    python benchmarks/tables.py codecs --data FOLDER                      JPEG and WebP, for the plots
    python benchmarks/tables.py all --data FOLDER --device cuda --jobs 8  all rows, and the codecs
    python benchmarks/readme.py tables                                    docs/tables.md from all results

A row is trained once for each set of images, however many tables it stands in. Its result is a file in --results, and
rows that have one are left alone; those in benchmarks/results/tables are what the page shows, so try things out with
another folder, which then has the checkpoints too. A run that was interrupted, or asked to stop, goes on from its last
checkpoint in --work: that of the stop, or one every 25,000 images or, of a long training, a fiftieth of it. The network
is the paper's small VQ-VAE, Adam 3e-4 (--annealed has a schedule), the published loss (HVQ-VAE and SQ-VAE have theirs,
docs/tables.md). Checkpoints are chosen on the last 5,000 *training* images; the authors chose theirs on the test set.
The test set is read once, at the end, under both protocols (docs/evaluation.md).

--data holds the folders fashion_mnist and mnist, with train- and t10k-images-idx3-ubyte(.gz), and cifar10, with
data_batch_1 to 5 and test_batch, as the binary version's .bin or as .png of a row an image.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Event

import torch
from jsonargparse.typing import PositiveInt
from small_images import COUNTS, SETS, check_files, load_images
from small_vqvae import (
    ANNEALED_RATE,
    EPOCHS,
    HELD_OUT,
    PUBLISHED_BATCH,
    PUBLISHED_RATE,
    SWITCHES,
    Training,
    command_line,
    read_result,
    train,
    weights_in_words,
    write_result,
)
from table_results import load_paper
from table_rows import PAPER_ROWS, ROWS, TABLES, Row
from weights import check_weights

from looc_ldm import LooCSmallVQModel
from looc_ldm.analysis.rate_distortion import CODECS, codec_curve
from looc_ldm.arguments import Seed
from looc_ldm.commands.record import versions
from looc_ldm.errors import UserError, one_line_errors
from looc_ldm.files import check_folder, make_folder
from looc_ldm.images import to_float, to_pil
from looc_ldm.metrics import InceptionFeatures, evaluate_reconstruction
from looc_ldm.metrics.extractors import LAYERS
from looc_ldm.metrics.lpips import load_lpips

RESULTS = Path(__file__).resolve().parent / "results" / "tables"
BATCH = 250
FIGURES = ("psnr", "ssim", "l1")
DEVICES = ("cpu", "cuda", "mps")


def make_model(row: Row, channels: int, side: int, batches: int) -> LooCSmallVQModel:
    """The small VQ-VAE with the quantizer of a row, or the row's own model, for a training of so many batches."""
    if row.whole_model:
        return row.make(channels, side, batches)
    model = LooCSmallVQModel(channels, channels, sample_size=side, vq_embed_dim=row.n_q, interpolation_factor=1)
    model.quantize = row.make(batches) if row.anneals else row.make()
    return model


def result_file(row: str, images: str, budget: int, options: argparse.Namespace) -> Path:
    switches = "".join(f"_{name}" for name in SWITCHES if getattr(options, name))
    return options.results / f"{images}_{row}_{budget}_batch{options.batch_size}{switches}_seed{options.seed}.json"


def measure(model: LooCSmallVQModel, pixels: torch.Tensor, options: argparse.Namespace) -> dict[str, dict]:
    """Figures of the test set under both protocols."""
    device = torch.device(options.device)
    lpips = None
    if options.lpips_vgg_weights is not None:
        lpips = {"lpips_vgg": load_lpips("vgg", options.lpips_vgg_weights).to(device)}
    figures = {}
    for protocol in ("clean", "paper"):
        features = None
        if options.inception_weights is not None:
            resize = 229 if protocol == "paper" else None
            features = InceptionFeatures(options.feature_layer, options.inception_weights, pil_resize=resize)
        batches = (to_float(part) for part in pixels.split(BATCH))
        figures[protocol] = evaluate_reconstruction(model, batches, None, features, lpips, protocol)
    return figures


def is_there(file: Path, options: argparse.Namespace) -> bool:
    """Whether a result is there with every figure that is asked for."""
    figures = [*FIGURES]
    if options.lpips_vgg_weights is not None:
        figures.append("lpips_vgg")
    if options.inception_weights is not None:
        figures.append(f"rfid@{options.feature_layer}")
    if not file.is_file():
        return False
    result = read_result(file)
    if result.get("bf16", result.get("annealed", False)) != options.bf16:  # annealed trainings once were in bfloat16
        raise UserError(f"{str(file)!r} was trained in bfloat16, by an older version: remove it, or rename it.")
    return result["test"]["clean"].keys() >= set(figures)


def run_row(row: Row, images: str, options: argparse.Namespace) -> None:
    """Train and measure one row on one set, unless its result is there; measure it anew if a figure is missing."""
    budget = options.budget or EPOCHS * COUNTS[images]
    file = result_file(row.name, images, budget, options)
    if is_there(file, options):
        print(f"{file} is there: {in_a_line(read_result(file))}", flush=True)
        return
    checkpoint = options.work / f"{file.stem}.pt"
    if file.is_file() and not checkpoint.is_file():
        raise UserError(
            f"{file.name} lacks a figure that is asked for, and its checkpoint {str(checkpoint)!r} is gone: remove the "
            "result to train the row anew."
        )
    pixels = load_images(images, options.data, "train")
    rate = ANNEALED_RATE if options.annealed else PUBLISHED_RATE
    switches = options.annealed, options.bf16
    training = Training(budget, options.batch_size, rate, *switches, options.seed, row.clipped_cosine)
    channels, side = pixels.shape[1], pixels.shape[-1]
    name = f"{images} {row.name}"
    device = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else "CPU"
    # Before a long training: a checkout may change meanwhile.
    session = {"code": revision(), "device": device, "threads": torch.get_num_threads(), "versions": versions()}
    print(f"{name}: {training.steps:,} steps, result in {file}", flush=True)
    model, happened = train(
        lambda: make_model(row, channels, side, math.ceil(budget / options.batch_size)),
        pixels,
        training,
        checkpoint,
        torch.device(options.device),
        lambda line: print(f"{name}: {line}", flush=True),
        row.objective,
        session,
    )
    print(f"{name}: measuring the test images", flush=True)
    figures = measure(model, load_images(images, options.data, "test"), options)
    result = {
        "row": row.name,
        "method": row.method,
        "images": images,
        "budget": budget,
        "batch_size": options.batch_size,
        **{name: getattr(options, name) for name in SWITCHES},
        "seed": options.seed,
        "device": device,
        **happened,
        "test": figures,
        "command": f"python benchmarks/tables.py {options.table} --row {row.name} --sets {images} --data FOLDER"
        f" --budget {budget} --batch-size {options.batch_size}{command_line(vars(options))}"
        f" --seed {options.seed}"
        f" --device {options.device.split(':')[0]}{weights_in_words(figures['clean'])}",
    }
    write_result(file, result)
    print(f"{name}: {in_a_line(result)}", flush=True)


def in_a_line(result: dict) -> str:
    """What was reached on the test images, beside the paper's figure where it has one."""
    clean, paper = (result["test"][protocol] for protocol in ("clean", "paper"))
    published = load_paper()["tables"]
    stated = [
        published[table][rows[result["row"]]].get(result["images"], {}).get("psnr")
        for table, rows in PAPER_ROWS.items()
        if result["row"] in rows
    ]
    beside = next((f" (the paper, after {EPOCHS} epochs: {psnr:.2f})" for psnr in stated if psnr is not None), "")
    return (
        f"{result['images_seen']:,} images seen, PSNR {clean['psnr']:.2f} dB clean, {paper['psnr']:.2f} dB by the "
        f"protocol paper{beside}, {clean['bits_per_pixel']:.3g} bits per pixel"
    )


def revision() -> str | None:
    """The commit that is run, "-dirty" if files have changed since, and None where there is no repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def measure_codecs(images: str, options: argparse.Namespace) -> None:
    """JPEG and WebP, and what raw pixels and lossless files take, on a thousand test images of a set, for the plots.

    `all` leaves alone what is there, `codecs` measures anew.
    """
    file = options.results / f"codecs_{images}.json"
    if options.table == "all" and file.is_file():
        print(f"{file.name} is there.", flush=True)
        return
    pixels = load_images(images, options.data, "test")[::10]
    curves = {codec: [asdict(point) for point in codec_curve(pixels, codec)] for codec in CODECS}
    command = f"python benchmarks/tables.py codecs --sets {images} --data FOLDER"
    one_grey = torch.full_like(pixels[:1], 128)
    record = {
        "images": images,
        "count": len(pixels),
        "command": command,
        "raw": 8 * pixels.shape[1],
        "lossless": {
            "png": bits_per_pixel(pixels, "PNG", optimize=True),
            "webp": bits_per_pixel(pixels, "WEBP", lossless=True),
        },
        "empty_jpeg": bits_per_pixel(one_grey, "JPEG", quality=1, optimize=True),
        "codecs": curves,
        "versions": versions(),
    }
    write_result(file, record)


def bits_per_pixel(pixels: torch.Tensor, format: str, **settings) -> float:
    """What files of images take, uint8 `(n, C, H, W)`, a file each."""
    size = 0
    for image in pixels:
        file = io.BytesIO()
        to_pil(image).save(file, format, **settings)
        size += file.tell()
    return 8 * size / (len(pixels) * pixels.shape[2] * pixels.shape[3])


def run_apart(pairs: list[tuple[str, str]], options: argparse.Namespace) -> int:
    """Each pair of row and set in a process of its own, `options.jobs` at a time. Returns how many failed."""
    shared = [sys.executable, __file__, options.table]
    names = ("data", "device", "work", "results", "batch_size", "seed", "budget")
    names += ("lpips_vgg_weights", "inception_weights")
    if options.inception_weights is not None:
        names += ("feature_layer",)
    for option in names:
        if getattr(options, option) is not None:
            shared += [f"--{option.replace('_', '-')}", getattr(options, option)]
    shared += command_line(vars(options)).split()

    environment = dict(os.environ)
    if options.device == "cpu":  # threads of several processes would be in each other's way
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))

    running: list[subprocess.Popen] = []
    ending = Event()

    def run(pair: tuple[str, str]) -> int:
        command = [str(part) for part in (*shared, "--row", pair[0], "--sets", pair[1])]
        # A session of its own: what a terminal sends to all its processes reaches a row through this one, once.
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        running.append(process)
        if ending.is_set():  # begun while the others were told
            process.send_signal(ends_a_row)
        return process.wait()

    # What a shell starts in the background ignores SIGINT, and so do its children.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ends_a_row = signal.SIGTERM if ignored else signal.SIGINT

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            try:
                codes = [pool.submit(run, pair) for pair in pairs]
                return sum(code.result() != 0 for code in codes)
            except KeyboardInterrupt:
                ending.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for process in running:
                    if process.poll() is None:
                        process.send_signal(ends_a_row)
                raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "table", choices=[*TABLES, "all", "codecs"], help="tables by their numbers in the paper, and further ones"
    )
    parser.add_argument("--row", nargs="+", metavar="ROW", help="only these of its rows")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="default: all three")
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets' folders")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help=f"of the kinds {', '.join(DEVICES)} (default: cuda where there is one)",
    )
    parser.add_argument("--budget", type=PositiveInt, help="training images to see (default: 500 epochs, as published)")
    parser.add_argument("--batch-size", type=PositiveInt, default=PUBLISHED_BATCH, help="default: 128, as published")
    parser.add_argument(
        "--annealed",
        action="store_true",
        help="learning rate up to 3e-3 in 200 steps and in a line down to 0 (default: 3e-4 throughout, as published)",
    )
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="networks in bfloat16 (default: float32): faster on GPUs and on CPUs with AMX or AVX512-BF16, much slower "
        "on others",
    )
    parser.add_argument("--seed", type=Seed, default=42, help="of weights and order (default: 42)")
    parser.add_argument("--jobs", type=PositiveInt, default=1, help="rows that are trained at a time")
    parser.add_argument(
        "--work",
        type=Path,
        help="folder of the checkpoints (default: runs/tables, or checkpoints in another folder of results)",
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results/tables)"
    )
    parser.add_argument("--lpips-vgg-weights", type=Path, help="without them LPIPS is not measured")
    parser.add_argument("--inception-weights", type=Path, help="torch-fidelity's; without them rFID is not measured")
    parser.add_argument("--feature-layer", choices=LAYERS, help="of rFID; 2048 is the published one (default: 2048)")
    options = parser.parse_args()
    if options.feature_layer and options.inception_weights is None:
        parser.error(f"--feature-layer {options.feature_layer} is of rFID, which needs --inception-weights")
    options.feature_layer = options.feature_layer or "2048"
    if options.work is None:
        is_page = options.results.resolve() == RESULTS.resolve()
        options.work = Path("runs/tables") if is_page else options.results / "checkpoints"
    names = list(ROWS) if options.table == "all" else TABLES.get(options.table, [])
    if options.table == "codecs":
        for name in ("row", "budget", *SWITCHES, "lpips_vgg_weights", "inception_weights"):
            if getattr(options, name):
                parser.error(f"codecs have no rows, and take no --{name.replace('_', '-')}")
    for row in options.row or ():
        if row not in names:
            parser.error(f"table {options.table} has the rows {', '.join(names)}, not {row!r}")
    options.rows = [ROWS[name] for name in dict.fromkeys(options.row or names)]
    options.sets = list(dict.fromkeys(options.sets))
    return options


def check(options: argparse.Namespace) -> None:
    """Raises UserError for what would otherwise fail after a training."""
    try:
        if torch.device(options.device).type not in DEVICES:
            raise UserError(f"--device {options.device!r} must be of the kinds {', '.join(DEVICES)}.")
        torch.zeros(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    lpips, inception, layer = options.lpips_vgg_weights, options.inception_weights, options.feature_layer
    given = []
    if lpips is not None:
        given.append(("--lpips-vgg-weights", lpips, lambda: load_lpips("vgg", lpips)))
    if inception is not None:
        given.append(("--inception-weights", inception, lambda: InceptionFeatures(layer, inception).check()))
    check_weights(*given)
    of_library = any(row.name.startswith(("rq-", "fsq-", "lfq-", "rfsq-")) for row in options.rows)
    if of_library and importlib.util.find_spec("vector_quantize_pytorch") is None:
        raise UserError('RQ, FSQ, LFQ and residual FSQ need vector-quantize-pytorch: pip install -e ".[baselines]".')
    smallest = min(COUNTS[images] for images in options.sets) - HELD_OUT
    if options.batch_size > smallest:
        raise UserError(f"--batch-size {options.batch_size} is more than {smallest} training images.")
    if options.budget is not None and options.budget < options.batch_size:
        raise UserError(f"--budget {options.budget} is less than a batch of {options.batch_size} images.")
    for folder in (options.work, options.results):
        check_folder(folder)
    for images in options.sets:
        check_files(images, options.data)
    if len(options.rows) * len(options.sets) > 1:  # what is wrong with them is said once, not by each row's process
        for images in options.sets:
            for split in ("train", "test"):
                load_images(images, options.data, split)
    if options.rows:
        make_folder(options.work)
    make_folder(options.results)


def main() -> None:
    with one_line_errors():
        options = parse()
        pairs = [(row.name, images) for images in options.sets for row in options.rows]
        check(options)
        try:
            if options.table == "codecs" or (options.table == "all" and not options.row):
                for images in options.sets:
                    measure_codecs(images, options)
            if len(pairs) == 1:
                run_row(options.rows[0], options.sets[0], options)
            elif pairs:  # a process each: one that fails does not end the others
                failed = run_apart(pairs, options)
                if failed:
                    sys.exit(f"error: {failed} of {len(pairs)} rows failed; the same command again repeats them.")
        except FloatingPointError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt as interrupt:
            if str(interrupt):  # of a row, which says where it stopped
                raise
            kept = "interrupted: the same command goes on from the results and checkpoints that there are"
            raise KeyboardInterrupt(kept) from None


if __name__ == "__main__":
    main()
