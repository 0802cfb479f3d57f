"""How close the rows of benchmarks/tables.py come to the paper: order, level, and figures in proportion."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from small_images import COUNTS
from small_vqvae import ANNEALED_RATE, EPOCHS, PUBLISHED_BATCH
from table_results import (
    FIGURES,
    HEADS,
    NAMES,
    TIE,
    by_training,
    folded,
    held_out_psnr,
    markdown,
    one_training,
    psnr_of,
    rate_of,
    results_of,
    setting,
    setting_in_words,
    training_cells,
    words_of_training,
)
from table_rows import PAPER_ROWS, ROWS

SIZES = ("looc-32x4", "looc-256x4")  # LooC's in the paper's Tables 1 and 8
NEAR_PAPER = 0.5  # dB
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

    @property
    def level_here(self) -> list[tuple[dict, dict]]:
        """Those that are not apart here, and are in the paper."""
        judged = self.judged
        return [pair for pair in self.pairs if pair not in judged and self.published_difference(*pair) >= TIE]

    def published_difference(self, a: dict, b: dict) -> float:
        return abs(self.published[a["row"]] - self.published[b["row"]])

    def agrees(self, a: dict, b: dict) -> bool:
        return _difference(a, b) * (self.published[a["row"]] - self.published[b["row"]]) > 0

    @staticmethod
    def bits_differ(a: dict, b: dict) -> bool:
        return rate_of(a) != rate_of(b)

    @staticmethod
    def by_bits(a: dict, b: dict) -> bool:
        """Whether more bits go with the higher PSNR; says nothing of a pair that does not differ in them."""
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
    lines, below = [], []
    for images in NAMES:
        for size in SIZES:
            found = _of_size(results, images, size)
            if not found:
                continue
            best = max(found, key=held_out_psnr)
            published = paper["5"][size.removeprefix("looc-")][images]["psnr"]
            psnr = best["test"]["paper"]["psnr"]
            below.append(published - psnr)
            method = f"{ROWS[best['row']].method}: `{best['row']}`"
            cells = [method, NAMES[images], f"{rate_of(best):.3g}", *training_cells(best)]
            lines.append([*cells, f"{psnr:.2f}", f"{published:.2f}", f"{psnr - published:+.2f}"])
    if not lines:
        return []
    words = (
        f"**Beside the paper**: {_range_below(below)} The best that was reached at LooC's sizes in its Tables 1 and 8, "
        "chosen by held-out training images: PSNR in dB of the test images, measured as the authors' code does, of "
        f"JPEGs ([protocol *paper*](evaluation.md#protocols)). The paper's is after {EPOCHS} epochs in batches of "
        f"{PUBLISHED_BATCH}; ours are of several trainings, so that these rows do not compare with each other. "
        "*Annealed* is ours, see "
        "[how it was measured](#how-it-was-measured), and so is the default rule."
        f"{_of_published_rule(results, paper)}{_verdict(results)}"
    )
    head = ["row", "images", "bits per pixel", "epochs", "batch", "PSNR, ours", "PSNR, the paper's", "difference"]
    parts = ["## In short", words, markdown(head, lines)]
    return [*parts, *_orders_in_short(orders(results, paper))]


def _orders_in_short(found: list[Order]) -> list[str]:
    """How many pairs stand in the paper's order, each counted once, and whether their bits say as much."""
    pairs = {order.key(*pair): (order, pair) for order in found for pair in order.pairs}
    judged = {order.key(*pair): (order, pair) for order in found for pair in order.judged}
    level_here = {order.key(*pair) for order in found for pair in order.level_here}
    if not judged:
        return []
    differ = [(order, pair) for order, pair in judged.values() if order.bits_differ(*pair)]
    equal = [(order, pair) for order, pair in judged.values() if not order.bits_differ(*pair)]
    agree, by_bits = (sum(getattr(o, name)(*pair) for o, pair in differ) for name in ("agrees", "by_bits"))
    words = (
        f"**Order**: Of {len(pairs)} pairs of rows of the paper's Tables 1, 3, 4 and 5 that were trained alike, each "
        f"counted once, {len(pairs) - len(judged)} are level here, which is to say closer than {TIE} dB "
        f"({len(level_here)} of these are further apart in the paper). Of the {len(differ)} others that differ in "
        f"their bits {agree} stand "
        f"in the paper's order, and {by_bits} in that of their bits, more being better."
    )
    if equal:
        words += f" Of the {len(equal)} of equal bits {sum(o.agrees(*pair) for o, pair in equal)} stand in its order."
    return [
        f"{words}{_not_in_order(judged.values())} [Table by table](#how-close-to-the-paper). What each method pays is "
        "hidden in a table by K x d: [at equal bits](#at-equal-bits)."
    ]


def _range_below(below: list[float]) -> str:
    within = sum(difference <= NEAR_PAPER for difference in below)
    return (
        f"{within} of {len(below)} figures are within {NEAR_PAPER} dB of it or above, the others up to "
        f"{max(below):.1f} dB below."
    )


def _of_published_rule(results: list[dict], paper: dict) -> str:
    """How far below the paper its own rule is, trained as published but not as long, and how much of it is training."""
    found, below, gains = [], [], []
    for images in NAMES:
        for size in SIZES:
            of_rule = results_of(results, images, [size])
            longest = next((r for r in of_rule if not r["annealed"] and not r["bf16"]), None)
            if longest:
                found.append(longest)
                published = paper["5"][size.removeprefix("looc-")][images]["psnr"]
                below.append(published - longest["test"]["paper"]["psnr"])
            gains += [held_out_psnr(annealed) - held_out_psnr(constant) for constant, annealed in _annealed(of_rule)]
    if not found:
        return ""
    epochs = [r["images_seen"] / COUNTS[r["images"]] for r in found]
    batches = ", ".join(sorted({str(r["batch_size"]) for r in found}, key=int))
    words = (
        f" The paper's own rule, not annealed, of {min(epochs):.3g} to {max(epochs):.3g} epochs in batches of "
        f"{batches}, is {min(below):.1f} to {max(below):.1f} dB below the paper"
    )
    if not gains:
        return f"{words}; it was not annealed yet, so that this does not compare the rules."
    gained = f"{gains[0]:.1f}" if len(gains) == 1 else f"{min(gains):.1f} to {max(gains):.1f}"
    return f"{words}. This does not compare the rules: annealed, it gains {gained} dB ([both](#rule-and-training))."


def _annealed(results: list[dict]) -> list[tuple[dict, dict]]:
    """Pairs of results that annealing parts, with the precision of the networks or without: first the constant one."""

    def alike(result: dict) -> tuple:
        return tuple(result[key] for key in ("images", "row", "budget", "batch_size", "seed"))

    published = {alike(r): r for r in results if not r["annealed"] and not r["bf16"]}
    return [(published[alike(r)], r) for r in results if r["annealed"] and alike(r) in published]


def _verdict(results: list[dict]) -> str:
    longest = max((r["images_seen"] / COUNTS[r["images"]] for r in results), default=0)
    if longest >= EPOCHS:
        return ""
    return (
        f" Nothing was trained for more than {longest:.3g} epochs: the paper's levels are neither confirmed nor "
        "refuted by more than these rows say."
    )


def _not_in_order(judged: Iterable[tuple[Order, tuple[dict, dict]]]) -> str:
    """The pairs that stand the other way round, by name, with the sets on which they do."""
    sets = defaultdict(list)
    for order, pair in judged:
        if not order.agrees(*pair):
            high, low = sorted(pair, key=lambda r: r["test"]["paper"]["psnr"], reverse=True)
            sets[f"{_short(high)} above {_short(low)}"].append(NAMES[order.images])
    listed = "; ".join(f"{names} ({', '.join(dict.fromkeys(of))})" for names, of in sets.items())
    return f" The other way round here: {listed}." if listed else ""


def closeness(results: list[dict], paper: dict) -> list[str]:
    """How far the paper's orders and levels are reached: words and a table each; nothing without results."""
    parts = []
    lines = [_order_line(order) for order in orders(results, paper)]
    if lines:
        head = ["table", "images", "epochs", "batch", "pairs", f"level, < {TIE} dB", "level here, not in the paper"]
        head += ["bits differ: in the paper's order", "bits differ: in that of their bits"]
        head += ["bits equal: in the paper's order", "the other way round", "without a figure in the paper"]
        parts.append(
            "Of all pairs of rows of one table and one training for which the paper has figures, how many stand in its "
            f"order by PSNR, protocol *paper*; pairs that are closer than {TIE} dB here are not judged, and trainings "
            "with fewer than three such rows are left out. More bits per pixel mostly mean a higher PSNR: how many of "
            "the same pairs stand in the order of their bits is beside it, and agreement says no more than the "
            "difference. Of pairs of equal bits these say nothing."
        )
        parts += [markdown(head, lines), *_level_pairs(results, paper)]
    parts += _by_commitment(results)
    parts += _by_annealing(results)
    parts += _by_length(results, paper)
    parts += _levels(results, paper)
    parts += _in_proportion(results, paper)
    return ["## How close to the paper", *parts] if parts else []


def _order_line(order: Order) -> list[str]:
    differ = [pair for pair in order.judged if order.bits_differ(*pair)]
    equal = [pair for pair in order.judged if not order.bits_differ(*pair)]
    cells = [order.table, NAMES[order.images], *training_cells(order.rows[0])]
    cells += [str(len(order.pairs)), str(len(order.pairs) - len(order.judged)), str(len(order.level_here))]
    for pairs, stands in ((differ, order.agrees), (differ, order.by_bits), (equal, order.agrees)):
        cells.append(f"{sum(stands(*pair) for pair in pairs)} of {len(pairs)}" if pairs else "")
    cells.append("; ".join(_names(*pair) for pair in order.judged if not order.agrees(*pair)))
    return [*cells, ", ".join(ROWS[row].method for row in order.unknown)]


def _level_pairs(results: list[dict], paper: dict) -> list[str]:
    """What the column of a number alone has, folded away: most are of tables of small steps."""
    lines = [
        f"- Table {order.table}, {NAMES[order.images]}, {words_of_training(order.rows[0])}: "
        + "; ".join(f"{_names(*pair)} {order.published_difference(*pair):.2f}" for pair in order.level_here)
        for order in orders(results, paper)
        if order.level_here
    ]
    if not lines:
        return []
    summary = "The pairs that are level here and not in the paper, with the paper's difference in dB"
    return [folded(summary, "\n".join(lines))]


def _names(a: dict, b: dict) -> str:
    return " and ".join(_short(result) for result in (a, b))


def _short(result: dict) -> str:
    """The method without what goes without saying where others stand beside it."""
    method = ROWS[result["row"]].method.replace(" (n_q = 64)", "").replace(", two levels", "")
    return method.removesuffix(", s=1, published rule")


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
                images_to_see = EPOCHS * COUNTS[images]
                steps = images_to_see / PUBLISHED_BATCH / (result["images_seen"] / result["batch_size"])
                to_go = f"{math.log2(images_to_see / result['images_seen']):.1f}, {math.log2(steps):.1f}"
                cells += [_last_doubling(result), to_go, f"{psnr_of(result):.2f}"]
                lines.append(cells)
    if not lines:
        return []
    words = (
        "32×4 and 256×4, protocol *paper*, of each row the longest training as published and the longest annealed one. "
        "The paper's figure is that of its own rule and its 500 epochs, whatever ours is of. *Minutes* are of one or "
        "two threads of a CPU that other work shared. *Last doubling* is about what the PSNR of the held-out images, "
        "clean, gained from half of the images seen to all of them: as long as it is whole decibels, the training is "
        "too short to say which level a method reaches; annealed trainings have none, since half of one is not "
        "annealed. *To go* is how many more doublings the published training has, of images seen and of steps."
    )
    head = ["row", "images", "epochs", "batch", "minutes", "chosen at (images)", "use", "PSNR, ours / the paper's"]
    head += ["difference", *(f"{HEADS[name]}, ours / the paper's" for name in LEVEL_FIGURES[1:])]
    return ["### Level", words, markdown([*head, "last doubling", "to go", "PSNR, clean"], lines)]


def _by_annealing(results: list[dict]) -> list[str]:
    """What annealing adds, over all pairs of results that it parts."""
    order, lines = list(ROWS), []
    pairs = _annealed(results)
    for pair in sorted(
        pairs, key=lambda p: (list(NAMES).index(p[1]["images"]), p[1]["budget"], order.index(p[1]["row"]))
    ):
        annealed, both = pair[1], [held_out_psnr(result) for result in pair]
        cells = [ROWS[annealed["row"]].method, NAMES[annealed["images"]], f"{annealed['budget']:,}"]
        cells.append("bfloat16" if annealed["bf16"] else "float32")
        lines.append([*cells, *(f"{psnr:.2f}" for psnr in both), f"{both[1] - both[0]:+.2f}"])
    if not lines:
        return []
    words = (
        "PSNR of the held-out images, clean, after as many images in as large batches, trained as published (in "
        "float32) and annealed: a higher learning rate, its fall and the precision of the networks together. What it "
        "gains is of the training, not of the quantizer; what rows of as many images differ in is of their rules."
    )
    head = ["row", "images", "images seen", "networks, annealed", "constant", "annealed", "difference"]
    return ["### Rule and training", words, markdown(head, lines)]


def _by_length(results: list[dict], paper: dict) -> list[str]:
    """How far annealed trainings of several lengths are from the paper, of rows that have more than one."""
    lengths = defaultdict(list)
    for images in NAMES:
        for size in SIZES:
            published = paper["5"][size.removeprefix("looc-")][images]["psnr"]
            for result in _of_size(results, images, size):
                if result["annealed"]:
                    lengths[images, result["row"], result["batch_size"], result["seed"], published].append(result)
    lines, setbacks = [], []
    for (images, row, batch, _, published), found in lengths.items():
        shorter = None
        for result in sorted(found, key=lambda r: r["images_seen"]) if len(found) > 1 else []:
            psnr = result["test"]["paper"]["psnr"]
            doublings = math.log2(result["images_seen"] / shorter["images_seen"]) if shorter else 0
            gain = f"{(psnr - shorter['test']['paper']['psnr']) / doublings:+.2f}" if doublings else ""
            cells = [ROWS[row].method, NAMES[images], training_cells(result)[0], str(batch)]
            lines.append([*cells, f"{psnr:.2f}", f"{published:.2f}", f"{psnr - published:+.2f}", gain])
            if shorter and psnr < shorter["test"]["paper"]["psnr"]:
                setbacks.append(_setback(result))
            shorter = result
    if not lines:
        return []
    words = (
        "Annealed trainings that differ in their length (and in the precision of the networks, where the "
        "column says so): PSNR of the test images, protocol *paper*, and what a doubling of the images gained since "
        f"the one above. The paper's figures are after {EPOCHS} epochs."
    )
    head = ["row", "images", "epochs", "batch", "PSNR, ours", "PSNR, the paper's", "difference", "dB a doubling"]
    return ["### Length", words, markdown(head, lines), *setbacks]


def _setback(result: dict) -> str:
    """Where a training that ended lower than a shorter one lost most."""
    steps = [(10 * math.log10(b / a), seen, a) for (_, a), (seen, b) in pairwise(result["curve"])]
    lost, seen, error_before = max(steps)
    again = next((later for later, error in result["curve"] if later > seen and error <= error_before), None)
    regained = f"were as good again after {again:,}" if again else "never were as good again"
    which = f"{ROWS[result['row']].method}, {NAMES[result['images']]}, {words_of_training(result)}"
    return (
        f"{which}: its held-out images fell by {lost:.1f} dB before {seen:,} images, and {regained}. The reason "
        f"may be learning rates of up to {ANNEALED_RATE:g}, of which a longer training has more; no other was tried."
    )


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
        "PQ's published loss is the *sum* of 32, one a codebook, where that of a shared codebook is "
        "their mean. Adam's steps of the codebooks do not depend on such a factor; the encoder is held to the "
        "codevectors as with a commitment weight of 8 instead of 0.25. What that alone does, in PQ and in LooC: PSNR, "
        f"protocol *paper*, after {setting_in_words(training[0])}."
    )
    return ["### Commitment", words, markdown(["", "bits per pixel", *(NAMES[images] for images in sets)], lines)]


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
        "SSIM, L1 and LPIPS of the longest training of each set, beside those "
        "that the paper's own rows have at this PSNR: Tables 3 to 5, interpolated between the two rows nearest to it. "
        "A protocol under which they part is not that of the paper's tables; L1 may agree under both. The JPEGs of the "
        f"protocol *paper* take {min(costs):.1f} to {max(costs):.1f} dB off the clean PSNR of these trainings."
    )
    head = ["row", "images", "epochs", "protocol", "PSNR, ours"]
    head += [f"{HEADS[name]}, ours / the paper's" for name in ("ssim", "l1", "lpips_vgg")]
    return ["### The other figures, at the same PSNR", words, markdown(head, lines)]


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
