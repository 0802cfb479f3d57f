"""How close the rows of benchmarks/tables.py come to the paper: order, level, and figures in proportion."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from small_images import COUNTS
from table_results import (
    FIGURES,
    HEADS,
    NAMES,
    TIE,
    by_training,
    held_out_psnr,
    markdown,
    one_training,
    psnr_of,
    rate_of,
    results_of,
    setting,
    setting_in_words,
    training_cells,
)
from table_rows import PAPER_ROWS, ROWS

PUBLISHED_EPOCHS, PUBLISHED_BATCH = 500, 128
SIZES = ("looc-32x4", "looc-256x4")  # LooC's in the paper's Tables 1 and 8
ORDERED = ("1", "3", "4", "5")  # tables of which the paper has figures of these sets
LEVEL_FIGURES = ("psnr", "ssim", "l1", "lpips_vgg")


@dataclass(frozen=True)
class Order:
    """How the rows that a table and one training have stand to each other, by PSNR, protocol paper.

    Attributes:
        table: Its number.
        images: Name of the set.
        rows: Results of rows that the paper has a PSNR of.
        unknown: Names of the other rows.
        published: The paper's PSNR by row.
    """

    table: str
    images: str
    rows: list[dict]
    unknown: list[str]
    published: dict[str, float]

    @property
    def pairs(self) -> list[tuple[dict, dict]]:
        return list(combinations(self.rows, 2))

    @property
    def judged(self) -> list[tuple[dict, dict]]:
        """Those that are apart here."""
        return [pair for pair in self.pairs if abs(_difference(*pair)) >= TIE]

    def agrees(self, a: dict, b: dict) -> bool:
        return _difference(a, b) * (self.published[a["row"]] - self.published[b["row"]]) > 0

    def by_bits(self, a: dict, b: dict) -> bool:
        return _difference(a, b) * (rate_of(a) - rate_of(b)) > 0

    def key(self, a: dict, b: dict) -> tuple:
        """A pair stands in several tables, and is to be counted once."""
        return (self.images, setting(a), *sorted((a["row"], b["row"])))


def _difference(a: dict, b: dict) -> float:
    return a["test"]["paper"]["psnr"] - b["test"]["paper"]["psnr"]


def orders(results: list[dict], paper: dict) -> list[Order]:
    """One for each training of which a table has at least three rows with a figure in the paper."""
    found = []
    for table in ORDERED:
        names = PAPER_ROWS[table]
        for images in NAMES:
            for training in by_training(results_of(results, images, names)):
                stated = {r["row"]: paper[table][names[r["row"]]].get(images, {}).get("psnr") for r in training}
                published = {row: psnr for row, psnr in stated.items() if psnr is not None}
                rows = [result for result in training if result["row"] in published]
                if len(rows) >= 3:
                    found.append(Order(table, images, rows, [row for row in stated if row not in published], published))
    return found


def _of_size(results: list[dict], images: str, size: str) -> list[dict]:
    """All results of LooC at one K x d without interpolation."""
    interpolated = tuple(f"{size}-s{factor}" for factor in (2, 3, 4))
    rows = [row for row in ROWS if row == size or row.startswith(f"{size}-")]
    return results_of(results, images, [row for row in rows if not row.startswith(interpolated)])


def in_short(results: list[dict], paper: dict) -> list[str]:
    """For who reads nothing else: the best that was reached, beside the paper, and how many pairs are in its order."""
    lines = []
    for images in NAMES:
        for size in SIZES:
            found = _of_size(results, images, size)
            if not found:
                continue
            best = max(found, key=held_out_psnr)
            published = paper["5"][size.removeprefix("looc-")][images]["psnr"]
            psnr = best["test"]["paper"]["psnr"]
            cells = [ROWS[best["row"]].method, NAMES[images], f"{rate_of(best):.3g}", *training_cells(best)]
            lines.append([*cells, f"{psnr:.2f}", f"{published:.2f}", f"{psnr - published:+.2f}"])
    if not lines:
        return []
    words = (
        "The best that was reached at LooC's sizes in the paper's Tables 1 and 8, chosen by held-out training images: "
        f"PSNR in dB of the test images, protocol *paper*. The paper's is after {PUBLISHED_EPOCHS} epochs in batches "
        f"of {PUBLISHED_BATCH}; ours are of several trainings, so that these rows do not compare with each other. "
        "*Annealed* is ours, see [how it was measured](#how-it-was-measured), and so is the default rule."
        f"{_of_published_rule(results, paper)}"
    )
    head = ["row", "images", "bits per pixel", "epochs", "batch", "PSNR, ours", "PSNR, the paper's", "difference"]
    parts = ["## In short", words, markdown(head, lines)]
    found = orders(results, paper)
    pairs = {order.key(*pair) for order in found for pair in order.pairs}
    judged = {order.key(*pair): (order, pair) for order in found for pair in order.judged}
    if judged:
        agree, by_bits = (sum(f(o, *p) for o, p in judged.values()) for f in (Order.agrees, Order.by_bits))
        parts.append(
            f"Of {len(pairs)} pairs of rows of the paper's Tables 1, 3, 4 and 5 that were trained alike, each counted "
            f"once, {len(pairs) - len(judged)} are level here; of the others {agree} of {len(judged)} stand in the "
            f"paper's order. The number of bits alone, more being better, gets {by_bits} of them "
            f"([pair by pair](#how-close-to-the-paper)).{_not_in_order(judged.values())} What each method pays is "
            "hidden in a table by K x d: [at equal bits](#at-equal-bits)."
        )
    return parts


def _of_published_rule(results: list[dict], paper: dict) -> str:
    """How far below the paper its own rule is, trained as published but not as long."""
    found, below = [], []
    for images in NAMES:
        for size in SIZES:
            longest = next((r for r in results_of(results, images, [size]) if not r["annealed"]), None)
            if longest:
                found.append(longest)
                published = paper["5"][size.removeprefix("looc-")][images]["psnr"]
                below.append(published - longest["test"]["paper"]["psnr"])
    if not found:
        return ""
    epochs = [r["images_seen"] / COUNTS[r["images"]] for r in found]
    return (
        f" The paper's own rule, as published but of {min(epochs):.3g} to {max(epochs):.3g} epochs in smaller batches, "
        f"is {min(below):.1f} to {max(below):.1f} dB below the paper ([all of these](#how-close-to-the-paper))."
    )


def _not_in_order(judged: Iterable[tuple[Order, tuple[dict, dict]]]) -> str:
    """The pairs that stand the other way round, by name, with the sets on which they do."""
    sets = defaultdict(list)
    for order, pair in judged:
        if not order.agrees(*pair):
            high, low = sorted(pair, key=lambda r: r["test"]["paper"]["psnr"], reverse=True)
            sets[_names(high, low).replace(" and ", " above ")].append(NAMES[order.images])
    listed = "; ".join(f"{names} ({', '.join(dict.fromkeys(of))})" for names, of in sets.items())
    return f" The other way round here: {listed}." if listed else ""


def closeness(results: list[dict], paper: dict) -> list[str]:
    """How far the paper's orders and levels are reached: words and a table each; nothing without results."""
    parts = []
    lines = [_order_line(order) for order in orders(results, paper)]
    if lines:
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
        parts.append(markdown(head, lines))
    parts += _by_commitment(results)
    parts += _by_annealing(results)
    parts += _levels(results, paper)
    parts += _in_proportion(results, paper)
    return ["## How close to the paper", *parts] if parts else []


def _order_line(order: Order) -> list[str]:
    judged = order.judged
    agree, by_bits = (sum(f(*pair) for pair in judged) for f in (order.agrees, order.by_bits))
    published = order.published
    apart = [
        f"{_names(a, b)} (the paper: {abs(published[a['row']] - published[b['row']]):.2f} dB)"
        for a, b in order.pairs
        if (a, b) not in judged and abs(published[a["row"]] - published[b["row"]]) >= TIE
    ]
    cells = [order.table, NAMES[order.images], *training_cells(order.rows[0])]
    cells += [str(len(order.pairs)), str(len(order.pairs) - len(judged))]
    cells += [f"{agree} of {len(judged)}", f"{by_bits} of {len(judged)}"]
    cells.append("; ".join(_names(*pair) for pair in judged if not order.agrees(*pair)))
    return [*cells, "; ".join(apart), ", ".join(order.unknown)]


def _names(a: dict, b: dict) -> str:
    return " and ".join(result["row"].removeprefix("looc-") for result in (a, b))


def _levels(results: list[dict], paper: dict) -> list[str]:
    """Of the longest training of each row of LooC's sizes."""
    lines = []
    for images in NAMES:
        for size in SIZES:
            published = paper["5"][size.removeprefix("looc-")][images]
            of_row = {}
            for result in _of_size(results, images, size):
                of_row.setdefault((result["row"], result["annealed"], result["bf16"]), result)
            for result in of_row.values():
                figures = result["test"]["paper"]
                cells = [ROWS[result["row"]].method, NAMES[images], *training_cells(result)]
                cells += [f"{result['seconds'] / 60:.0f}", f"{result['chosen_at_images']:,}"]
                cells.append(f"{figures['codebook_use']:.1%}")
                for name in LEVEL_FIGURES:
                    ours = FIGURES[name].format(figures[name]) if name in figures else "-"
                    cells.append(f"{ours} / {FIGURES[name].format(published[name])}")
                    if name == "psnr":
                        cells.append(f"{figures['psnr'] - published['psnr']:+.2f}")
                images_to_see = PUBLISHED_EPOCHS * COUNTS[images]
                steps = images_to_see / PUBLISHED_BATCH / (result["images_seen"] / result["batch_size"])
                to_go = f"{math.log2(images_to_see / result['images_seen']):.1f}, {math.log2(steps):.1f}"
                cells += [_last_doubling(result), to_go, f"{psnr_of(result):.2f}"]
                lines.append(cells)
    if not lines:
        return []
    words = (
        "**Level.** 32×4 and 256×4, protocol *paper*, the longest training of each row. The paper's figure is that of "
        "its own rule and its 500 epochs, whatever ours is of. *Minutes* are of one or two threads of a CPU that other "
        "work shared. *Last doubling* is about what the PSNR of the held-out images, clean, gained from half of the "
        "images seen to all of them: as long as it is whole decibels, the training is too short to say which level a "
        "method reaches; annealed trainings have none, since half of one is not annealed. *To go* is how many more "
        "doublings the published training has, of images seen and of steps."
    )
    head = ["row", "images", "epochs", "batch", "minutes", "chosen at (images)", "use", "PSNR, ours / the paper's"]
    head += ["difference", *(f"{HEADS[name]}, ours / the paper's" for name in LEVEL_FIGURES[1:])]
    return [words, markdown([*head, "last doubling", "to go", "PSNR, clean"], lines)]


def _by_annealing(results: list[dict]) -> list[str]:
    """What annealing adds, over all pairs of results that it parts, with the precision of the networks or without."""

    def alike(result: dict) -> tuple:
        return tuple(result[key] for key in ("images", "row", "budget", "batch_size", "seed"))

    published = {alike(r): r for r in results if not r["annealed"] and not r["bf16"]}
    lines = []
    for annealed in results:
        constant = published.get(alike(annealed))
        if annealed["annealed"] and constant:
            both = [held_out_psnr(result) for result in (constant, annealed)]
            cells = [ROWS[annealed["row"]].method, NAMES[annealed["images"]], f"{annealed['budget']:,}"]
            cells.append("bfloat16" if annealed["bf16"] else "float32")
            lines.append([*cells, *(f"{psnr:.2f}" for psnr in both), f"{both[1] - both[0]:+.2f}"])
    if not lines:
        return []
    words = (
        "**Annealing.** PSNR of the held-out images, clean, after as many images in as large batches, trained as "
        "published (in float32) and annealed: a higher learning rate, its fall and the precision of the networks "
        "together. What it gains is of the training, not of the quantizer."
    )
    return [
        words,
        markdown(["row", "images", "images seen", "networks, annealed", "constant", "annealed", "difference"], lines),
    ]


def _by_commitment(results: list[dict]) -> list[str]:
    """What PQ owes to the sum of its losses, beside LooC with the commitment that it amounts to."""
    rows = ["pq-32x8x4", "pq-32x8x4-mean"]
    rows += [f"looc-{size}{variant}" for size in ("32x4", "256x4") for variant in ("", "-commitment8")]
    rows += ["looc-256x4-ema-rotation", "looc-256x4-ema-rotation-commitment8"]
    training = one_training([result for result in results if result["row"] in rows])
    found = {(result["row"], result["images"]): result for result in training}
    sets = [images for images in NAMES if {(rows[0], images), (rows[2], images)} <= set(found)]
    if not sets:
        return []
    lines = []
    for row in rows:
        of_sets = [found.get((row, images)) for images in sets]
        if any(of_sets):
            rate = rate_of(next(filter(None, of_sets)))
            figures = ["" if r is None else f"{r['test']['paper']['psnr']:.2f}" for r in of_sets]
            lines.append([ROWS[row].method, f"{rate:.3g}", *figures])
    words = (
        "**Commitment.** PQ's published loss is the *sum* of 32, one a codebook, where that of a shared codebook is "
        "their mean. Adam's steps of the codebooks do not depend on such a factor; the encoder is held to the "
        "codevectors as with a commitment weight of 8 instead of 0.25. What that alone does, in PQ and in LooC: PSNR, "
        f"protocol *paper*, after {setting_in_words(training[0])}."
    )
    return [words, markdown(["", "bits per pixel", *(NAMES[images] for images in sets)], lines)]


def _in_proportion(results: list[dict], paper: dict) -> list[str]:
    """SSIM, L1 and LPIPS of the longest training of each set, beside the paper's at the same PSNR."""
    lines, costs = [], []
    for images in NAMES:
        of_set = results_of(results, images, [row for row in ROWS if row.startswith("looc-")])
        if not of_set:
            continue
        published = [row[images] for table in ("3", "4", "5") for row in paper[table].values()]
        longest = max(of_set, key=lambda result: (result["images_seen"], held_out_psnr(result)))
        for protocol, figures in longest["test"].items():
            cells = [ROWS[longest["row"]].method, NAMES[images], training_cells(longest)[0], protocol]
            cells.append(FIGURES["psnr"].format(figures["psnr"]))
            for name in ("ssim", "l1", "lpips_vgg"):
                # SSIM of the protocol clean has another window.
                comparable = name in figures and (name, protocol) != ("ssim", "clean")
                theirs = _at_psnr(figures["psnr"], published, name) if comparable else None
                if theirs is None:
                    cells.append("-")
                else:
                    both = " / ".join(FIGURES[name].format(x) for x in (figures[name], theirs))
                    cells.append(f"{both} ({figures[name] / theirs - 1:+.1%})")
            lines.append(cells)
        costs.append(psnr_of(longest) - longest["test"]["paper"]["psnr"])
    if not lines:
        return []
    words = (
        "**The other figures, at the same PSNR.** SSIM, L1 and LPIPS of the longest training of each set, beside those "
        "that the paper's own rows have at this PSNR: Tables 3 to 5, interpolated between the two rows nearest to it. "
        "A protocol under which they part is not that of the paper's tables; L1 may agree under both. The JPEGs of the "
        f"protocol *paper* take {min(costs):.1f} to {max(costs):.1f} dB off the clean PSNR of these trainings."
    )
    head = ["row", "images", "epochs", "protocol", "PSNR, ours"]
    head += [f"{HEADS[name]}, ours / the paper's" for name in ("ssim", "l1", "lpips_vgg")]
    return [words, markdown(head, lines)]


def _at_psnr(psnr: float, published: list[dict], name: str) -> float | None:
    """A figure of the paper's rows at a PSNR, interpolated; None beyond their range."""
    points = sorted((row["psnr"], row[name]) for row in published if name in row and "psnr" in row)
    if not points or not points[0][0] <= psnr <= points[-1][0]:
        return None
    return float(np.interp(psnr, *zip(*points, strict=True)))


def _last_doubling(result: dict) -> str:
    gain = last_doubling(result)
    return "-" if gain is None else f"{gain:+.1f} dB"


def last_doubling(result: dict) -> float | None:
    """What the held-out PSNR gained from half of the images seen to all, in dB, interpolated along log(images).

    Nothing of annealed trainings, half of which is not an annealed training.
    """
    if result["annealed"]:
        return None
    seen, errors = zip(*result["curve"], strict=True)
    half = result["images_seen"] / 2
    if half < seen[0]:
        return None
    psnr = [10 * math.log10(4 / error) for error in errors]
    return psnr[-1] - float(np.interp(math.log(half), np.log(seen), psnr))
