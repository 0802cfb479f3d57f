"""The samples that are closest to training images: a picture of the pairs, and a page with it and all figures."""

from __future__ import annotations

from html import escape
from pathlib import Path

from looc_ldm.analysis.style import Drawing, new_figure, picture, style
from looc_ldm.commands.generation_features import Samples
from looc_ldm.commands.image_sets import StoredImages
from looc_ldm.commands.record import printed_figures
from looc_ldm.utils.files import replace_bytes, replace_text
from looc_ldm.utils.report import Report

COLUMNS = 6


def draw_closest_pairs(samples: Samples, training: StoredImages, found: dict) -> Drawing:
    """Draw each of the closest samples above its nearest training image; samples of a model are drawn again.

    `found` are the details of `memorization` in `looc_ldm.metrics.generation`.
    """
    pairs = found["closest"]
    rows = -(-len(pairs) // COLUMNS)
    with style():
        figure = new_figure(2.6 * rows)
        axes = figure.subplots(2 * rows, COLUMNS, squeeze=False)
        for each in axes.flat:
            each.set_axis_off()
        for name, images, offset in (("sample", samples, 0), ("training_image", training, 1)):
            places = sorted({pair[name] for pair in pairs})
            pixels = dict(zip(places, images.batches([range(place, place + 1) for place in places]), strict=True))
            for number, pair in enumerate(pairs):
                picture(axes[2 * (number // COLUMNS) + offset, number % COLUMNS], pixels[pair[name]][0])
        for number, pair in enumerate(pairs):
            axes[2 * (number // COLUMNS) + 1, number % COLUMNS].set_title(f"{pair['distance']:.2f}", loc="center")
    caption = (
        f"Samples above, the nearest of {found['training_images']:,} training images below, between them the distance "
        f"of their features. Below {found['threshold']:.2f}, the first percentile of {found['held_out_images']:,} "
        "held-out images, a sample counts as a copy."
    )
    return Drawing("closest_pairs", "The samples closest to training images", caption, figure)


def write_page(file: Path, record: dict, drawing: Drawing) -> None:
    """Write the page, and the picture beside it as a PNG file of the same name."""
    report = Report("Samples and real images")
    report.text(f"<code>{escape(record['command'])}</code>")
    report.table(printed_figures(record))
    for note in record["notes"]:
        report.text(escape(note))
    report.heading(drawing.title)
    report.figure(drawing.svg(), drawing.title, drawing.caption)
    replace_bytes(file.with_suffix(".png"), drawing.png())
    replace_text(file, report.html())
