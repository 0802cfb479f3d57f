"""`looc-ldm quickstart`: train, sample and evaluate in miniature on bundled images, with a report."""

from __future__ import annotations

import time
from pathlib import Path

from PIL import Image

from looc_ldm.metrics import InceptionFeatures
from looc_ldm.models.starter import starter_model
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.config_parsing import load_config
from looc_ldm.training.photos.chain import TimeSpent, run_chain
from looc_ldm.training.photos.report import results_sections, write_pictures_and_figures
from looc_ldm.utils.files import replace_text
from looc_ldm.utils.report import Report

RECONSTRUCTIONS = 20


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
    folders = {"output_dir": output / "diffusion", "autoencoder": output / "autoencoder" / "model"}
    second = load_config(DiffusionConfig, "fashion_mnist/diffusion", **folders)
    spent = TimeSpent(output / "time.json")
    results = run_chain(first, [second], spent, log, features, shown_reconstructions=RECONSTRUCTIONS)

    report = Report("LooC-LDM quickstart")
    report.text(
        f"Fashion-MNIST, {len(results.validation)} held-out images of the bundled subset. All results are from "
        f"<code>looc-ldm quickstart</code>, after {first.total_images:,} and {second.total_images:,} training images "
        "(repeats counted)."
    )
    left_out = {}
    if features is None:
        left_out["FID"] = (
            "it needs Inception weights, and quickstart downloads nothing. Give a local file with "
            "<code>--inception-weights FILE</code> (and <code>--feature-layer</code> for other than 2,048 features)."
        )
        log("FID was left out: it needs Inception weights, given by --inception-weights FILE")
    results_sections(report, results, left_out)

    report.heading("After longer training")
    report.text(
        "The same classes by the bundled model "
        '(<code>LooCLDMPipeline.from_pretrained(looc_ldm.starter_model("fashion_mnist"))</code>): a similar UNet on a '
        "somewhat larger first stage, trained longer and on 55,000 images of Fashion-MNIST."
    )
    with Image.open(Path(starter_model("fashion_mnist")) / "samples.png") as samples:
        report.image(samples.copy())

    # The time only if no part was done before.
    seconds = {"seconds": time.monotonic() - started} if from_scratch else {}
    write_pictures_and_figures(output, results, **seconds)
    replace_text(output / "report.html", report.html())
    return output / "report.html"
