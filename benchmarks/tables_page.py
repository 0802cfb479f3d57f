"""docs/tables.md and its plots, from the results that benchmarks/tables.py has left."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from io import BytesIO
from itertools import combinations
from pathlib import Path

import numpy as np
from small_images import COUNTS
from table_rows import PAPER_ROWS, ROWS, TABLES, VARIANTS

from looc_ldm.analysis.rate_distortion import Point, draw_rate_distortion
from looc_ldm.analysis.style import new_figure, style
from looc_ldm.files import replace_bytes, replace_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tables"
NAMES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
TITLES = {
    "1": "Tables 1 and 8: LooC against others, at their published sizes",
    "3": "Table 3: K = 256, segments of d = 64 down to 4",
    "4": "Table 4: K d = 32,768",
    "5": "Table 5: d = 4, K from 16 to 1,024",
    "6": "Table 6: interpolation (the paper: FFHQ)",
    "7": "Table 7: without revival (the paper: FFHQ)",
    "recipes": "How the codebook learns",
    "rates": "Every quantizer, by bits per pixel",
}
FIGURES = {"psnr": "{:.2f}", "ssim": "{:.4f}", "l1": "{:.4f}", "lpips_vgg": "{:.4f}", "rfid@2048": "{:.2f}"}
HEADS = {"psnr": "PSNR", "ssim": "SSIM", "l1": "L1", "lpips_vgg": "LPIPS", "rfid@2048": "rFID"}
CLEAN = ("psnr", "ssim")  # of the protocol clean


def load_results() -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*_seed*.json"))]


def write_page(docs: Path = ROOT / "docs") -> None:
    """tables.md, with a plot for each set that has results."""
    results = load_results()
    published = json.loads((ROOT / "benchmarks" / "paper_tables.json").read_text())
    paper = published["tables"]
    parts = [_head(results, published["source"]), *_summary(results, paper)]
    plots = []
    for images in NAMES:
        chosen = _one_training(_of(results, images, TABLES["rates"]))
        if len({result["test"]["clean"]["bits_per_pixel"] for result in chosen}) > 1:
            replace_bytes(docs / f"rate_distortion_{images}.png", _plot(images, chosen, paper))
            plots += [
                f"![Quality over bits per pixel, {NAMES[images]}](rate_distortion_{images}.png)",
                f"{NAMES[images]}, clean figures, of the {len(chosen)} rows that were trained for "
                f"{_words_of_training(chosen[0])}. Hollow: what the paper states, after 500 epochs, of JPEGs (ours by "
                "that protocol are in the tables). "
                "Codecs: 1,000 of the test images, whole files with their headers.",
            ]
    if plots:
        parts += ["## At equal bits", *plots]
    shown = set()
    for table, title in TITLES.items():
        if table == "recipes":
            parts += _recipes(title, results)
            continue
        sections = []
        for images in NAMES:
            trainings = _by_training(_of(results, images, TABLES[table]))
            for rows in trainings:
                if len(rows) == 1 < len(trainings) and rows[0]["row"] in TABLES["recipes"]:
                    continue  # longer than the others: it stands beside its kind, in the table of recipes
                names = {(images, rows[0]["budget"], rows[0]["batch_size"], rows[0]["seed"], r["row"]) for r in rows}
                if not names <= shown:  # something that no earlier table has shown
                    shown |= names
                    sections.append(_table(table, images, rows, paper))
        if sections:
            parts += [f"## {title}", *sections]
    replace_text(docs / "tables.md", "\n\n".join(parts) + "\n")


def _head(results: list[dict], source: str) -> str:
    devices = ", ".join(sorted({result["device"] for result in results})) or "nothing yet"
    return f"""# The paper's tables, measured

Written by `python benchmarks/readme.py tables` from what `benchmarks/tables.py` measured ({devices}).

The paper's small VQ-VAE (f = 4, n_q = 128 unless a row says otherwise), Adam 3e-4, MSE / variance + quantizer loss, no
augmentation. HVQ-VAE has networks of its own and a sum of squared errors, SQ-VAE the likelihood of a decoder with a
learned variance; the losses of PQ's 32 codebooks are added, as published, unless a row says that they are averaged;
VQ-VAE's commitment weight is on the commitment term, where the authors' code has it on the other.

*Epochs* are images seen over the size of the whole training set, of which the last 5,000 images are held out and choose
the checkpoint; **the authors chose theirs on the test set**. The published training has 500 epochs, of batches of 128:
a shorter one shows order and trend, not the level. Figures are of the 10,000 test images unless they are called held
out. *Clean* figures are of float images; those of the protocol *paper*, of JPEGs, stand beside the paper's
([protocols](evaluation.md#protocols)). *Use* is the share of the codevectors that the test images use; *chosen at* is
where the checkpoint is from if not from the end of the training. Bits per pixel are log2 K bits a code: methods of one
table pay very different rates, which a table by K x d hides.

The command that repeats a row is in its result file in `benchmarks/results/tables/`. Everything as it was published,
on a GPU: `python benchmarks/tables.py all --data FOLDER --device cuda --jobs 8 --lpips-vgg-weights FILE
--inception-weights FILE`. MoVQ's modulated decoder, a switch of `LooCVQModel` (`norm_type="spatial"`), is in no row:
it modulates norms, of which this small network has none.

The paper's figures: {source}"""


def _table(table: str, images: str, rows: list[dict], paper: dict) -> str:
    """Rows of one training."""
    lines = []
    for result in rows:
        published = {}
        if result["row"] in PAPER_ROWS.get(table, {}):
            published = paper[table][PAPER_ROWS[table][result["row"]]].get(images, {})
        lines.append((result["test"]["clean"]["bits_per_pixel"], _line(result, published)))
    if table == "rates":
        lines.sort(key=lambda pair: pair[0])
    figures = [name for name in FIGURES if any(name in row["test"]["clean"] for row in rows)]
    head = ["", "bits per pixel", "use", "chosen at"]
    columns = [("clean", name) for name in CLEAN] + [(kind, name) for kind in KINDS[1:] for name in figures]
    head += [f"{HEADS[name]}, {KIND_NAMES[kind]}" for kind, name in columns]
    cells = [[*line["first"], *(line[column] for column in columns)] for _, line in lines]
    return f"### {NAMES[images]}, {_words_of_training(rows[0])}\n\n{_markdown(head, cells)}"


def _summary(results: list[dict], paper: dict) -> list[str]:
    """How far the paper's orders and levels are reached: words and a table each; nothing without results."""
    orders = [_order(table, images, results, paper) for table in ("1", "3", "4", "5") for images in NAMES]
    orders = [line for lines in orders for line in lines]
    levels = []
    for images in NAMES:
        for row in ("looc-32x4", "looc-256x4"):
            published = paper["5"][row.removeprefix("looc-")][images]
            of_row = {}
            for result in _of(results, images, [f"{row}{variant}" for variant in LEVELS]):
                of_row.setdefault(result["row"], result)  # the longest training
            for result in of_row.values():
                figures = result["test"]["paper"]
                cells = [
                    ROWS[result["row"]].method,
                    NAMES[images],
                    *_training(result),
                    f"{figures['codebook_use']:.1%}",
                ]
                cells.append(f"{figures['psnr'] - published['psnr']:+.2f}")
                cells.append(f"{result['test']['clean']['psnr']:.2f}")
                for name in ("psnr", "ssim", "l1", "lpips_vgg"):
                    ours = FIGURES[name].format(figures[name]) if name in figures else "-"
                    cells.append(f"{ours} / {FIGURES[name].format(published[name])}")
                cells.append(_last_doubling(result))
                levels.append(cells)
    parts = []
    if orders:
        head = ["table", "images", "epochs", "batch", "pairs", "in the paper's order", "the others"]
        head.append("without a figure in the paper")
        parts.append(
            "Of all pairs of rows of one table and one training for which the paper has figures, how many stand in its "
            "order by PSNR. More bits per pixel mostly mean a higher PSNR, so that agreement alone says little."
        )
        parts.append(_markdown(head, orders))
    if levels:
        head = ["", "images", "epochs", "batch", "use", "PSNR, difference", "PSNR, clean", "PSNR, ours / the paper's"]
        parts.append(
            "The level, protocol *paper*, of the longest training of each row. *Last doubling* is about what the "
            "held-out PSNR gained from half of the images seen to all of them: as long as it is whole decibels, the "
            "training is too short to say which level a method reaches. From two epochs to the published 500 there "
            "are eight doublings of the images, and five of the steps, whose batches are larger there."
        )
        parts.append(_markdown([*head, "SSIM", "L1", "LPIPS", "last doubling"], levels))
    return ["## How close to the paper", *parts] if parts else []


def _last_doubling(result: dict) -> str:
    """What the held-out PSNR gained from half of the images seen to all, interpolated along log(images)."""
    seen, errors = zip(*result["curve"], strict=True)
    half = result["images_seen"] / 2
    if half < seen[0]:
        return "-"
    psnr = [10 * math.log10(4 / error) for error in errors]
    return f"{psnr[-1] - np.interp(math.log(half), np.log(seen), psnr):+.1f} dB"


def _order(table: str, images: str, results: list[dict], paper: dict) -> list[list[str]]:
    """A line for each training (budget, batch, seed) of which a table has at least three rows."""
    lines = []
    for training in _by_training(_of(results, images, PAPER_ROWS[table])):
        pairs_of_psnr = {}
        for result in training:
            published = paper[table][PAPER_ROWS[table][result["row"]]].get(images, {})
            if "psnr" in published:
                pairs_of_psnr[result["row"]] = (result["test"]["paper"]["psnr"], published["psnr"])
        if len(pairs_of_psnr) < 3:
            continue
        pairs = list(combinations(pairs_of_psnr.items(), 2))
        differ = [
            f"{a.removeprefix('looc-')} and {b.removeprefix('looc-')}"
            for (a, (our_a, their_a)), (b, (our_b, their_b)) in pairs
            if (our_a - our_b) * (their_a - their_b) <= 0
        ]
        cells = [table, NAMES[images], *_training(training[0]), str(len(pairs))]
        unknown = [row["row"] for row in training if row["row"] not in pairs_of_psnr]
        agreement = f"{1 - len(differ) / len(pairs):.0%}"
        lines.append([*cells, agreement, "; ".join(differ), ", ".join(unknown)])
    return lines


def _of(results: list[dict], images: str, rows) -> list[dict]:
    """Results of some rows on one set, longest training first, in the order of the rows."""
    found = [result for result in results if result["images"] == images and result["row"] in rows]
    order = list(rows)
    return sorted(found, key=lambda r: (order.index(r["row"]), -r["budget"], r["batch_size"], r["seed"]))


def _training(result: dict) -> list[str]:
    """Cells: epochs and batch."""
    return [f"{result['images_seen'] / COUNTS[result['images']]:.3g}", str(result["batch_size"])]


def _words_of_training(result: dict) -> str:
    epochs, batch = _training(result)
    return f"{epochs} epoch{'' if epochs == '1' else 's'} with batches of {batch} and seed {result['seed']}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


LEGEND_COLUMNS = 2
LEVELS = ("", "-rotation", "-ema", "-ema-rotation")  # variants whose level stands beside the paper's
KIND_NAMES = {"clean": "clean", "paper": "paper protocol", "published": "the paper's"}
KINDS = tuple(KIND_NAMES)


def _line(result: dict, published: dict) -> dict:
    clean = result["test"]["clean"]
    cells = {
        "first": [
            ROWS[result["row"]].method,
            f"{clean['bits_per_pixel']:.3g}",
            f"{clean['codebook_use']:.1%}",
            "" if result["chosen_at_images"] == result["images_seen"] else f"{result['chosen_at_images']:,}",
        ]
    }
    for kind, figures in (("clean", clean), ("paper", result["test"]["paper"]), ("published", published)):
        for name, form in FIGURES.items():
            shown = form.format(figures[name]) if name in figures else ""
            if kind == "published" and shown and float(shown) != figures[name]:
                shown = str(figures[name])  # as printed
            cells[kind, name] = shown
    return cells


def _recipes(title: str, results: list[dict]) -> list[str]:
    """For each size and training a table of recipes by sets of images."""
    trainings = defaultdict(dict)
    for result in results:
        if result["row"] in TABLES["recipes"]:
            training = tuple(result[key] for key in ("budget", "batch_size", "seed"))
            trainings[result["row"].split("-")[1], training][result["row"], result["images"]] = result
    parts = []
    for (size, (budget, batch, seed)), found in sorted(trainings.items()):
        rows = [row for row in TABLES["recipes"] if any((row, images) in found for images in NAMES)]
        sets = [images for images in NAMES if any((row, images) in found for row in rows)]
        if len(rows) < 2:
            continue
        rate = next(iter(found.values()))["test"]["clean"]["bits_per_pixel"]
        training = f"{budget:,} images in batches of {batch}, seed {seed}"
        parts.append(f"### {size.replace('x', '×')}, {training}: {rate:.3g} bits per pixel")
        cells = [[ROWS[row].method, *(_held_out(found.get((row, images))) for images in sets)] for row in rows]
        parts.append(_markdown(["", *(NAMES[images] for images in sets)], cells))
    if not parts:
        return []
    words = (
        "Clean PSNR in dB of the held-out training images (of the mean squared error of all), at equal bits and equal "
        "images seen; figures of the test images are in the tables below. One seed each: a few tenths are noise."
    )
    return [f"## {title}", words, *parts, *_by_rotation(trainings)]


def _by_rotation(trainings: dict) -> list[str]:
    """What the rotation trick adds, over all pairs of results that only it parts."""
    gains = []
    for found in trainings.values():
        for (row, images), result in found.items():
            other = found.get((f"{row}-rotation", images))
            if other:
                gains.append((float(_held_out(other)) - float(_held_out(result)), images))
    if not gains:
        return []
    ahead = sum(gain > 0 for gain, _ in gains)
    sets = [NAMES[name] for name in NAMES if any(images == name for _, images in gains)]
    return [
        f"The rotation trick is ahead in {ahead} of {len(gains)} pairs of rows of {', '.join(sets)} that differ in "
        f"nothing else, by {min(gains)[0]:.1f} to {max(gains)[0]:.1f} dB; which update of the codebook is better with "
        "it differs by set and, with one seed each, is not told here."
    ]


def _held_out(result: dict | None) -> str:
    return "" if result is None else f"{10 * math.log10(4 / result['validation_mse']):.2f}"


def _by_training(results: list[dict]) -> list[list[dict]]:
    """Results apart by budget, batch and seed, longest training first."""
    trainings = defaultdict(list)
    for result in results:
        trainings[result["budget"], result["batch_size"], result["seed"]].append(result)
    return [trainings[training] for training in sorted(trainings, reverse=True)]


def _one_training(results: list[dict]) -> list[dict]:
    """Of one training only (budget, batch, seed): that of most rows, and of those the longest."""
    return max(_by_training(results), key=lambda rows: (len(rows), rows[0]["budget"]), default=[])


def _plot(images: str, results: list[dict], paper: dict) -> bytes:
    """PSNR and SSIM, clean, over bits per pixel: every quantizer, JPEG and WebP, and what the paper states of LooC."""
    file = RESULTS / f"codecs_{images}.json"
    codecs = {}
    if file.is_file():
        stored = json.loads(file.read_text())["codecs"]
        codecs = {name: [Point(**point) for point in points] for name, points in stored.items()}
    families = defaultdict(list)
    for result in results:
        families[_family(result["row"])].append(result["test"]["clean"])
    with style():
        legend_rows = math.ceil((len(families) + len(codecs) + 1) / LEGEND_COLUMNS)
        figure = new_figure(3.0 + 0.2 * legend_rows)
        for number, name in enumerate(("psnr", "ssim")):
            axes = figure.add_subplot(1, 2, number + 1)
            draw_rate_distortion(axes, codecs, [], name)
            for color, (family, points) in enumerate(sorted(families.items())):
                points = sorted(points, key=lambda point: point["bits_per_pixel"])
                axes.plot(
                    [point["bits_per_pixel"] for point in points],
                    [point[name] for point in points],
                    marker="os^vDP*X<>"[color % 10],
                    linestyle="none" if family.startswith("LooC") else "-",
                    linewidth=1,
                    markersize=5,
                    label=family,
                )
            stated = _of_paper(images, paper, name)
            axes.plot(*zip(*stated, strict=True), "^", mfc="none", color="0.5", markersize=5, label="LooC, the paper")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=LEGEND_COLUMNS)
        figure.suptitle(f"{NAMES[images]}, test set, {_words_of_training(results[0])}")
        content = BytesIO()
        figure.savefig(content, format="png", dpi=130)
    return content.getvalue()


def _of_paper(images: str, paper: dict, figure: str) -> list[tuple[float, float]]:
    """Bits per pixel and a figure of the LooC rows of Tables 3, 4 and 5."""
    rows = {row: paper[table][name] for table in ("3", "4", "5") for row, name in PAPER_ROWS[table].items()}
    pixels_per_position = 16  # f = 4
    return [
        (ROWS[row].make().bits_per_position / pixels_per_position, figures[images][figure])
        for row, figures in rows.items()
    ]


def _family(row: str) -> str:
    kind = row.split("-")[0]
    if kind != "looc":
        return {"pq": "PQ", "rq": "RQ", "rfsq": "residual FSQ", "factorized": "ViT-VQGAN"}.get(kind, kind.upper())
    variant = next(name for name in sorted(VARIANTS, key=len, reverse=True) if row.endswith(name))
    if variant:
        return f"LooC, {VARIANTS[variant][1]}"
    return "LooC, published rule, s > 1" if "-s" in row else "LooC, published rule"
