"""`looc-ldm quickstart`: train, sample and evaluate in miniature on bundled images, with a report."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from looc_ldm.images.pixels import to_pil
from looc_ldm.metrics import InceptionFeatures, evaluate_reconstruction, fid_and_kid
from looc_ldm.models.loading import load_autoencoder
from looc_ldm.models.starter import starter_model
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.pipelines.sampling import sample_images
from looc_ldm.training import autoencoder, diffusion
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.config_parsing import load_config
from looc_ldm.training.data import float_batches, load_image_sets
from looc_ldm.training.validation import reconstruction_grid
from looc_ldm.utils.files import replace_text, write_image
from looc_ldm.utils.report import Curve, Report

SAMPLES_PER_CLASS = 10
RECONSTRUCTIONS = 20
SAMPLING_STEPS = 25
GUIDANCE_SCALE = 2.0
FID_SAMPLES = 1000


def quickstart(output: Path, features: InceptionFeatures | None, log=print) -> Path:
    """Train both stages on bundled images, sample, evaluate, and write `report.html`; return its path.

    The same call resumes an interrupted run. After a finished one, it only evaluates and reports again.

    Args:
        output (`Path`): Folder of all results.
        features (`InceptionFeatures`, *optional*): Without them, FID is left out and nothing is downloaded.
        log (`Callable`): Takes lines about the progress.
    """
    started, from_scratch = time.monotonic(), not output.exists()
    first = load_config(AutoencoderConfig, "fashion_mnist/autoencoder", output_dir=output / "autoencoder")
    log("1/4 training the autoencoder: images to 8x8 positions of two codes each, and back")
    autoencoder_folder = autoencoder.train(first)
    folders = {"output_dir": output / "diffusion", "autoencoder": autoencoder_folder}
    second = load_config(DiffusionConfig, "fashion_mnist/diffusion", **folders)
    log("2/4 training the class-conditional UNet on the autoencoder's latents")
    pipeline_folder = diffusion.train(second)

    log("3/4 sampling every class")
    pipe = LooCLDMPipeline.from_pretrained(pipeline_folder)
    names = [pipe.config.id2label[label] for label in sorted(pipe.config.id2label)]
    labels = [label for label in range(len(names)) for _ in range(SAMPLES_PER_CLASS)]
    settings = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": GUIDANCE_SCALE}
    samples = list(sample_images(pipe, labels, seed=1, batch_size=50, **settings))

    log("4/4 evaluating")
    model = load_autoencoder(str(autoencoder_folder))
    _, validation = load_image_sets(first.data, model.config.in_channels)
    reconstruction = evaluate_reconstruction(model, float_batches(validation), validation.content_size, features)
    generation = {}
    if features is not None:
        balanced = [i % len(names) for i in range(FID_SAMPLES)]
        drawn = sample_images(pipe, balanced, seed=2, batch_size=100, **settings)
        generation = fid_and_kid(drawn, validation.pixels(), features)

    report = Report("LooC-LDM quickstart")
    report.text(
        f"Fashion-MNIST, {len(validation)} held-out images of the bundled subset. All results are from "
        f"<code>looc-ldm quickstart</code>, after {first.total_images:,} and {second.total_images:,} training images "
        "(repeats counted)."
    )
    report.heading("Samples, one row per class")
    report.text(f"{SAMPLING_STEPS} DDIM steps, guidance scale {GUIDANCE_SCALE}, averaged weights.")
    for label, name in enumerate(names):
        report.row(name, side_by_side([s for s, drawn_as in zip(samples, labels, strict=True) if drawn_as == label]))
    report.heading("Held-out images above, reconstructions below")
    reconstructions = reconstruction_grid([model], validation, RECONSTRUCTIONS)
    report.image(reconstructions)
    report.heading("Figures")
    report.table(_rows(reconstruction, generation))
    if not generation:
        report.text(
            "FID was left out: it needs Inception weights, and quickstart downloads nothing. Give a local file with "
            "<code>--inception-weights FILE</code> (and <code>--feature-layer</code> for other than 2,048 features)."
        )
        log("FID was left out: it needs Inception weights, given by --inception-weights FILE")
    report.heading("Loss")
    report.curves("autoencoder", _curves(output / "autoencoder", ("loss_pixel", "loss_quantizer")))
    report.curves("diffusion", _curves(output / "diffusion", ("loss",)))

    seconds = time.monotonic() - started
    starter = LooCLDMPipeline.from_pretrained(starter_model())
    of_starter = list(sample_images(starter, labels, seed=1, batch_size=50, **settings))
    report.heading("After longer training")
    report.text(
        "The same classes by the bundled starter model "
        "(<code>LooCLDMPipeline.from_pretrained(looc_ldm.starter_model())</code>): a similar UNet on a somewhat larger "
        "first stage, trained longer and on 55,000 images of Fashion-MNIST."
    )
    report.image(side_by_side(of_starter, rows=len(names)))

    write_image(side_by_side(samples, rows=len(names)), output / "samples.png")
    write_image(reconstructions, output / "reconstructions.png")
    figures = {"reconstruction": reconstruction, "generation": generation, "cpu_count": os.cpu_count()}
    if from_scratch:  # not if a part was done before
        figures["seconds"] = seconds
    replace_text(output / "figures.json", json.dumps(figures, indent=2))
    replace_text(output / "report.html", report.html())
    return output / "report.html"


def _rows(reconstruction: dict, generation: dict) -> list[tuple[str, str, str]]:
    """Return the rows of the report's table: figure, value, explanation."""
    k, d, images = (reconstruction[name] for name in ("num_codevectors", "codevector_dim", "images"))
    rate = f"{reconstruction['bits_per_pixel']:.2f} bits per pixel"
    rows = [
        ("PSNR", f"{reconstruction['psnr']:.2f} dB", f"mean over {images} images, on the original 28x28 pixels"),
        ("SSIM", f"{reconstruction['ssim']:.4f}", "Gaussian window of 11, sigma 1.5"),
        ("L1", f"{reconstruction['l1']:.4f}", "mean absolute error in [0, 1]"),
        (
            "Rate",
            rate,
            f"{reconstruction['bits_per_image']:.0f} bits per image of 28x28 pixels (8 per pixel uncompressed)",
        ),
        ("Codebook", f"{k} x {d}", f"{k * d:,} numbers, shared by all segments"),
        (
            "Codebook use",
            f"{reconstruction['codebook_use']:.0%}",
            f"perplexity {reconstruction['perplexity']:.0f} of {k}",
        ),
    ]
    for name, value in reconstruction.items():
        if name.startswith("rfid"):
            rows.append((name.replace("rfid", "rFID"), f"{value:.3f}", f"{images} reconstructions and originals"))
    for name, value in generation.items():
        if name.startswith(("fid", "kid@")):
            count = f"{generation['images_first']} samples, {generation['images_second']} held-out images"
            rows.append((name.upper(), f"{value:.4f}", f"{count}, at {rate}"))
    return rows


def _curves(folder: Path, names: tuple[str, ...]) -> list[Curve]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [Curve(name, [line["images"] for line in lines], [line[name] for line in lines]) for name in names]


def side_by_side(images: list[torch.Tensor], rows: int = 1) -> Image.Image:
    """Join uint8 images `(C, H, W)` of one size into one picture of `rows` rows."""
    return make_image_grid([to_pil(image) for image in images], rows, len(images) // rows)
