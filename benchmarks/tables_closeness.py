"""How close the rows of benchmarks/tables.py come to the paper: order, level, and figures in proportion."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
from small_images import COUNTS
from table_results import (
    FIGURES,
    HEADS,
    NAMES,
    TIE,
    by_training,
    markdown,
    one_training,
    psnr_of,
    rate_of,
    results_of,
    setting_in_words,
    training_cells,
)
from table_rows import PAPER_ROWS, ROWS

PUBLISHED_EPOCHS = 500
LEVELS = ("", "-rotation", "-ema", "-ema-rotation")  # variants whose level stands beside the paper's
ORDERED = ("1", "3", "4", "5")  # tables of which the paper has figures of these sets


def in_short(results: list[dict], paper: dict) -> list[str]:
    """For who reads nothing else: the best that was reached, beside the paper, and how many pairs are in its order."""
    lines = []
    for images in NAMES:
        for row in ("looc-32x4", "looc-256x4"):
            found = results_of(results, images, [f"{row}{variant}" for variant in LEVELS])
            if not found:
                continue
            best = min(found, key=lambda result: result["validation_mse"])
            published = paper["5"][row.removeprefix("looc-")][images]["psnr"]
            psnr = best["test"]["paper"]["psnr"]
            cells = [ROWS[best["row"]].method, NAMES[images], f"{rate_of(best):.3g}", training_cells(best)[0]]
            lines.append([*cells, f"{psnr:.2f}", f"{published:.2f}", f"{psnr - published:+.2f}"])
    if not lines:
        return []
    judged = [line[:2] for table in ORDERED for name in NAMES for line in _order(table, name, results, paper)]
    agree, told = (sum(numbers) for numbers in zip((0, 0), *judged, strict=True))
    words = (
        "The best that was reached at LooC's sizes in the paper's Tables 1 and 8, chosen by held-out training images: "
        f"PSNR in dB of the test images, protocol *paper*. The paper's is after {PUBLISHED_EPOCHS} epochs."
    )
    head = ["row", "images", "bits per pixel", "epochs", "PSNR, ours", "PSNR, the paper's", "difference"]
    order = (
        f"Of the pairs of rows of its Tables 1, 3, 4 and 5 that can be judged, {agree} of {told} stand in the paper's "
        "order ([how](#how-close-to-the-paper)). Its tables hide what a method pays: [at equal bits](#at-equal-bits)."
    )
    return ["## In short", words, markdown(head, lines), *([order] if told else [])]


def closeness(results: list[dict], paper: dict) -> list[str]:
    """How far the paper's orders and levels are reached: words and a table each; nothing without results."""
    orders = [cells for table in ORDERED for name in NAMES for _, _, cells in _order(table, name, results, paper)]
    levels = []
    for images in NAMES:
        for row in ("looc-32x4", "looc-256x4"):
            published = paper["5"][row.removeprefix("looc-")][images]
            of_row = {}
            for result in results_of(results, images, [f"{row}{variant}" for variant in LEVELS]):
                of_row.setdefault((result["row"], result["annealed"]), result)  # the longest training
            for result in of_row.values():
                figures = result["test"]["paper"]
                cells = [
                    ROWS[result["row"]].method,
                    NAMES[images],
                    *training_cells(result),
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
        parts.append(markdown(head, orders))
        parts += _by_commitment(results)
    if levels:
        head = ["row", "images", "epochs", "batch", "use", "PSNR, ours / the paper's", "difference"]
        head += ["SSIM, ours / the paper's", "L1, ours / the paper's", "LPIPS, ours / the paper's"]
        parts.append(
            "The level of 32×4 and 256×4, protocol *paper*, of the longest training of each row. The paper's figure "
            "is that of its own rule, whatever rule ours is of. *Last doubling* is about what the PSNR of the held-out "
            "images, clean, gained from half of the images seen to all of them: as long as it is whole decibels, the "
            "training is too short to say which level a method reaches; half of an annealed training is no annealed "
            "training, so that it has none. How many more doublings of the images seen the "
            "published 500 epochs are, is beside it."
        )
        parts.append(markdown([*head, "last doubling, held out", "doublings to go", "PSNR, clean"], levels))
        parts += [f"{NAMES[r['images']]}, {ROWS[r['row']].method}: {r['note']}." for r in results if "note" in r]
        parts += _in_proportion(results, paper)
    return ["## How close to the paper", *parts] if parts else []


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
        longest = max(of_set, key=lambda result: (result["images_seen"], psnr_of(result)))
        for protocol, figures in longest["test"].items():
            cells = [ROWS[longest["row"]].method, NAMES[images], training_cells(longest)[0], protocol]
            cells.append(FIGURES["psnr"].format(figures["psnr"]))
            for name in ("ssim", "l1", "lpips_vgg"):
                # SSIM of the protocol clean has another window.
                comparable = name in figures and (name, protocol) != ("ssim", "clean")
                theirs = _at_psnr(figures["psnr"], published, name) if comparable else None
                cells.append(" / ".join(FIGURES[name].format(x) for x in (figures[name], theirs)) if theirs else "-")
            lines.append(cells)
        costs.append(psnr_of(longest) - longest["test"]["paper"]["psnr"])
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
    return [words, markdown(head, lines)]


def _at_psnr(psnr: float, published: list[dict], name: str) -> float | None:
    """A figure of the paper's rows at a PSNR, interpolated; None beyond their range."""
    points = sorted((row["psnr"], row[name]) for row in published if name in row and "psnr" in row)
    if not points or not points[0][0] <= psnr <= points[-1][0]:
        return None
    return float(np.interp(psnr, *zip(*points, strict=True)))


def _last_doubling(result: dict) -> str:
    """What the held-out PSNR gained from half of the images seen to all, interpolated along log(images).

    Nothing of annealed trainings, half of which is not an annealed training.
    """
    if result["annealed"]:
        return "-"
    seen, errors = zip(*result["curve"], strict=True)
    half = result["images_seen"] / 2
    if half < seen[0]:
        return "-"
    psnr = [10 * math.log10(4 / error) for error in errors]
    return f"{psnr[-1] - np.interp(math.log(half), np.log(seen), psnr):+.1f} dB"


def _order(table: str, images: str, results: list[dict], paper: dict) -> list[tuple[int, int, list[str]]]:
    """For each training of which a table has at least three rows, the pairs in order, those judged, and a line."""
    lines = []
    for training in by_training(results_of(results, images, PAPER_ROWS[table])):
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
        cells = [table, NAMES[images], *training_cells(training[0]), str(len(pairs)), str(len(pairs) - len(told))]
        unknown = [row["row"] for row in training if row["row"] not in pairs_of_psnr]
        agree = len(told) - len(differ)
        rates = {result["row"]: rate_of(result) for result in training}
        by_bits = sum((ours[0] - theirs[0]) * (rates[a] - rates[b]) > 0 for (a, ours), (b, theirs) in told)
        cells += [f"{agree} of {len(told)}", f"{by_bits} of {len(told)}"]
        cells += ["; ".join(differ), "; ".join(level), ", ".join(unknown)]
        lines.append((agree, len(told), cells))
    return lines
