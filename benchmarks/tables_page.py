"""docs/tables.md and its plots, from the results that benchmarks/tables.py has left."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
from small_images import COUNTS
from table_rows import PAPER_ROWS, ROWS, TABLES
from tables_plot import draw_plot, family_of

from looc_ldm.files import replace_bytes, replace_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tables"
TIE = 0.4  # dB; one training done twice, with other rounding, has parted by 0.3 dB
NEAR = 1.06  # rates up to this ratio are compared as equal
NAMES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
TITLES = {
    "1": "Tables 1 and 8: LooC against others, at their published sizes",
    "3": "Table 3: K = 256, segments of d = 64 down to 4",
    "4": "Table 4: K d = 32,768",
    "5": "Table 5: d = 4, K from 16 to 1,024",
    "6": "Table 6: interpolation (the paper: FFHQ)",
    "7": "Table 7: without revival (the paper: FFHQ)",
    "recipes": "How the codebook learns",
    "rates": "All rows, by bits per pixel",
}
FIGURES = {"psnr": "{:.2f}", "ssim": "{:.4f}", "l1": "{:.4f}", "lpips_vgg": "{:.4f}", "rfid@2048": "{:.2f}"}
HEADS = {"psnr": "PSNR", "ssim": "SSIM", "l1": "L1", "lpips_vgg": "LPIPS", "rfid@2048": "rFID"}
PUBLISHED_EPOCHS = 500
CLEAN = ("psnr", "ssim")  # of the protocol clean


def load_results() -> list[dict]:
    return [{"annealed": False} | json.loads(file.read_text()) for file in sorted(RESULTS.glob("*_seed*.json"))]


def write_page(docs: Path = ROOT / "docs") -> None:
    """tables.md, with a plot for each set that has results."""
    results = load_results()
    published = json.loads((ROOT / "benchmarks" / "paper_tables.json").read_text())
    paper = published["tables"]
    parts = [_head(results, published["source"]), *_summary(results, paper), *_equal_bits(results, paper, docs)]
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
                    continue  # longer than the others: it stands among the levels
                names = {(images, *_setting(r), r["row"]) for r in rows}
                if not names <= shown:  # something that no earlier table has shown
                    shown |= names
                    sections += [_table(table, images, rows, paper), *_in_a_sentence(table, rows)]
        if sections:
            parts += [f"## {title}", *sections]
    replace_text(docs / "tables.md", "\n\n".join(parts) + "\n")


def _head(results: list[dict], source: str) -> str:
    devices = ", ".join(sorted({result["device"] for result in results})) or "nothing yet"
    return f"""# The paper's tables, measured

Written by `python benchmarks/readme.py tables` from what `benchmarks/tables.py` measured ({devices}).

- **Network**: the paper's small VQ-VAE (f = 4, n_q = 128 unless a row says otherwise), Adam 3e-4, MSE / variance +
  quantizer loss, no augmentation. HVQ-VAE has networks of its own and a sum of squared errors, SQ-VAE the likelihood of
  a decoder with a learned variance. The losses of PQ's 32 codebooks are added, as published, unless a row says that
  they are averaged; VQ-VAE's commitment weight is on the commitment term, where the authors' code has it on the other;
  RQ starts by k-means. MoVQ's modulated decoder, a switch of `LooCVQModel` (`norm_type="spatial"`), is in no row: it
  modulates norms, of which this network has none.
- **Gradients** go straight through every quantizer, unless a row says *rotation trick*.
- **Training**: *epochs* are images seen over the size of the whole training set, of which the last 5,000 images are
  held out and choose the checkpoint; **the authors chose theirs on the test set**. The published training has 500
  epochs, of batches of 128: a shorter one shows order and trend, not the level. *Annealed* ones, ours and not
  published, learn more of as many images: Adam's learning rate is 3e-3 after 200 steps and falls in a line to 0, and
  the networks are in bfloat16 (`--annealed`). One seed: a few tenths of a dB are noise.
- **Figures** are of the 10,000 test images unless they are called held out. *Clean* ones are of float images; those of
  the protocol *paper*, of JPEGs and with another window of SSIM, stand beside the paper's
  ([protocols](evaluation.md#protocols)). *Use* is the share of the codevectors that the test images use; *chosen at*,
  images seen where the checkpoint is from, if not from the end of the training.
- **Rates** are log2 K bits a code, over all pixels of an image; *entropy* is what an ideal coder would take that knows
  how often a codebook's codevectors occur in the test images, and no context. Methods of one table pay very different
  rates, which a table by K x d hides{_above_lossless(results)}.
- **Commands** stand at the tables; that of a single row is in its result file in `benchmarks/results/tables/`.
  Everything as it was published, on a GPU: `python benchmarks/tables.py all --data FOLDER --device cuda --jobs 8
  --lpips-vgg-weights FILE --inception-weights FILE`.

The paper's figures: {source}"""


def _equal_bits(results: list[dict], paper: dict, docs: Path) -> list[str]:
    """For each set a plot of its rows, written into `docs`, and who is ahead at the rates that several pay."""
    parts = []
    for images in NAMES:
        rows = _one_training(_of(results, images, TABLES["rates"]))
        if len({result["test"]["clean"]["bits_per_pixel"] for result in rows}) < 2:
            continue
        file = RESULTS / f"codecs_{images}.json"
        codecs = json.loads(file.read_text()) if file.is_file() else {}
        title = f"{NAMES[images]}, test set, {_words_of_training(rows[0])}"
        replace_bytes(docs / f"rate_distortion_{images}.png", draw_plot(images, rows, codecs, paper, title))
        longer = [r for r in _of(results, images, TABLES["rates"]) if r["images_seen"] > rows[0]["images_seen"]]
        best = max(longer, key=_psnr, default=None)
        parts += [
            f"### {NAMES[images]}",
            f"![Quality over bits per pixel, {NAMES[images]}](rate_distortion_{images}.png)",
            f"Clean figures of the {len(rows)} rows that were trained for {_words_of_training(rows[0])}: "
            f"{_command('rates', rows, images)}. Hollow: the paper's PSNR, after 500 epochs, of JPEGs (ours by that "
            f"protocol is in the tables). {_of_codecs(codecs)}",
        ]
        if best:
            parts.append(
                f"The highest after a longer training: {_in_words(best)}, {_training(best)[0]} epochs (not in the "
                f"plot): {_command('recipes', [best], images)}."
            )
        parts += _who_is_ahead(rows)
    return ["## At equal bits", *parts] if parts else []


def _who_is_ahead(rows: list[dict]) -> list[str]:
    """Of rows of one training: what is as good as LooC's published rule for fewer bits, and a table of equal rates."""
    parts = []
    published = [r for r in rows if family_of(r["row"])[:2] == ("looc", "")]
    best = max(published, key=_psnr, default=None)
    cheaper = [r for r in rows if best and _psnr(r) > _psnr(best) - TIE and _rate(r) < _rate(best)]
    if cheaper:
        listed = "; ".join(_in_words(r) for r in sorted(cheaper, key=_rate))
        parts.append(
            f"After this training the highest PSNR of LooC's published rule is that of {_in_words(best)}. As high "
            f"within {TIE} dB, or higher, for fewer bits: {listed}."
        )
    highest = [r for r in rows if not any(_rate(o) <= _rate(r) and _psnr(o) > _psnr(r) for o in rows)]
    if len(rows) > 1:
        listed = "; ".join(_in_words(r) for r in sorted(highest, key=_rate))
        parts.append(f"No row has a higher PSNR for as many bits or fewer than these: {listed}.")
    groups = []
    for result in sorted(rows, key=_rate):
        if not groups or _rate(result) > NEAR * _rate(groups[-1][0]):
            groups.append([])
        groups[-1].append(result)
    lines = []
    for found in groups:
        if len(found) > 1:
            rates = list(dict.fromkeys(f"{_rate(r):.3g}" for r in found))
            rate = " to ".join(rates[:: len(rates) - 1 or 1])
            found = sorted(found, key=_psnr, reverse=True)
            words = f"{ROWS[found[0]['row']].method} {_psnr(found[0]):.2f}"
            for above, result in pairwise(found):
                joint = " ≈ " if _psnr(above) - _psnr(result) < TIE else "; "
                words += f"{joint}{ROWS[result['row']].method} {_psnr(result):.2f}"
            lines.append([rate, words])
    if lines:
        head = f"clean PSNR in dB, the highest first; ≈ between those that are closer than {TIE} dB"
        parts.append(_markdown(["bits per pixel", head], lines, numbers=False))
    return parts


def _of_codecs(record: dict) -> str:
    """What the caption of a plot says of what images take without a model."""
    if not record:
        return ""
    lossless = record["lossless"]
    return (
        f"Codecs: {record['count']:,} of the test images, whole files with their headers (a JPEG of one grey takes "
        f"{record['empty_jpeg']:.3g} bits per pixel): `{record['command']}`. The same images raw: {record['raw']} bits "
        f"per pixel; without loss {lossless['png']:.3g} as PNG, {lossless['webp']:.3g} as WebP."
    )


def _psnr(result: dict) -> float:
    return result["test"]["clean"]["psnr"]


def _rate(result: dict) -> float:
    return result["test"]["clean"]["bits_per_pixel"]


def _in_words(result: dict) -> str:
    return f"{ROWS[result['row']].method}, {_psnr(result):.2f} dB at {_rate(result):.3g} bits per pixel"


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
    head = ["", "bits per pixel", "entropy", "use", "chosen at (images)"]
    columns = [("clean", name) for name in CLEAN] + [(kind, name) for kind in KINDS[1:] for name in FIGURES]
    measured = {name for name in FIGURES if any(name in row["test"]["clean"] for row in rows)}
    columns = [
        (kind, name) for kind, name in columns if name in measured and any(line[kind, name] for _, line in lines)
    ]
    head += [f"{HEADS[name]}, {KIND_NAMES[kind]}" for kind, name in columns]
    cells = [[*line["first"], *(line[column] for column in columns)] for _, line in lines]
    heading = f"### {NAMES[images]}, {_words_of_training(rows[0])}"
    return f"{heading}\n\n{_command(table, rows, images)}\n\n{_markdown(head, cells)}"


def _in_a_sentence(table: str, rows: list[dict]) -> list[str]:
    """What Tables 6 and 7 show, of rows of one training."""
    found = {result["row"]: result for result in rows}
    if table == "6" and "looc-256x4" in found:
        base = found.pop("looc-256x4")
        finer = {row.removeprefix("looc-256x4-s"): result for row, result in found.items() if "256x4-s" in row}
        gains = [
            f"{_psnr(r) - _psnr(base):+.2f} dB for {_rate(r) / _rate(base):.0f} times the bits" for r in finer.values()
        ]
        if finer:
            return [f"LooC 256×4, clean, s = {', '.join(finer)} instead of 1: {'; '.join(gains)}."]
    if table == "7":
        losses = [
            f"{row.removeprefix('looc-').replace('x', '×')} {_psnr(result) - _psnr(revived):+.2f} dB, clean, with "
            f"{result['test']['clean']['codebook_use']:.1%} of the codebook in use"
            for row, revived in found.items()
            if (result := found.get(f"{row}-no-revival"))
        ]
        if losses:
            return [f"Without revival: {'; '.join(losses)}. The paper has all of it in use, on FFHQ."]
    return []


def _command(table: str, results: list[dict], *sets: str) -> str:
    """What makes the results of one training, which are rows of a table."""
    names = list(dict.fromkeys(result["row"] for result in results))
    rows = "" if set(names) == set(TABLES[table]) else f" --row {' '.join(names)}"
    first = results[0]
    return (
        f"`python benchmarks/tables.py {table}{rows} --sets {' '.join(sets)} --data FOLDER --budget {first['budget']} "
        f"--batch-size {first['batch_size']}{' --annealed' if first['annealed'] else ''} --seed {first['seed']}`"
    )


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
                of_row.setdefault((result["row"], result["annealed"]), result)  # the longest training
            for result in of_row.values():
                figures = result["test"]["paper"]
                cells = [
                    ROWS[result["row"]].method,
                    NAMES[images],
                    *_training(result),
                    f"{figures['codebook_use']:.1%}",
                ]
                for name in ("psnr", "ssim", "l1", "lpips_vgg"):
                    ours = FIGURES[name].format(figures[name]) if name in figures else "-"
                    cells.append(f"{ours} / {FIGURES[name].format(published[name])}")
                    if name == "psnr":
                        cells.append(f"{figures['psnr'] - published['psnr']:+.2f}")
                doublings = math.log2(PUBLISHED_EPOCHS * COUNTS[images] / result["images_seen"])
                cells += [_last_doubling(result), f"{doublings:.1f}", f"{result['test']['clean']['psnr']:.2f}"]
                levels.append(cells)
    parts = []
    if orders:
        head = ["table", "images", "epochs", "batch", "pairs", f"level, < {TIE} dB", "in the paper's order"]
        head += ["in that of their bits", "the others", "level here, not in the paper"]
        head += ["without a figure in the paper"]
        parts.append(
            "Of all pairs of rows of one table and one training for which the paper has figures, how many stand in its "
            f"order by PSNR, protocol *paper*; pairs that are closer than {TIE} dB here are not judged, and trainings "
            "with fewer than three such rows are left out. More bits per pixel mostly mean a higher PSNR: how many of "
            "the same pairs stand in the order of their bits is beside it, and agreement says no more than the "
            "difference."
        )
        parts.append(_markdown(head, orders))
        parts += _by_commitment(results)
    if levels:
        head = ["row", "images", "epochs", "batch", "use", "PSNR, ours / the paper's", "difference"]
        head += ["SSIM, ours / the paper's", "L1, ours / the paper's", "LPIPS, ours / the paper's"]
        parts.append(
            "The level of 32×4 and 256×4, protocol *paper*, of the longest training of each row. The paper's figure "
            "is that of its own rule, whatever rule ours is of. *Last doubling* is about what the PSNR of the held-out "
            "images, clean, gained from half of the images seen to all of them: as long as it is whole decibels, the "
            "training is too short to say which level a method reaches. How many more doublings of the images seen the "
            "published 500 epochs are, is beside it."
        )
        parts.append(_markdown([*head, "last doubling, held out", "doublings to go", "PSNR, clean"], levels))
        parts += [f"{NAMES[r['images']]}, {ROWS[r['row']].method}: {r['note']}." for r in results if "note" in r]
        parts += _in_proportion(results, paper)
    return ["## How close to the paper", *parts] if parts else []


def _by_commitment(results: list[dict]) -> list[str]:
    """What PQ owes to the sum of its losses, beside LooC with the commitment that it amounts to."""
    rows = ["pq-32x8x4", "pq-32x8x4-mean"]
    rows += [f"looc-{size}{variant}" for size in ("32x4", "256x4") for variant in ("", "-commitment8")]
    rows += ["looc-256x4-ema-rotation", "looc-256x4-ema-rotation-commitment8"]
    training = _one_training([result for result in results if result["row"] in rows])
    found = {(result["row"], result["images"]): result for result in training}
    sets = [images for images in NAMES if {(rows[0], images), (rows[2], images)} <= set(found)]
    if not sets:
        return []
    lines = []
    for row in rows:
        of_sets = [found.get((row, images)) for images in sets]
        if any(of_sets):
            rate = _rate(next(filter(None, of_sets)))
            figures = ["" if r is None else f"{r['test']['paper']['psnr']:.2f}" for r in of_sets]
            lines.append([ROWS[row].method, f"{rate:.3g}", *figures])
    words = (
        "**Commitment.** PQ's published loss is the *sum* of 32, one a codebook, where that of a shared codebook is "
        "their mean. Adam's steps of the codebooks do not depend on such a factor; the encoder is held to the "
        "codevectors as with a commitment weight of 8 instead of 0.25. What that alone does, in PQ and in LooC: PSNR, "
        f"protocol *paper*, after {_setting_in_words(training[0])}."
    )
    return [words, _markdown(["", "bits per pixel", *(NAMES[images] for images in sets)], lines)]


def _in_proportion(results: list[dict], paper: dict) -> list[str]:
    """SSIM, L1 and LPIPS of the longest training of each set, beside the paper's at the same PSNR."""
    lines, costs = [], []
    for images in NAMES:
        of_set = _of(results, images, [row for row in ROWS if row.startswith("looc-")])
        if not of_set:
            continue
        published = [row[images] for table in ("3", "4", "5") for row in paper[table].values()]
        longest = max(of_set, key=lambda result: (result["images_seen"], _psnr(result)))
        for protocol, figures in longest["test"].items():
            cells = [ROWS[longest["row"]].method, NAMES[images], _training(longest)[0], protocol]
            cells.append(FIGURES["psnr"].format(figures["psnr"]))
            for name in ("ssim", "l1", "lpips_vgg"):
                # SSIM of the protocol clean has another window.
                comparable = name in figures and (name, protocol) != ("ssim", "clean")
                theirs = _at_psnr(figures["psnr"], published, name) if comparable else None
                cells.append(" / ".join(FIGURES[name].format(x) for x in (figures[name], theirs)) if theirs else "-")
            lines.append(cells)
        costs.append(_psnr(longest) - longest["test"]["paper"]["psnr"])
    if not lines:
        return []
    words = (
        "**The other figures, at the same PSNR.** SSIM, L1 and LPIPS of the longest training of each set, beside those "
        "that the paper's own rows have at this PSNR: Tables 3 to 5, interpolated between the two rows nearest to it. "
        "Where they agree under one protocol only, that is the one of the paper's tables. The JPEGs of the protocol "
        f"*paper* take {min(costs):.1f} to {max(costs):.1f} dB off the clean PSNR of these trainings."
    )
    head = ["row", "images", "epochs", "protocol", "PSNR, ours"]
    head += [f"{HEADS[name]}, ours / the paper's" for name in ("ssim", "l1", "lpips_vgg")]
    return [words, _markdown(head, lines)]


def _at_psnr(psnr: float, published: list[dict], name: str) -> float | None:
    """A figure of the paper's rows at a PSNR, interpolated; None beyond their range."""
    points = sorted((row["psnr"], row[name]) for row in published if name in row and "psnr" in row)
    if not points or not points[0][0] <= psnr <= points[-1][0]:
        return None
    return float(np.interp(psnr, *zip(*points, strict=True)))


def _last_doubling(result: dict) -> str:
    """What the held-out PSNR gained from half of the images seen to all, interpolated along log(images)."""
    seen, errors = zip(*result["curve"], strict=True)
    half = result["images_seen"] / 2
    if half < seen[0]:
        return "-"
    psnr = [10 * math.log10(4 / error) for error in errors]
    return f"{psnr[-1] - np.interp(math.log(half), np.log(seen), psnr):+.1f} dB"


def _order(table: str, images: str, results: list[dict], paper: dict) -> list[list[str]]:
    """A line for each training of which a table has at least three rows."""
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
        told = [((a, ours), (b, theirs)) for (a, ours), (b, theirs) in pairs if abs(ours[0] - theirs[0]) >= TIE]
        differ = [
            f"{a.removeprefix('looc-')} and {b.removeprefix('looc-')}"
            for (a, (our_a, their_a)), (b, (our_b, their_b)) in told
            if (our_a - our_b) * (their_a - their_b) <= 0
        ]
        level = [
            f"{a.removeprefix('looc-')} and {b.removeprefix('looc-')} (the paper: {abs(theirs[1] - ours[1]):.2f} dB)"
            for (a, ours), (b, theirs) in pairs
            if abs(ours[0] - theirs[0]) < TIE <= abs(ours[1] - theirs[1])
        ]
        cells = [table, NAMES[images], *_training(training[0]), str(len(pairs)), str(len(pairs) - len(told))]
        unknown = [row["row"] for row in training if row["row"] not in pairs_of_psnr]
        agreement = f"{len(told) - len(differ)} of {len(told)}"
        rates = {result["row"]: _rate(result) for result in training}
        by_bits = sum((ours[0] - theirs[0]) * (rates[a] - rates[b]) > 0 for (a, ours), (b, theirs) in told)
        lines.append(
            [*cells, agreement, f"{by_bits} of {len(told)}", "; ".join(differ), "; ".join(level), ", ".join(unknown)]
        )
    return lines


def _of(results: list[dict], images: str, rows) -> list[dict]:
    """Results of some rows on one set, longest training first, in the order of the rows."""
    found = [result for result in results if result["images"] == images and result["row"] in rows]
    order = list(rows)
    return sorted(found, key=lambda r: (order.index(r["row"]), -r["budget"], *_setting(r)[1:]))


def _setting(result: dict) -> tuple:
    """What results of one training share: budget, batch size, whether it was annealed, and seed."""
    return tuple(result[key] for key in ("budget", "batch_size", "annealed", "seed"))


def _setting_in_words(result: dict) -> str:
    budget, batch, annealed, seed = _setting(result)
    return f"{budget:,} images in batches of {batch}{', annealed' if annealed else ''}, seed {seed}"


def _training(result: dict) -> list[str]:
    """Cells: epochs and batch."""
    annealed = ", annealed" if result["annealed"] else ""
    return [f"{result['images_seen'] / COUNTS[result['images']]:.3g}{annealed}", str(result["batch_size"])]


def _words_of_training(result: dict) -> str:
    epochs, batch = _training(result)
    number, *annealed = epochs.split(", ")
    words = f"{number} epoch{'' if number == '1' else 's'} with batches of {batch} and seed {result['seed']}"
    return ", ".join([words, *annealed])


def _markdown(head: list[str], rows: list[list[str]], numbers: bool = True) -> str:
    lines = [head, ["---", *["---:" if numbers else "---"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


LEVELS = ("", "-rotation", "-ema", "-ema-rotation")  # variants whose level stands beside the paper's
KIND_NAMES = {"clean": "clean", "paper": "paper protocol", "published": "the paper's"}
KINDS = tuple(KIND_NAMES)


def _line(result: dict, published: dict) -> dict:
    clean = result["test"]["clean"]
    cells = {
        "first": [
            ROWS[result["row"]].method,
            f"{clean['bits_per_pixel']:.3g}",
            f"{clean['bits_per_pixel_entropy']:.3g}",
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
            size = result["row"].split("-")[1]
            trainings[size, _setting(result)][result["row"], result["images"]] = result
    parts = []
    for (size, _), found in sorted(trainings.items()):
        rows = [row for row in TABLES["recipes"] if any((row, images) in found for images in NAMES)]
        sets = [images for images in NAMES if any((row, images) in found for row in rows)]
        if len(rows) < 2:
            continue
        one = next(iter(found.values()))
        parts.append(f"### {size.replace('x', '×')}, {_setting_in_words(one)}: {_rate(one):.3g} bits per pixel")
        parts.append(_command("recipes", list(found.values()), *sets))
        cells = []
        for row in rows:
            of_sets = [found.get((row, images)) for images in sets]
            cells.append([ROWS[row].method, *("" if r is None else f"{_held_out(r):.2f}" for r in of_sets)])
        parts.append(_markdown(["", *(NAMES[images] for images in sets)], cells))
    if not parts:
        return []
    words = (
        "PSNR in dB of the held-out training images, of float images and of the mean squared error of all of them, at "
        "equal bits and equal images seen. Figures of the test images are in the tables below; more starts and rules, "
        "after shorter trainings, are [on a page of their own](quantizer_recipes.md)."
    )
    return [f"## {title}", words, *parts, *_by_rotation(trainings)]


def _by_rotation(trainings: dict) -> list[str]:
    """What the rotation trick adds, over all pairs of results that only it parts."""
    gains = []
    for found in trainings.values():
        for (row, images), result in found.items():
            other = found.get((f"{row}-rotation", images))
            if other:
                gains.append((_held_out(other) - _held_out(result), images))
    if not gains:
        return []
    ahead = sum(gain > 0 for gain, _ in gains)
    sets = [NAMES[name] for name in NAMES if any(images == name for _, images in gains)]
    return [
        f"In {ahead} of the {len(gains)} pairs above that differ in the rotation trick alone ({', '.join(sets)}), the "
        f"row with it is ahead; it gains {min(gains)[0]:+.1f} to {max(gains)[0]:+.1f} dB."
    ]


def _above_lossless(results: list[dict]) -> str:
    """How many rows pay more than lossless files of the same images, for the head."""
    above = known = 0
    for images in NAMES:
        file = RESULTS / f"codecs_{images}.json"
        lossless = json.loads(file.read_text())["lossless"]["webp"] if file.is_file() else None
        rates = {r["row"]: _rate(r) for r in results if r["images"] == images and lossless is not None}
        known += len(rates)
        above += sum(rate > lossless for rate in rates.values())
    if not above:
        return ""
    return (
        f"; {above} of the {known} rows here, counted for each set, pay\n  **more than lossless files of the same "
        "images take** ([below](#at-equal-bits)): these tables compare\n  quantizers in a network, not ways to store "
        "small images"
    )


def _held_out(result: dict) -> float:
    return 10 * math.log10(4 / result["validation_mse"])


def _by_training(results: list[dict]) -> list[list[dict]]:
    """Results apart by training, the longest first."""
    trainings = defaultdict(list)
    for result in results:
        trainings[_setting(result)].append(result)
    return [trainings[training] for training in sorted(trainings, reverse=True)]


def _one_training(results: list[dict]) -> list[dict]:
    """Of one training only: that of most rates, and of those the longest."""
    return max(_by_training(results), key=lambda rows: (len(set(map(_rate, rows))), rows[0]["budget"]), default=[])
