"""All figures of an analysis: as files, as one HTML page, and as numbers for JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from html import escape
from pathlib import Path

import torch

from looc_ldm.analysis.codebook_figures import (
    draw_embedding,
    draw_segment_use,
    draw_sharing,
    draw_use,
    segment_perplexity,
)
from looc_ldm.analysis.collect import Findings
from looc_ldm.analysis.image_figures import compared_with_codecs, draw_error_map, draw_examples, draw_rate
from looc_ldm.analysis.style import Drawing
from looc_ldm.utils.files import replace_bytes, replace_text
from looc_ldm.utils.report import Report

NUMBERS, PAGE = "analysis.json", "analysis.html"
OF_SEVERAL_SEGMENTS = [f"{name}.{kind}" for name in ("segment_use", "code_sharing") for kind in ("png", "svg")]


def analyze(findings: Findings, seed: int = 0) -> tuple[list[Drawing], dict]:
    """Draw the figures of the page and compute the numbers behind them.

    Returns the drawings, in the order of the page, and the result of `numbers`. Figures that compare segments are left
    out if there is only one segment. `seed` seeds t-SNE.
    """
    compared = compared_with_codecs(findings)
    of_segments = [draw_segment_use, draw_sharing] if len(findings.statistics.counts) > 1 else []
    drawings = [draw(findings) for draw in (draw_use, *of_segments)]
    drawings += [draw_embedding(findings, seed), draw_rate(compared)]
    drawings += [draw_error_map(findings), draw_examples(findings)]
    return drawings, numbers(findings, compared)


def numbers(findings: Findings, compared: dict) -> dict:
    """Return the numbers behind the figures, ready for JSON.

    The error map holds the mean over the pixels of each latent position, without padding.
    """
    statistics = findings.statistics
    height, width = findings.content_size
    f = findings.downsampling_factor
    errors = torch.nn.functional.avg_pool2d(findings.error_map[None], f, ceil_mode=True, count_include_pad=False)[0]
    return {
        "images": findings.images,
        "height": height,
        "width": width,
        "psnr": findings.psnr,
        "l1": findings.l1,
        "num_codevectors": len(findings.codebook),
        "codevector_dim": findings.codebook.shape[1],
        "segments": len(statistics.counts),
        "codes_per_image": findings.codes_per_image,
        "codebook_use": statistics.use,
        "perplexity": statistics.perplexity,
        "dead_codes": len(statistics.dead),
        "code_entropy": findings.entropy,
        "code_entropy_by_segment": findings.entropy_by_segment,
        "bits_per_pixel": findings.bits_per_pixel,
        "bits_per_pixel_entropy": findings.bits_per_pixel_entropy,
        "counts": statistics.counts.sum(0).tolist(),
        "dead": statistics.dead.tolist(),
        "segment_use": statistics.segment_use.tolist(),
        "segment_perplexity": segment_perplexity(statistics.counts).tolist(),
        "segments_per_codevector": statistics.segments_per_codevector.tolist(),
        "error_map": errors.tolist(),
        "rate_distortion": compared
        | {"codecs": {name: [asdict(point) for point in points] for name, points in compared["codecs"].items()}},
    }


def page(drawings: list[Drawing], figures: dict, name: str, data: str, command: str) -> str:
    """Return the self-contained HTML page about model `name` on the images `data`."""
    report = Report(f"Inside {name}")
    report.text(f"{figures['images']:,} images of {escape(data)}. <code>{escape(command)}</code>")
    k, d = figures["num_codevectors"], figures["codevector_dim"]
    entropy, ceiling, coded = figures["code_entropy"], math.log2(k), figures["bits_per_pixel_entropy"]
    report.table(
        [
            ("PSNR", f"{figures['psnr']:.2f} dB", "mean over images"),
            ("L1", f"{figures['l1']:.4f}", "mean absolute error in [0, 1]"),
            ("Rate", f"{figures['bits_per_pixel']:.4g} bits per pixel", f"log2 K = {ceiling:.4g} bits per code"),
            ("Entropy-coded", f"{coded:.4g} bits per pixel", f"{entropy:.4g} bits per code"),
            ("Codebook", f"{k:,} x {d}", f"{k * d:,} numbers, {figures['segments']:,} segments"),
            ("Codebook use", f"{figures['codebook_use']:.1%}", f"{figures['dead_codes']:,} dead"),
            ("Perplexity", f"{figures['perplexity']:,.1f}", f"of {k:,}"),
        ]
    )
    for drawing in drawings:
        report.heading(drawing.title)
        report.figure(drawing.svg(), drawing.title, drawing.caption)
    return report.html()


def write_analysis(folder: Path, drawings: list[Drawing], record: dict, html: str) -> None:
    """Write all files over an earlier analysis. The numbers are written last: they mark a complete analysis."""
    numbers = json.dumps(record, allow_nan=False)
    for name in (NUMBERS, *OF_SEVERAL_SEGMENTS):  # left by a model with more segments
        (folder / name).unlink(missing_ok=True)
    for drawing in drawings:
        replace_bytes(folder / f"{drawing.name}.png", drawing.png())
        replace_bytes(folder / f"{drawing.name}.svg", drawing.svg())
    replace_text(folder / PAGE, html)
    replace_text(folder / NUMBERS, numbers + "\n")
