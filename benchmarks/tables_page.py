"""Write the tables between the markers of docs/tables.md, and its plots, from benchmarks/results.

python benchmarks/tables_page.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict

from results import DOCS, RESULTS, fill, markdown_table, read_results
from small_vqvae import Training
from table_rows import PAPER_ROWS, ROWS, TABLES
from tables import load_paper
from tables_plot import draw_plot

from looc_ldm.utils.files import replace_bytes

SETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
COMPARED = "60,000 images, batch size 16"  # the training that most rows have, in the words of `words`
NEAR_RATE = 1.06  # rates up to this ratio count as equal


def paper_table(results: list[dict], paper: dict) -> str:
    """Return PSNR of the paper's rows under its protocol: ours, the paper's, and the difference."""
    published = {row: paper[table][name] for table in PAPER_ROWS for row, name in PAPER_ROWS[table].items()}
    recipes = {row: published["-".join(row.split("-")[:2])] for row in TABLES["recipes"]}
    stated = recipes | published
    groups = defaultdict(dict)
    for result in results:
        if result["row"] in stated and "seed" not in words(result):
            groups[result["row"], words(result)][result["set"]] = result
    order = [*published, *recipes]
    lines = []
    for (row, training), of_sets in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
        first = next(iter(of_sets.values()))
        line = {"row": first["method"], "training": training, "bits per pixel": rate(first)}
        for name, title in SETS.items():
            ours = of_sets[name]["paper"]["psnr"] if name in of_sets else None
            theirs = stated[row].get(name, {}).get("psnr")
            line[f"{title}, ours"] = None if ours is None else f"{ours:.2f}"
            line[f"{title}, the paper's"] = None if None in (ours, theirs) else f"{theirs:.2f}"
            line[f"{title}, difference"] = None if None in (ours, theirs) else f"{ours - theirs:+.2f}"
        lines.append(line)
    return markdown_table(lines, align_left=2)


def rates_table(results: list[dict]) -> str:
    """Return clean PSNR of all rows with the compared training, by bits per pixel."""
    lines = []
    rows = defaultdict(dict)
    for result in compared(results):
        rows[result["row"]][result["set"]] = result
    for of_sets in sorted(rows.values(), key=lambda of_sets: next(iter(of_sets.values()))["clean"]["bits_per_pixel"]):
        first = next(iter(of_sets.values()))
        psnr = {title: f"{of_sets[n]['clean']['psnr']:.2f}" if n in of_sets else None for n, title in SETS.items()}
        use = min(result["clean"]["codebook_use"] for result in of_sets.values())
        lines.append({"row": first["method"], "bits per pixel": rate(first), **psnr, "lowest use": f"{use:.1%}"})
    return markdown_table(lines)


def equal_rates_table(results: list[dict]) -> str:
    """Return LooC's best row, by held-out images, beside the best of the others, at each rate that both have."""
    lines = []
    for name, title in SETS.items():
        for group in groups_of_rates([result for result in compared(results) if result["set"] == name]):
            ours = [result for result in group if result["row"].startswith("looc-")]
            others = [result for result in group if result not in ours]
            if ours and others:
                our, other = (min(side, key=lambda result: result["validation_mse"]) for side in (ours, others))
                line = {"images": title, "LooC's best row": our["method"], "best of the others": other["method"]}
                for side, result in (("LooC", our), ("other", other)):
                    line[f"{side}, bits per pixel"] = rate(result)
                    line[f"{side}, PSNR"] = f"{result['clean']['psnr']:.2f}"
                line["difference"] = f"{our['clean']['psnr'] - other['clean']['psnr']:+.2f}"
                lines.append(line | {"others": len(others)})
    return markdown_table(lines, align_left=3)


def seeds_table(results: list[dict]) -> str:
    """Return clean PSNR of trainings that differ in their seed only."""
    groups = defaultdict(list)
    for result in results:
        training = {name: value for name, value in result["training"].items() if name != "seed"}
        groups[result["row"], result["set"], json.dumps(training)].append(result)
    lines = [
        {"row": found[0]["method"], "images": SETS[found[0]["set"]]}
        | {f"seed {result['training']['seed']}": f"{result['clean']['psnr']:.2f}" for result in found}
        for found in groups.values()
        if len(found) > 1
    ]
    return markdown_table(lines, align_left=2)


def codecs_table(codecs: list[dict]) -> str:
    """Return bits per pixel of files without a model."""
    kinds = {"lossless png": "PNG", "lossless webp": "WebP, lossless", "jpeg of one grey": "JPEG of one grey"}
    lines = []
    for name, title in SETS.items():
        found = {line["codec"]: f"{line['bits_per_pixel']:.3g}" for line in codecs if line["set"] == name}
        raw = 24 if name == "cifar10" else 8
        lines.append({"images": title, "raw": raw, **{kind: found[codec] for codec, kind in kinds.items()}})
    return markdown_table(lines)


def words(result: dict) -> str:
    """Return the training of a result, without settings that are published."""
    training, published = result["training"], asdict(Training(1))
    changed = [name for name in training if name != "images" and training[name] != published[name]]
    return ", ".join([f"{training['images']:,} images", *(f"{n.replace('_', ' ')} {training[n]}" for n in changed)])


def rate(result: dict) -> str:
    return f"{result['clean']['bits_per_pixel']:.3g}"


def compared(results: list[dict]) -> list[dict]:
    """Return the results with the training that most rows have."""
    order = list(ROWS)
    found = [result for result in results if words(result) == COMPARED]
    return sorted(found, key=lambda result: order.index(result["row"]))


def groups_of_rates(results: list[dict]) -> list[list[dict]]:
    """Return results of about equal rates together."""
    groups = []
    for result in sorted(results, key=lambda result: result["clean"]["bits_per_pixel"]):
        start = groups[-1][0]["clean"]["bits_per_pixel"] if groups else 0
        if result["clean"]["bits_per_pixel"] > NEAR_RATE * start:
            groups.append([])
        groups[-1].append(result)
    return groups


def longer(results: list[dict]) -> list[dict]:
    """Return, for each row, the best by held-out images of what saw more than 120,000 images."""
    best = {}
    for result in sorted(results, key=lambda result: -result["validation_mse"]):
        if result["images_seen"] > 120_000:
            best[result["row"]] = result
    return list(best.values())


def tables() -> dict[str, str]:
    """Return every table of the page by the name of its markers."""
    results, paper = read_results(RESULTS / "tables.jsonl"), load_paper()["tables"]
    return {
        "paper": paper_table(results, paper),
        "equal rates": equal_rates_table(results),
        "rates": rates_table(results),
        "seeds": seeds_table(results),
        "codecs": codecs_table(read_results(RESULTS / "image_codecs.jsonl")),
    }


def main() -> None:
    fill(DOCS / "tables.md", tables())
    results, codecs = read_results(RESULTS / "tables.jsonl"), read_results(RESULTS / "image_codecs.jsonl")
    for name, title in SETS.items():
        of_set = [result for result in results if result["set"] == name]
        of_codecs = [line for line in codecs if line["set"] == name]
        title = f"{title}, test set, after {COMPARED}"
        rows = [result for result in compared(of_set) if result["row"] in TABLES["rates"]]
        plot = draw_plot(name, rows, of_codecs, load_paper()["tables"], title, longer(of_set))
        replace_bytes(DOCS / f"rate_distortion_{name}.png", plot)


if __name__ == "__main__":
    main()
