"""Results of benchmarks/tables.py: read, sorted by training, and said in words, for the page and its parts."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

from small_images import COUNTS
from small_vqvae import SWITCHES, command_line, read_result, weights_in_words
from table_rows import ROWS, TABLES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tables"
TIE = 0.7  # dB; more than two seeds of one row have parted by so far (the section of seeds of the page)
NAMES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
FIGURES = {"psnr": "{:.2f}", "ssim": "{:.4f}", "l1": "{:.4f}", "lpips_vgg": "{:.4f}", "rfid@2048": "{:.2f}"}
HEADS = {"psnr": "PSNR", "ssim": "SSIM", "l1": "L1", "lpips_vgg": "LPIPS", "rfid@2048": "rFID"}


def load_results() -> list[dict]:
    results = [read_result(file) for file in sorted(RESULTS.glob("*_seed*.json"))]
    for result in results:  # what older ones do not say; at first an annealed training was always in bfloat16
        result.setdefault("annealed", False)
        result.setdefault("bf16", result["annealed"])
    return results


def load_paper() -> dict:
    """The paper's figures: `tables` by number, row and set, and their `source`."""
    return json.loads((ROOT / "benchmarks" / "paper_tables.json").read_text())


def load_codecs(images: str) -> dict:
    """What JPEG, WebP and lossless files take on a set; nothing where it was not measured."""
    file = RESULTS / f"codecs_{images}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def psnr_of(result: dict) -> float:
    return result["test"]["clean"]["psnr"]


def rate_of(result: dict) -> float:
    return result["test"]["clean"]["bits_per_pixel"]


def held_out_psnr(result: dict) -> float:
    return 10 * math.log10(4 / result["validation_mse"])


def in_words(result: dict) -> str:
    return f"{ROWS[result['row']].method}, {psnr_of(result):.2f} dB at {rate_of(result):.3g} bits per pixel"


def results_of(results: list[dict], images: str, rows) -> list[dict]:
    """Results of some rows on one set, longest training first, in the order of the rows."""
    found = [result for result in results if result["images"] == images and result["row"] in rows]
    order = list(rows)
    return sorted(found, key=lambda r: (order.index(r["row"]), -r["budget"], *setting(r)[1:]))


def setting(result: dict) -> tuple:
    """What results of one training share: budget, batch size, whether it was annealed and in bfloat16, and seed."""
    return tuple(result[key] for key in ("budget", "batch_size", *SWITCHES, "seed"))


def setting_in_words(result: dict) -> str:
    start = f"{result['budget']:,} images in batches of {result['batch_size']}"
    return ", ".join([start, *_switches(result), f"seed {result['seed']}"])


def training_cells(result: dict) -> list[str]:
    """Cells: epochs and batch."""
    epochs = f"{result['images_seen'] / COUNTS[result['images']]:.3g}"
    return [", ".join([epochs, *_switches(result)]), str(result["batch_size"])]


def words_of_training(result: dict) -> str:
    epochs, batch = training_cells(result)
    number = epochs.split(", ")[0]
    words = f"{number} epoch{'' if number == '1' else 's'} with batches of {batch} and seed {result['seed']}"
    return ", ".join([words, *_switches(result)])


def _switches(result: dict) -> list[str]:
    return [word for name, word in (("annealed", "annealed"), ("bf16", "bfloat16")) if result[name]]


def by_training(results: list[dict]) -> list[list[dict]]:
    """Results apart by training, the longest first."""
    trainings = defaultdict(list)
    for result in results:
        trainings[setting(result)].append(result)
    return [trainings[training] for training in sorted(trainings, reverse=True)]


def one_training(results: list[dict]) -> list[dict]:
    """Of one training only: that of most rates, and of those the longest."""
    return max(by_training(results), key=lambda rows: (len(set(map(rate_of, rows))), rows[0]["budget"]), default=[])


def command_of(table: str, results: list[dict], *sets: str) -> str:
    """What makes the results of one training, which are rows of a table."""
    names = list(dict.fromkeys(result["row"] for result in results))
    rows = "" if set(names) == set(TABLES[table]) else f" --row {' '.join(names)}"
    first = results[0]
    return (
        f"`python benchmarks/tables.py {table}{rows} --sets {' '.join(sets)} --data FOLDER --budget {first['budget']} "
        f"--batch-size {first['batch_size']}{command_line(first)} --seed {first['seed']}"
        f"{weights_in_words(first['test']['clean'])}`"
    )


def markdown(head: list[str], rows: list[list[str]], numbers: bool = True) -> str:
    lines = [head, ["---", *["---:" if numbers else "---"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def folded(summary: str, text: str) -> str:
    """Markdown that opens at a click."""
    return f"<details>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"
