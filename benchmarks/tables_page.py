"""docs/tables.md and its plots, from the results that benchmarks/tables.py has left."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from small_vqvae import ANNEALED_RATE, EPOCHS, HELD_OUT, PUBLISHED_BATCH, PUBLISHED_RATE, WARM_UP
from table_results import (
    FIGURES,
    HEADS,
    NAMES,
    ROOT,
    TIE,
    by_training,
    command_of,
    folded,
    held_out_psnr,
    load_paper,
    load_results,
    markdown,
    psnr_of,
    rate_of,
    results_of,
    setting,
    setting_in_words,
    words_of_training,
)
from table_rows import PAPER_ROWS, ROWS, TABLES
from tables_closeness import closeness, in_short
from tables_rates import above_lossless, ahead_in_short, equal_bits

from looc_ldm.files import replace_text

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
LOW_USE = 0.5
CLEAN = ("psnr", "ssim")  # of the protocol clean
KIND_NAMES = {"clean": "clean", "paper": "paper protocol", "published": "the paper's"}
KINDS = tuple(KIND_NAMES)


def summary() -> str:
    """The page's short form and one of its plots, for the README."""
    results = load_results()
    _, *parts = [*in_short(results, load_paper()["tables"]), *ahead_in_short(results)]
    text = "\n\n".join(parts).replace("](#", "](docs/tables.md#").replace("](evaluation", "](docs/evaluation")
    plot = "![Quality over bits per pixel, Fashion-MNIST](docs/rate_distortion_fashion_mnist.png)"
    caption = (
        "Clean figures of rows that had the training of the title; pentagons, of each row the best that is more than "
        "twice as long, or annealed. Hollow, figures of JPEGs: circles what the paper states after 500 epochs, "
        "pentagons ours by that protocol. Written by `python benchmarks/readme.py tables`."
    )
    return f"{text}\n\n{plot}\n\n{caption}"


def write_page(docs: Path = ROOT / "docs") -> None:
    """tables.md, with a plot for each set that has results."""
    results = load_results()
    published = load_paper()
    paper = published["tables"]
    parts = ["# The paper's tables, measured", *in_short(results, paper)]
    parts += [*ahead_in_short(results), _head(results, published["source"])]
    parts += [*closeness(results, paper), *equal_bits(results, paper, docs)]
    shown = set()
    for table, title in TITLES.items():
        if table == "recipes":
            parts += _recipes(title, results)
            continue
        sections = []
        for images in NAMES:
            trainings = by_training(results_of(results, images, TABLES[table]))
            for rows in trainings:
                if table != "rates" and len(rows) == 1 < len(trainings):
                    continue  # nothing to compare in this table; it stands among all rows
                names = {(images, *setting(r), r["row"]) for r in rows}
                if not names <= shown:  # something that no earlier table has shown
                    shown |= names
                    sections += [_table(table, images, rows, paper), *_in_a_sentence(table, rows)]
        if sections:
            parts += [f"## {title}", *sections]
    parts += _seeds(results)
    replace_text(docs / "tables.md", "\n\n".join(parts) + "\n")


def _head(results: list[dict], source: str) -> str:
    devices = ", ".join(sorted({result["device"] for result in results})) or "nothing yet"
    return f"""## How it was measured

Written by `python benchmarks/readme.py tables` from what `benchmarks/tables.py` measured ({devices}).

- **Network**: the paper's small VQ-VAE (f = 4, n_q = 128 unless a row says otherwise), Adam {PUBLISHED_RATE:g}, MSE
  / variance + quantizer loss, no augmentation. MoVQ's modulated decoder, a switch of `LooCVQModel`
  (`norm_type="spatial"`), is in no row: it modulates norms, of which this network has none.
- **What differs from the others' publications**: VQ-VAE's commitment weight is on the commitment term, where the
  authors' code has it on the other. PQ's 32 losses are added, as published, unless a row says that they are averaged.
  RQ starts by k-means, learns by a moving average, restarts codevectors that go unused, and averages the losses of its
  depths. Residual FSQ is the library's: its gradient is the sum of the estimates of all depths, and grows with them,
  and all depths share one projection to three numbers, where FSQ with 8 codes has 24. SQ-VAE has no batch norm, the
  likelihood of a decoder with a learned variance, and an annealing stretched to the training. HVQ-VAE has networks of
  its own, a sum of squared errors, and trains both levels at once; as its authors do, its gradients are clipped and the
  learning rate falls along a cosine to a tenth in the last third. Their docstrings have more.{_low_use(results)}
- **Gradients** go straight through every quantizer, unless a row says *rotation trick*.
- **Training**: *epochs* are images seen over the size of the whole training set, of which the last
  {HELD_OUT:,} images are held out and choose the checkpoint, of those after every 25,000 images (or a fiftieth of a
  longer training) and the last; **the authors chose theirs on the test set**. The published training has
  {EPOCHS} epochs, of batches of {PUBLISHED_BATCH}: a shorter one shows neither the level nor, by itself, the order in
  which methods end. *Annealed* trainings (`--annealed`) are ours, to learn more of as many images: Adam's learning
  rate rises in {WARM_UP} steps to the line that falls from {ANNEALED_RATE:g} to 0. *Bfloat16* (`--bf16`) is the
  training of the networks alone; quantizers, losses, held-out errors and figures are float32.
- **Noise**: one seed, unless others are named{" ([what they change](#seeds))" if _seeds(results) else ""}; differences
  below {TIE} dB, which is more than seeds have made so far, are called level. Other methods and further seeds may part
  by more.
- **Figures** are of the 10,000 test images unless they are called held out. *Clean* ones are of float images; those of
  the protocol *paper*, of JPEGs and with another window of SSIM, stand beside the paper's
  ([protocols](evaluation.md#protocols)). {_lpips_and_rfid(results)} *Use* is the share of the codevectors that the test
  images use; *chosen at*, images seen where the checkpoint is from, if not from the end of the training.
- **Rates** are log2 K bits a code, over all pixels of an image; *entropy* is what an ideal coder would take that knows
  how often a codebook's codevectors occur in the test images, and no context. Methods of one table pay very different
  rates, which a table by K x d hides{above_lossless(results)}.
- **Commands** stand at the tables; that of a single row is in its result file in `benchmarks/results/tables/`. All rows
  with the published number of epochs and batch size, on a GPU: `python benchmarks/tables.py all --data FOLDER --device
  cuda --jobs 8 --lpips-vgg-weights FILE --inception-weights FILE`.
- **Code**: {_of_code(results)}

The paper's figures: {source}

{_not_measured(results)}"""


def _lpips_and_rfid(results: list[dict]) -> str:
    """How many results have the figures that need other networks' weights."""
    with_lpips, with_rfid = (sum(name in r["test"]["clean"] for r in results) for name in ("lpips_vgg", "rfid@2048"))
    return (
        f"LPIPS (VGG) was measured of {with_lpips} of the {len(results)} results, rFID, which needs 2,048 Inception "
        f"features, of {with_rfid or 'none'}."
    )


def _not_measured(results: list[dict]) -> str:
    """Rows without a result, by the sets that lack them."""
    there = {(result["row"], result["images"]) for result in results}
    lacking = defaultdict(list)
    for row in ROWS:
        sets = [NAMES[images] for images in NAMES if (row, images) not in there]
        if sets:
            measured = [name for name in NAMES.values() if name not in sets]
            lacking[f"on {' and '.join(measured)} only" if measured else "not at all"].append(f"`{row}`")
    lines = [f"- {sets}: {', '.join(rows)}" for sets, rows in lacking.items()]
    return folded("Rows that are not measured yet, or not on all sets", "\n".join(lines)) if lines else ""


def _low_use(results: list[dict]) -> str:
    """Methods that use a small part of their codebook, which no other figure of a table says as plainly."""
    found = defaultdict(list)
    for result in results:
        use = result["test"]["clean"]["codebook_use"]
        if use < LOW_USE:
            found[ROWS[result["row"]].method].append(use)
    ranges = [
        f"{method} {f'{min(uses):.1%}' if len(uses) == 1 else f'{min(uses):.1%} to {max(uses):.1%}'}"
        for method, uses in found.items()
    ]
    if not ranges:
        return ""
    return f"\n  Of their codebooks the test images use less than {LOW_USE:.0%} with {'; '.join(ranges)}."


def _of_code(results: list[dict]) -> str:
    """How many results say which code made them."""
    commits = [[part.get("code") for part in result.get("sessions", [result])] for result in results]
    unknown = sum(not all(of_one) or not of_one for of_one in commits)
    changed = sum(any(code and code.endswith("-dirty") for code in of_one) for of_one in commits)
    return (
        f"{len(results) - unknown} of the {len(results)} results name the commit that trained them (`code`, in "
        f"their files), {changed} of these with changes that were not committed yet; the others are from before that "
        "was recorded."
    )


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
    heading = f"### {NAMES[images]}, {words_of_training(rows[0])}"
    least, most = (f(row["seconds"] / 60 for row in rows) for f in (min, max))
    minutes = f"{least:.0f}" if round(least) == round(most) else f"{least:.0f} to {most:.0f}"
    took = f"{command_of(table, rows, images)}, {minutes} minutes a row"
    return f"{heading}\n\n{took}\n\n{markdown(head, cells)}"


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


def _in_a_sentence(table: str, rows: list[dict]) -> list[str]:
    """What Tables 6 and 7 show, of rows of one training."""
    found = {result["row"]: result for result in rows}
    if table == "6" and "looc-256x4" in found:
        base = found.pop("looc-256x4")
        finer = {row.removeprefix("looc-256x4-s"): result for row, result in found.items() if "256x4-s" in row}
        gains = [
            f"{psnr_of(r) - psnr_of(base):+.2f} dB for {rate_of(r) / rate_of(base):.0f} times the bits"
            for r in finer.values()
        ]
        if finer:
            words = f"LooC 256×4, clean, s = {', '.join(finer)} instead of 1: {'; '.join(gains)}."
            return [f"{words} Below {TIE} dB is level."]
    if table == "7":
        losses = [
            f"{row.removeprefix('looc-').replace('x', '×')} {psnr_of(result) - psnr_of(revived):+.2f} dB, clean, with "
            f"{result['test']['clean']['codebook_use']:.1%} of the codebook in use"
            for row, revived in found.items()
            if (result := found.get(f"{row}-no-revival"))
        ]
        if losses:
            return [f"Without revival: {'; '.join(losses)}. The paper has all of it in use, on FFHQ."]
    return []


def _recipes(title: str, results: list[dict]) -> list[str]:
    """For each size and training a table of recipes by sets of images."""
    trainings = defaultdict(dict)
    for result in results:
        if result["row"] in TABLES["recipes"]:
            size = result["row"].split("-")[1]
            trainings[size, setting(result)][result["row"], result["images"]] = result
    parts = []
    for (size, _), found in sorted(trainings.items()):
        rows = [row for row in TABLES["recipes"] if any((row, images) in found for images in NAMES)]
        sets = [images for images in NAMES if any((row, images) in found for row in rows)]
        if len(rows) < 2:
            continue
        one = next(iter(found.values()))
        parts.append(f"### {size.replace('x', '×')}, {setting_in_words(one)}: {rate_of(one):.3g} bits per pixel")
        parts.append(command_of("recipes", list(found.values()), *sets))
        cells = []
        for row in rows:
            of_sets = [found.get((row, images)) for images in sets]
            cells.append([ROWS[row].method, *("" if r is None else f"{held_out_psnr(r):.2f}" for r in of_sets)])
        parts.append(markdown(["", *(NAMES[images] for images in sets)], cells))
    if not parts:
        return []
    words = (
        "PSNR in dB of the held-out training images, of float images and of the mean squared error of all of them, at "
        "equal bits and equal images seen. Figures of the test images are in the tables below; more starts and rules, "
        "after shorter trainings, are [on a page of their own](quantizer_recipes.md)."
    )
    return [f"## {title}", words, *parts, *_by_rotation(trainings)]


def _seeds(results: list[dict]) -> list[str]:
    """How far trainings part that differ in their seed alone."""
    trainings = defaultdict(list)
    for result in results:
        trainings[result["images"], result["row"], *setting(result)[:-1]].append(result)
    lines, spreads = [], []
    for found in trainings.values():
        if len(found) > 1:
            psnr = [psnr_of(result) for result in found]
            spreads.append(max(psnr) - min(psnr))
            seeds = ", ".join(f"{value:.2f} ({result['seed']})" for value, result in zip(psnr, found, strict=True))
            training = words_of_training(found[0]).replace(f" and seed {found[0]['seed']}", "")
            lines.append([ROWS[found[0]["row"]].method, NAMES[found[0]["images"]], training, seeds])
    if not lines:
        return []
    words = (
        f"PSNR of the test images, clean, of trainings that only the seed parts, which is in brackets. They lie up to "
        f"{max(spreads):.2f} dB apart."
    )
    return ["## Seeds", words, markdown(["", "images", "training", "PSNR in dB"], lines, numbers=False)]


def _by_rotation(trainings: dict) -> list[str]:
    """What the rotation trick adds, over all pairs of results that only it parts."""
    gains = []
    for found in trainings.values():
        for (row, images), result in found.items():
            other = found.get((f"{row}-rotation", images))
            if other:
                gains.append((held_out_psnr(other) - held_out_psnr(result), images))
    if not gains:
        return []
    ahead = sum(gain >= TIE for gain, _ in gains)
    sets = [NAMES[name] for name in NAMES if any(images == name for _, images in gains)]
    return [
        f"In {ahead} of the {len(gains)} pairs above that differ in the rotation trick alone ({', '.join(sets)}), the "
        f"row with it is ahead by {TIE} dB or more; it gains {min(gains)[0]:+.2f} to {max(gains)[0]:+.2f} dB."
    ]
