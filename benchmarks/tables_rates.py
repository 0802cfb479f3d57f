"""The rows of benchmarks/tables.py at equal bits: a plot for each set, and who is ahead at which rate."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from table_results import (
    NAMES,
    TIE,
    by_training,
    command_of,
    folded,
    held_out_psnr,
    in_words,
    load_codecs,
    markdown,
    one_training,
    psnr_of,
    rate_of,
    results_of,
    words_of_training,
)
from table_rows import ROWS, TABLES
from tables_closeness import last_doubling
from tables_plot import draw_plot, family_of

from looc_ldm.files import replace_bytes

NEAR = 1.06  # rates up to this ratio are compared as equal


def equal_bits(results: list[dict], paper: dict, docs: Path) -> list[str]:
    """For each set a plot of its rows, written into `docs`, and who is ahead at the rates that several pay."""
    parts = []
    for images in NAMES:
        rows = one_training(results_of(results, images, TABLES["rates"]))
        if len({result["test"]["clean"]["bits_per_pixel"] for result in rows}) < 2:
            continue
        codecs = load_codecs(images)
        longer = _longer(results_of(results, images, TABLES["rates"]), rows[0])
        title = f"{NAMES[images]}, test set, {words_of_training(rows[0])}"
        replace_bytes(docs / f"rate_distortion_{images}.png", draw_plot(images, rows, codecs, paper, title, longer))
        parts += [
            f"### {NAMES[images]}",
            f"![Quality over bits per pixel, {NAMES[images]}](rate_distortion_{images}.png)",
            f"Clean figures of the {len(rows)} rows that were trained for {words_of_training(rows[0])}. Hollow: the "
            "paper's PSNR, after 500 epochs, of JPEGs (ours by that protocol is in the tables)."
            f"{_stage(rows)} {_of_codecs(codecs)}",
            folded("The command of these rows", command_of("rates", rows, images)),
        ]
        parts += _of_longer(longer, images)
        parts += _who_is_ahead(rows)
    words = (
        "Rows of one training, so that a rank is as much of how fast a method learns as of what it reaches: they are "
        "at different stages, as what the last doubling of the images gained says."
    )
    return ["## At equal bits", words, *parts] if parts else []


def _stage(rows: list[dict]) -> str:
    """What the last doubling of the images gained, over all rows."""
    gains = sorted((gain, r["row"]) for r in rows if (gain := last_doubling(r)) is not None)
    if not gains:
        return ""
    (least, first), (most, last) = gains[0], gains[-1]
    return (
        f" From half of the images seen to all of them, held-out images gained between {least:+.1f} (`{first}`) and "
        f"{most:+.1f} dB (`{last}`)."
    )


def _longer(results: list[dict], short: dict) -> list[dict]:
    """Of each row the best of what was trained more than twice as long as `short`, or annealed, by held-out images."""
    best = {}
    for result in sorted(results, key=held_out_psnr):
        if result["images_seen"] > 2 * short["images_seen"] or result["annealed"]:
            best[result["row"]] = result
    return sorted(best.values(), key=rate_of)


def _of_longer(longer: list[dict], images: str) -> list[str]:
    """What the plot's pentagons are."""
    if not longer:
        return []
    lines = [
        [
            ROWS[r["row"]].method,
            f"{rate_of(r):.3g}",
            f"{psnr_of(r):.2f}",
            words_of_training(r),
            command_of("rates", [r], images),
        ]
        for r in longer
    ]
    words = "Pentagons: of each row the best, by held-out images, that is more than twice as long, or annealed."
    return [words, markdown(["", "bits per pixel", "PSNR, clean", "training", "command"], lines, numbers=False)]


def _who_is_ahead(rows: list[dict]) -> list[str]:
    """Of rows of one training: what is as good as LooC's published rule for fewer bits, and a table of equal rates."""
    parts = []
    published = [r for r in rows if family_of(r["row"])[:2] == ("looc", "")]
    best = max(published, key=psnr_of, default=None)
    cheaper = [r for r in rows if best and psnr_of(r) > psnr_of(best) - TIE and rate_of(r) < rate_of(best)]
    if cheaper:
        listed = "; ".join(in_words(r) for r in sorted(cheaper, key=rate_of))
        parts.append(
            f"After this training the highest PSNR of LooC's published rule is that of {in_words(best)}. As high "
            f"within {TIE} dB, or higher, for fewer bits: {listed}."
        )
    highest = [r for r in rows if not any(rate_of(o) <= rate_of(r) and psnr_of(o) > psnr_of(r) for o in rows)]
    if len(rows) > 1:
        listed = "; ".join(in_words(r) for r in sorted(highest, key=rate_of))
        parts.append(f"No row has a higher PSNR for as many bits or fewer than these: {listed}.")
    lines = []
    for found in _groups(rows):
        if len(found) > 1:
            rate = _rates(found)
            found = sorted(found, key=psnr_of, reverse=True)
            words = f"{ROWS[found[0]['row']].method} {psnr_of(found[0]):.2f}"
            for above, result in pairwise(found):
                joint = " ≈ " if psnr_of(above) - psnr_of(result) < TIE else "; "
                words += f"{joint}{ROWS[result['row']].method} {psnr_of(result):.2f}"
            lines.append([rate, words])
    if lines:
        head = f"clean PSNR in dB, the highest first; ≈ between those that are closer than {TIE} dB"
        parts.append(markdown(["bits per pixel", head], lines, numbers=False))
    return parts


def _groups(rows: list[dict]) -> list[list[dict]]:
    """Rows of about one rate together, by their rates."""
    groups = []
    for result in sorted(rows, key=rate_of):
        if not groups or rate_of(result) > NEAR * rate_of(groups[-1][0]):
            groups.append([])
        groups[-1].append(result)
    return groups


def _rates(found: list[dict]) -> str:
    rates = list(dict.fromkeys(f"{rate_of(r):.3g}" for r in found))
    return " to ".join(rates[:: len(rates) - 1 or 1])


def ahead_in_short(results: list[dict]) -> list[str]:
    """For who reads nothing else: LooC beside the best of the others, wherever both were trained at one rate."""
    lines, places, of_default, compared = [], [], [], set()
    trainings = [rows for images in NAMES for rows in by_training(results_of(results, images, TABLES["rates"]))]
    for rows in trainings:
        for found in _groups(rows):
            ours, others = ([r for r in found if r["row"].startswith("looc-") == is_ours] for is_ours in (True, False))
            if ours and others:
                defaults = [r for r in ours if r["row"].endswith("-ema-rotation")]
                compared.add(rows[0]["images"])
                our_best, default, best = (
                    max(choice, key=held_out_psnr, default=None) for choice in (ours, defaults, others)
                )
                places.append(psnr_of(our_best) - psnr_of(best))
                of_default += [psnr_of(default) - psnr_of(best)] if default else []
                lines.append(
                    [
                        NAMES[rows[0]["images"]],
                        words_of_training(rows[0]),
                        _rates(found),
                        f"{ROWS[our_best['row']].method} {psnr_of(our_best):.2f}",
                        f"{psnr_of(default):.2f}" if default else "-",
                        f"{ROWS[best['row']].method} {psnr_of(best):.2f}",
                        str(len(others)),
                    ]
                )
    if not lines:
        return []
    tried = _counted(len(lines), "rate and training", "rates and trainings")
    words = (
        "**At equal bits**: clean PSNR in dB of the test images, of each method its best row by held-out images. At "
        f"the {tried} that were tried, LooC is {_places(places)}"
    )
    if of_default:
        words += f"; our default, where it was among them, is {_places(of_default)}"
    words += (
        ". After so short a training this says as much of how fast a method learns as of what it reaches ([all of "
        "it](#at-equal-bits))."
    )
    missing = [name for images, name in NAMES.items() if images not in compared]
    if missing:
        words += f" On {' and '.join(missing)} no such rate was tried yet."
    head = ["images", "training", "bits per pixel", "LooC, its best row", "LooC, our default", "best of the others"]
    return [words, markdown([*head, "how many others"], lines)]


def _places(differences: list[float]) -> str:
    """How often one is ahead of another, level with it and behind it."""
    ahead, behind = (sum(sign * difference >= TIE for difference in differences) for sign in (1, -1))
    level = len(differences) - ahead - behind
    return f"ahead at {ahead}, level (closer than {TIE} dB) at {level}, behind at {behind}"


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


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


def above_lossless(results: list[dict]) -> str:
    """How many rows pay more than lossless files of the same images, for the head."""
    above = known = 0
    for images in NAMES:
        codecs = load_codecs(images)
        rates = {r["row"]: rate_of(r) for r in results if r["images"] == images and codecs}
        known += len(rates)
        above += sum(rate > codecs["lossless"]["webp"] for rate in rates.values())
    if not above:
        return ""
    return (
        f"; {above} of the {known} rows here, counted for each set, pay\n  **more than lossless files of the same "
        "images take** ([below](#at-equal-bits)): these tables compare\n  quantizers in a network, not ways to store "
        "small images"
    )
