"""Make the starter model that the package carries: both stages on Fashion-MNIST, in half precision, measured.

    python benchmarks/starter.py FOLDER_WITH_THE_IDX_FILES --lpips-weights FILE --inception-weights FILE

Takes a few hours on two CPU cores; LPIPS is AlexNet's. Trains with the configs starter/autoencoder and
starter/diffusion into --work, on 55,000 of the 60,000 training images; 5,000 are held out. The same command resumes.
Writes looc_ldm/data/starter: the averaged weights of both stages in half precision (the codebook in single), configs,
and a card with figures of `looc-ldm evaluate`; and the FID against the test set as a line of results/fid.jsonl.
Settings were chosen on held-out training images; the test set is read for the last figure only. `python
benchmarks/benchmarks_page.py --starter` takes picture and figures into docs/benchmarks.md. A rehearsal does all of this
briefly, and leaves the package alone.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bundle_fashion_mnist
import torch
from results import RESULTS, ROOT, replace_results, revision

from looc_ldm import LooCLDMPipeline
from looc_ldm.hub.card import MARK, write_card
from looc_ldm.hub.facts import shareable
from looc_ldm.metrics import InceptionFeatures
from looc_ldm.metrics.extractors import LAYERS
from looc_ldm.metrics.lpips import load_lpips
from looc_ldm.pipelines.sampling import sample_images
from looc_ldm.training.quickstart import side_by_side
from looc_ldm.utils.errors import UserError, one_line_errors
from looc_ldm.utils.files import replace_text, write_image

STARTER = ROOT / "looc_ldm" / "data" / "starter"
MOST_BYTES = 12 * 2**20
STEPS = 25
SAMPLES_PER_CLASS = 10
SAMPLES = 2000  # for FID
SPLITS = {"train": slice(0, 5500), "validation": slice(5500, 6000)}  # of each class
REHEARSED = {"train": slice(0, 500), "validation": slice(5500, 6000)}


def call(*arguments) -> None:
    print("looc-ldm", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "looc_ldm.commands.main", *map(str, arguments)], check=True)


def data_folder(options: argparse.Namespace) -> Path:
    return options.work / ("fashion-mnist" if options.rehearse is None else "a-tenth-of-fashion-mnist")


def train(options: argparse.Namespace) -> Path:
    """Train both stages. Returns the folder of the second stage's run."""
    data = data_folder(options)
    if not (data / "test.parquet").is_file():
        data.mkdir(parents=True, exist_ok=True)
        splits = SPLITS if options.rehearse is None else REHEARSED
        bundle_fashion_mnist.write(options.images, "train", splits, data)
        bundle_fashion_mnist.write(options.images, "t10k", {"test": slice(None)}, data)
    autoencoder, diffusion = options.work / "autoencoder", options.work / "diffusion"
    first = ["--config", "starter/autoencoder", "--data.path", data, "--output_dir", autoencoder]
    if options.lpips_weights is not None:
        first += ["--loss.lpips_weights", options.lpips_weights]
    shorter = [] if options.rehearse is None else ["--total_images", options.rehearse]
    call("train", "autoencoder", *first, *shorter)
    second = ["--config", "starter/diffusion", "--data.path", data, "--output_dir", diffusion]
    call("train", "diffusion", *second, "--autoencoder", autoencoder / "model", *shorter)
    return diffusion


def ship(run: Path, options: argparse.Namespace) -> None:
    """Put the pipeline of a run, in half precision, measured and with its card, into the package."""
    half = options.work / "starter"
    folder = half / "pipeline"
    shutil.rmtree(half, ignore_errors=True)
    # The codebook stays in single precision, as `LooCVQModel` keeps it.
    LooCLDMPipeline.from_pretrained(run / "pipeline", dtype=torch.float16).save_pretrained(folder)
    shutil.copy(run / "pipeline" / "training.json", folder)
    for file in folder.rglob("*.json"):  # paths of this machine are private
        settings = shareable(json.loads(file.read_text()))
        settings.pop("_name_or_path", None)
        replace_text(file, json.dumps(settings, indent=2) + "\n")
    for file in folder.rglob("*.py"):  # remote code, which a package does not need
        file.unlink()
    write_image(draw(folder, options.guidance_scale), half / "samples.png")

    data, records = data_folder(options), [half / f"{name}.json" for name in ("reconstruction", "generation")]
    inception = ["--feature-layer", options.feature_layer]
    if options.inception_weights is not None:
        inception += ["--inception-weights", options.inception_weights]
    call("evaluate", "reconstruction", folder, "--data", data, "--split", "validation", "--output", records[0])
    samples = SAMPLES if options.rehearse is None else SAMPLES // 10
    sampling = ["--images", samples, "--steps", STEPS, "--guidance-scale", options.guidance_scale, *inception]
    for split, record in (("validation", records[1]), ("test", half / "fid.json")):
        call("evaluate", "generation", folder, "--reference", data, "--split", split, "--output", record, *sampling)
    write_card(folder, metrics=records, samples=half / "samples.png", license="mit")
    replace_text(folder / "README.md", card((folder / "README.md").read_text(), options))

    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        raise SystemExit(f"error: {folder} has {size:,} bytes, more than {MOST_BYTES:,}.")
    if options.rehearse is not None:
        print(f"A rehearsal: {folder} stays where it is.")
        return
    shutil.rmtree(STARTER, ignore_errors=True)
    shutil.copytree(folder, STARTER)
    figures = json.loads((half / "fid.json").read_text())
    names = ("protocol", "images_first", "images_second", "num_inference_steps", "guidance_scale", "bits_per_pixel")
    features = [name for name in figures if name.startswith(("fid@", "kid@"))]
    result = {"model": "starter", **{name: figures[name] for name in (*features, *names)}, "code": revision()}
    replace_results(RESULTS / "fid.jsonl", [result | {"command": "python benchmarks/starter.py FOLDER"}], ["model"])


def draw(folder: Path, guidance_scale: float):
    """Return a grid of samples with one row per class."""
    pipe = LooCLDMPipeline.from_pretrained(folder)
    labels = [label for label in sorted(pipe.config.id2label) for _ in range(SAMPLES_PER_CLASS)]
    samples = sample_images(
        pipe, labels, seed=1, batch_size=50, num_inference_steps=STEPS, guidance_scale=guidance_scale
    )
    return side_by_side(list(samples), rows=len(pipe.config.id2label))


def check(options: argparse.Namespace) -> None:
    """Raise UserError for what would otherwise fail after a training."""
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            if not (options.images / f"{part}-{kind}-ubyte.gz").is_file():
                raise UserError(f"no {part}-{kind}-ubyte.gz in {str(options.images)!r}.")
    lpips, inception, layer = options.lpips_weights, options.inception_weights, options.feature_layer
    for option, file in (("--lpips-weights", lpips), ("--inception-weights", inception)):
        if file is not None and not file.is_file():
            raise UserError(f"{option}: no file {str(file)!r}.")
    loaders = {
        "--lpips-weights": lambda: load_lpips("alex", lpips),
        "--inception-weights": lambda: InceptionFeatures(layer, inception).check(),
    }
    for option, load in loaders.items():
        try:
            load()
        except (OSError, ValueError) as error:
            raise UserError(f"{option}: {' '.join(str(error).split())}") from None


def card(text: str, options: argparse.Namespace) -> str:
    """Return the card as the package carries it: loaded by its function, with the command that makes it."""
    seen = json.loads((options.work / "autoencoder" / "model" / "training.json").read_text())["images_seen"]
    made = (
        "## Made by\n\n`python benchmarks/starter.py FOLDER_WITH_THE_IDX_FILES`, in a checkout: the first stage with "
        f"the config `starter/autoencoder` ({seen:,} images seen), the UNet with `starter/diffusion`, both on 55,000 "
        "training images of Fashion-MNIST. It takes a few hours on two CPU cores. The figures here are of the 5,000 "
        "that were held out, on which settings such as the guidance scale were chosen; FID against the test set is in "
        "the repository's docs/benchmarks.md. The bundled data set `fashion_mnist` is a part of the 55,000. "
        "Fashion-MNIST is (c) 2017 Zalando SE, MIT licence.\n\n"
    )
    limits = "A small demonstration: ten kinds of garments, grey, 32x32 pixels."
    if options.feature_layer != "2048":
        layer = options.feature_layer
        limits += f" FID of {layer} features does not compare with published FIDs, which use 2,048."
    drawn = f"num_inference_steps={STEPS}, guidance_scale={options.guidance_scale:g}"
    for pattern, replacement in (
        (re.escape(f"\n\n{MARK}"), ""),
        (r"from_pretrained\(.*?\)", "from_pretrained(looc_ldm.starter_model())"),
        (r"\]\)\.images\[0\]", f"], {drawn}).images[0]"),
        ("```py\n", "```py\nimport looc_ldm\n"),
        ("import LooCLDMPipeline\n", "import LooCLDMPipeline\n\n"),
        (r"```\n\nIn code that .*?\n\n", "```\n\n"),  # for models on the hub
        ("## Licence", made + "## Licence"),
        ("## Use", limits + "\n\n## Use"),
    ):
        text, count = re.subn(pattern, replacement, text, count=1, flags=re.DOTALL)
        if not count:
            raise SystemExit(f"error: the card has changed: no {pattern!r} in it.")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of train- and t10k-images-idx3-ubyte.gz and their labels")
    parser.add_argument("--work", type=Path, help="default: runs/starter, or runs/starter_rehearsal")
    parser.add_argument("--lpips-weights", type=Path, help="AlexNet's; torchvision downloads them if not given")
    parser.add_argument("--inception-weights", type=Path, help="torch-fidelity's; downloaded if not given")
    parser.add_argument(
        "--feature-layer", choices=LAYERS, default="768", help="of the FID; that of the shipped card (default: 768)"
    )
    parser.add_argument("--guidance-scale", type=float, default=1.5, help="as chosen on the held-out images")
    parser.add_argument("--rehearse", type=int, metavar="IMAGES", help="train on this many images, ship nothing")
    with one_line_errors():
        options = parser.parse_args()
        options.work = options.work or Path("runs/starter" if options.rehearse is None else "runs/starter_rehearsal")
        check(options)
        try:
            ship(train(options), options)
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)  # it has said why


if __name__ == "__main__":
    main()
