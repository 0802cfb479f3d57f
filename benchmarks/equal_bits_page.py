"""Write the tables and plot of docs/choosing_sizes.md, and README's table of results, from results/equal_bits.jsonl.

python benchmarks/equal_bits_page.py
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from io import BytesIO

from equal_bits import FILE, IMAGES, MAIN, SETS
from results import DOCS, RESULTS, ROOT, fill, markdown_table, read_results
from tables_page import SETS as TITLES

from looc_ldm.analysis.rate_distortion import CODEC_NAMES
from looc_ldm.analysis.style import BLUE, GREEN, ORANGE, RED, SKY, new_figure, style
from looc_ldm.utils.files import replace_bytes

# Name and colour of the methods that are compared at every rate.
METHODS = {
    "looc": ("LooC", BLUE),
    "fsq": ("FSQ", RED),
    "rq": ("RQ", GREEN),
    "gsq": ("GSQ", ORANGE),
    "bsq": ("BSQ", SKY),
}
TUNED = ("looc", "fsq", "gsq")  # methods of which several sizes were tried
LONGER = 5 * IMAGES  # training images of the longer trainings
CODECS = {"jpeg": ":", "webp": "--"}


def main() -> None:
    """Write tables and plot."""
    fill(DOCS / "choosing_sizes.md", tables())
    fill(ROOT / "README.md", {"equal bits": summary_table(runs())})
    replace_bytes(DOCS / "equal_bits.png", draw(runs()))


def runs(images: int = IMAGES) -> list[dict]:
    """Return the results after so many training images, by rate, width, name and seed."""
    lines = [line for line in read_results(FILE) if line["images"] == images]
    names = ("n_q", "quantizer", "seed")
    return sorted(lines, key=lambda line: (near(line["bits_per_pixel"]), *(line[name] for name in names)))


def near(rate: float) -> float:
    """Return the rate rounded to halves, to group rates that are about equal."""
    return round(2 * rate) / 2


def method(name: str) -> str:
    """Return the method of a quantizer's name: "fsq" of "fsq-8x16x16"."""
    return name.split("-")[0]


def compared(lines: list[dict]) -> list[dict]:
    """Return the results of the chosen sizes, and of the methods of which one size was tried."""
    return [line for line in lines if line["quantizer"] in MAIN or method(line["quantizer"]) not in TUNED]


def tables() -> dict[str, str]:
    """Return every table of the page by the name of its markers."""
    lines = runs()
    return {
        "equal bits": equal_bits_table(compared(lines)),
        "longer": equal_bits_table(runs(LONGER)),
        "sizes": sizes_table(lines),
    }


def by_quantizer(lines: Iterable[dict]) -> dict[tuple[float, str], dict[str, list[float]]]:
    """Return PSNR of each seed by set, for each rate and quantizer."""
    found = defaultdict(lambda: defaultdict(list))
    for line in lines:
        found[line["bits_per_pixel"], line["quantizer"]][line["set"]].append(line["psnr"])
    return found


def equal_bits_table(lines: list[dict]) -> str:
    """Return mean and range of the seeds of each quantizer on each set, the best first at each rate."""
    rows = []

    def place(item: tuple) -> tuple:
        (rate, _), by_set = item
        return near(rate), -max(map(statistics.mean, by_set.values()))

    for (rate, name), by_set in sorted(by_quantizer(lines).items(), key=place):
        row = {"quantizer": name, "bits per pixel": f"{rate:.3g}"}
        rows.append(row | {f"{TITLES[images]}, dB": mean_and_range(by_set[images]) for images in SETS})
    return markdown_table(rows)


def summary_table(lines: list[dict]) -> str:
    """Return the mean of the seeds of each quantizer of the comparison, the highest in bold: a row per set and rate."""
    means = defaultdict(dict)
    for (rate, name), by_set in by_quantizer(line for line in lines if line["quantizer"] in MAIN).items():
        for images, values in by_set.items():
            means[images, rate][METHODS[method(name)][0]] = f"{statistics.mean(values):.1f}"
    rows = []
    for images, rate in sorted(means, key=lambda key: (SETS.index(key[0]), key[1])):
        of_row = means[images, rate]
        best = max(of_row.values(), key=float)
        row = {"images": TITLES[images], "bits per pixel": f"{rate:.3g}"}
        shown = {title: f"**{mean}**" if mean == best else mean for title, mean in of_row.items()}
        rows.append(row | {title: shown.get(title) for title, _ in METHODS.values()})
    return markdown_table(rows)


def sizes_table(lines: list[dict]) -> str:
    """Return the sizes that were tried, with the PSNR of held-out training images, which chose; seed 1."""
    rows = defaultdict(dict)
    tried = [line for line in lines if line["seed"] == 1 and method(line["quantizer"]) in TUNED]
    for line in sorted(tried, key=lambda line: (near(line["bits_per_pixel"]), TUNED.index(method(line["quantizer"])))):
        name = line["quantizer"]
        rows[name] |= {"quantizer": name, "bits per pixel": f"{line['bits_per_pixel']:.3g}"}
        rows[name][line["set"]] = f"{line['validation_psnr']:.2f}"
    sets = {images: f"{TITLES[images]}, held out, dB" for images in SETS}
    for row in rows.values():
        row |= {title: row.pop(images, None) for images, title in sets.items()}
    return markdown_table(list(rows.values()))


def mean_and_range(values: Sequence[float]) -> str | None:
    """Return the mean, with the lowest and the highest value if there are several."""
    if not values:
        return None
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else mean


def draw(lines: list[dict]) -> bytes:
    """Draw PSNR over bits per pixel: means, with bars from the lowest to the highest seed. Returns a PNG."""
    codecs = read_results(RESULTS / "image_codecs.jsonl")
    found = by_quantizer(line for line in lines if line["quantizer"] in MAIN)
    sets = [images for images in SETS if any(images in by_set for by_set in found.values())]
    with style():
        figure = new_figure(3.6)
        for number, images in enumerate(sets):
            axes = figure.add_subplot(1, len(sets), number + 1)
            for codec, dashes in CODECS.items():
                points = sorted(
                    (line["bits_per_pixel"], line["psnr"])
                    for line in codecs
                    if (line["set"], line["codec"]) == (images, codec)
                )
                axes.plot(*zip(*points, strict=True), dashes, color="grey", linewidth=1, label=CODEC_NAMES[codec])
            best = 0.0
            for key, (label, colour) in METHODS.items():
                for (rate, name), by_set in found.items():
                    if method(name) == key and images in by_set:
                        values = by_set[images]
                        mean, best = statistics.mean(values), max(best, *values)
                        bar = [[mean - min(values)], [max(values) - mean]]
                        axes.errorbar(rate, mean, bar, fmt="_", color=colour, markersize=14, mew=2, label=label)
                        label = None  # one entry of the legend for each method
            axes.set(xscale="log", xlim=(0.3, 10), ylim=(18, best + 6), xlabel="bits per pixel", title=TITLES[images])
            axes.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
            axes.minorticks_off()
            if not number:
                axes.set_ylabel("PSNR, dB")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", fontsize="small")
        file = BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


if __name__ == "__main__":
    main()
