"""The report of a finished training of both stages: `report.html`, `figures.json` and its pictures."""

from __future__ import annotations

import json
import os
from html import escape
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from looc_ldm.images.image_set import spread
from looc_ldm.images.pixels import to_pil
from looc_ldm.training.log import with_caption
from looc_ldm.training.photos.chain import GUIDANCE_SCALE, SAMPLING_STEPS, Results
from looc_ldm.utils.files import replace_text, write_image
from looc_ldm.utils.report import Curve, Report

LARGEST_WIDTH = 1200  # pixels of a picture in the page
SHOWN_GRIDS = 4  # for each run


def results_sections(report: Report, results: Results, left_out: dict[str, str]) -> None:
    """Add samples, reconstructions, figures and losses.

    Args:
        report: The page.
        results: The finished chain.
        left_out: Names of figures that were not measured, and the HTML of how to have them measured.
    """
    guided = f", guidance scale {GUIDANCE_SCALE}" if results.classes else ""
    report.heading("Samples, one row per class" if results.classes else "Samples")
    report.text(f"{SAMPLING_STEPS} DDIM steps{guided}, averaged weights.")
    for name, row in results.samples:
        report.row(name, fitting(side_by_side(row)))
    report.heading("Held-out images above, reconstructions below")
    report.image(fitting(results.reconstructions))
    report.heading("Figures")
    report.table(_rows(results))
    for name, how in left_out.items():
        report.text(f"{name} was left out: {how}")
    report.heading("Loss")
    report.curves("autoencoder", _curves(results.first.output_dir, ("loss_pixel", "loss_lpips", "loss_quantizer")))
    for config in results.stage_2_runs:
        report.curves(Path(config.output_dir).name, _curves(config.output_dir, ("loss",)))


def grids_section(report: Report, results: Results) -> None:
    """Add image grids over time, of each run."""
    report.heading("While it was trained")
    side = results.first.data.resolution
    for run in (results.first, *results.stage_2_runs):
        files = sorted((Path(run.output_dir) / "previews").glob("*.png"))
        if run is results.first:
            rows = "held-out photographs, reconstructions by the averaged weights, and by the latest weights"
            caption = f"<b>Stage 1.</b> From the top: {rows}."
        else:
            columns = f" The columns: {', '.join(results.classes[:10])}." if results.classes else ""
            caption = f"<b>Stage 2</b>, {Path(run.output_dir).name}. Samples from the same noise.{escape(columns)}"
        report.text(caption)
        for number in spread(len(files), SHOWN_GRIDS) if files else ():
            with Image.open(files[number]) as grid:
                rows = grid.crop((0, 0, grid.width, 3 * side))  # without the caption
                report.row(f"after {int(files[number].stem):,} images", fitting(rows))


def write_pictures_and_figures(output: Path, results: Results, **figures) -> None:
    """Write `samples.png`, `reconstructions.png` and `figures.json`."""
    drawn = side_by_side([image for _, row in results.samples for image in row], rows=len(results.samples))
    rows = f"Rows: {', '.join(name for name, _ in results.samples)}." if results.classes else "Samples."
    write_image(with_caption(drawn, rows), output / "samples.png")
    caption = "Held-out images above, reconstructions below."
    write_image(with_caption(results.reconstructions, caption), output / "reconstructions.png")
    measured = {"reconstruction": results.reconstruction, "generation": results.generation}
    replace_text(output / "figures.json", json.dumps({**measured, "cpu_count": os.cpu_count(), **figures}, indent=2))


def _rows(results: Results) -> list[tuple[str, str, str]]:
    """Return the rows of the table: figure, value, explanation."""
    reconstruction, generation = results.reconstruction, results.generation
    k, d, images, height, width = (
        reconstruction[name] for name in ("num_codevectors", "codevector_dim", "images", "height", "width")
    )
    pixels, channels = f"{height}x{width} pixels", results.first.model.get("in_channels", 3)
    rate = f"{reconstruction['bits_per_pixel']:.2f} bits per pixel"
    measured_on = f"mean over {images} images, on the original {pixels}" if results.validation.content_size else ""
    rows = [
        ("PSNR", f"{reconstruction['psnr']:.2f} dB", measured_on or f"mean over {images} held-out images of {pixels}"),
        ("SSIM", f"{reconstruction['ssim']:.4f}", "Gaussian window of 11, sigma 1.5"),
        ("L1", f"{reconstruction['l1']:.4f}", "mean absolute error in [0, 1]"),
    ]
    if "lpips_vgg" in reconstruction:
        rows.append(("LPIPS", f"{reconstruction['lpips_vgg']:.4f}", "perceptual distance by VGG16, lower is better"))
    bits = f"{reconstruction['bits_per_image']:.0f} bits per image of {pixels} ({8 * channels} per pixel uncompressed)"
    use = f"perplexity {reconstruction['perplexity']:.0f} of {k}"
    rows += [
        ("Rate", rate, bits),
        ("Codebook", f"{k} x {d}", f"{k * d:,} numbers, shared by all segments"),
        ("Codebook use", f"{reconstruction['codebook_use']:.0%}", use),
    ]
    for name, value in reconstruction.items():
        if name.startswith("rfid"):
            rows.append((name.replace("rfid", "rFID"), f"{value:.3f}", f"{images} reconstructions and originals"))
    for name, value in generation.items():
        if name.startswith(("fid", "kid@")):
            count = f"{generation['images_first']} samples, {generation['images_second']} held-out images"
            rows.append((name.upper(), f"{value:.4f}", f"{count}, at {rate}"))
    return rows


def _curves(folder: str, names: tuple[str, ...]) -> list[Curve]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    curves = []
    for name in names:
        known = [line for line in lines if name in line]
        curves.append(Curve(name, [line["images"] for line in known], [line[name] for line in known]))
    return [curve for curve in curves if curve.images]


def side_by_side(images: list[torch.Tensor], rows: int = 1) -> Image.Image:
    """Join uint8 images `(C, H, W)` of one size into one picture of `rows` rows."""
    return make_image_grid([to_pil(image) for image in images], rows, len(images) // rows)


def fitting(image: Image.Image) -> Image.Image:
    """Return a copy of an image, scaled down to at most `LARGEST_WIDTH` pixels in width."""
    image = image.copy()
    image.thumbnail((LARGEST_WIDTH, image.height))
    return image
