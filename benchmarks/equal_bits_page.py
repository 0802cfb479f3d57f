"""Write the table of docs/choosing_sizes.md and its plot from benchmarks/results/equal_bits.jsonl.

python benchmarks/equal_bits_page.py
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from io import BytesIO

from equal_bits import FILE, SETS
from results import DOCS, RESULTS, fill, markdown_table, read_results
from tables_plot import METHODS

from looc_ldm.analysis.style import new_figure, style
from looc_ldm.utils.files import replace_bytes

TITLES = {"fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
CODECS = {"jpeg": ":", "webp": "--"}


def main() -> None:
    """Write table and plot."""
    runs = defaultdict(dict)  # (bits per pixel, quantizer, n_q): PSNR of each seed, by set
    for line in read_results(FILE):
        row = runs[line["bits_per_pixel"], line["quantizer"], line["n_q"]]
        row.setdefault(line["set"], []).append(line["psnr"])
    rows = []
    for (rate, name, n_q), by_set in sorted(runs.items(), key=lambda item: (round(item[0][0]), *item[0])):
        row = {"quantizer": name, "n_q": n_q, "bits per pixel": f"{rate:.3g}"}
        for images in SETS:
            row[f"{TITLES[images]}, dB"] = mean_and_range(by_set.get(images, []))
        rows.append(row)
    fill(DOCS / "choosing_sizes.md", {"equal bits": markdown_table(rows)})
    replace_bytes(DOCS / "equal_bits.png", draw(runs))


def mean_and_range(values: Sequence[float]) -> str | None:
    """Return the mean, with the lowest and the highest value if there are several."""
    if not values:
        return None
    mean = f"{sum(values) / len(values):.2f}"
    return f"{mean} ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else mean


def draw(runs: dict) -> bytes:
    """Draw PSNR over bits per pixel: means, with bars from the lowest to the highest seed. Returns a PNG."""
    codecs = read_results(RESULTS / "image_codecs.jsonl")
    sets = [images for images in SETS if any(images in by_set for by_set in runs.values())]
    with style():
        figure = new_figure(3.0)
        for number, images in enumerate(sets):
            axes = figure.add_subplot(1, len(sets), number + 1)
            for codec, dashes in CODECS.items():
                points = sorted(
                    (line["bits_per_pixel"], line["psnr"])
                    for line in codecs
                    if (line["set"], line["codec"]) == (images, codec)
                )
                axes.plot(*zip(*points, strict=True), dashes, color="grey", linewidth=1, label=codec.upper())
            for method, (label, colour) in METHODS.items():
                for (rate, name, _), by_set in runs.items():
                    if name.split("-")[0] == method and images in by_set:
                        values = by_set[images]
                        mean = sum(values) / len(values)
                        bar = [[mean - min(values)], [max(values) - mean]]
                        axes.errorbar(rate, mean, bar, fmt="o", color=colour, markersize=4, capsize=2, label=label)
                        label = None  # one entry of the legend for each method
            axes.set(xscale="log", xlim=(0.3, 10), xlabel="bits per pixel", title=TITLES[images])
            axes.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
            axes.minorticks_off()
            if not number:
                axes.set_ylabel("PSNR, dB")
                axes.legend(fontsize="small")
        file = BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


if __name__ == "__main__":
    main()
