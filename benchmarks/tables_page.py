"""Write the tables between the markers of docs/tables.md from benchmarks/results.

python benchmarks/tables_page.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict

from results import DOCS, RESULTS, fill, markdown_table, read_results
from small_vqvae import Training, annealed
from table_rows import PAPER_ROWS, TABLES
from tables import load_paper

SETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
FIGURES = {"psnr": ("PSNR, dB", ".2f"), "lpips_vgg": ("LPIPS", ".4f"), "ssim": ("SSIM", ".4f"), "l1": ("L1", ".4f")}


def paper_table(results: list[dict], paper: dict) -> str:
    """Return PSNR of the paper's rows under its protocol: ours, the paper's, and the difference."""
    published, recipes = of_the_paper(paper)
    ffhq = {row: {} for table in ("6", "7") for row in TABLES[table]}  # the paper measured these on other images
    stated = ffhq | recipes | published
    groups = defaultdict(dict)
    for result in results:
        if result["row"] in stated and "seed" not in words(result) and not is_annealed(result):
            groups[result["row"], words(result)][result["set"]] = result
    order = [*published, *recipes, *ffhq]
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


def of_the_paper(paper: dict) -> tuple[dict, dict]:
    """Return the paper's figures by our rows: of its own rows, and of the same sizes with rules that it has not."""
    published = {row: paper[table][name] for table in PAPER_ROWS for row, name in PAPER_ROWS[table].items()}
    return published, {row: published["-".join(row.split("-")[:2])] for row in TABLES["recipes"]}


def level_table(results: list[dict], paper: dict) -> str:
    """Return all figures of the annealed trainings beside the paper's, under its protocol."""
    published, recipes = of_the_paper(paper)
    stated, lines = published | recipes, []
    for result in sorted(results, key=lambda result: (list(SETS).index(result["set"]), result["row"])):
        if not is_annealed(result):
            continue
        theirs = stated[result["row"]][result["set"]]
        line = {"images": SETS[result["set"]], "row": result["method"], "training": words(result)}
        line["bits per pixel"] = rate(result)
        for name, (title, digits) in FIGURES.items():
            ours = result["paper"].get(name)  # no LPIPS without its weights
            line[f"{title}, ours"] = None if ours is None else format(ours, digits)
            line[f"{title}, the paper's"] = format(theirs[name], digits)
        lines.append(line)
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
    """Return the training of a result, without settings that are published, or those of the annealed training."""
    training = result["training"]
    usual = asdict(annealed(1) if is_annealed(result) else Training(1))
    changed = [f"{n.replace('_', ' ')} {training[n]}" for n in usual if n != "images" and training[n] != usual[n]]
    return ", ".join([f"{training['images']:,} images", *["annealed"] * is_annealed(result), *changed])


def is_annealed(result: dict) -> bool:
    return Training(**result["training"]).is_annealed


def rate(result: dict) -> str:
    return f"{result['clean']['bits_per_pixel']:.3g}"


def tables() -> dict[str, str]:
    """Return every table of the page by the name of its markers."""
    results, paper = read_results(RESULTS / "tables.jsonl"), load_paper()["tables"]
    return {
        "paper": paper_table(results, paper),
        "level": level_table(results, paper),
        "seeds": seeds_table(results),
        "codecs": codecs_table(read_results(RESULTS / "image_codecs.jsonl")),
    }


def main() -> None:
    fill(DOCS / "tables.md", tables())


if __name__ == "__main__":
    main()
