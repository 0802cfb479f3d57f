"""What a run says of itself: means of scalars, one line a log interval, `metrics.jsonl`."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import uuid
from pathlib import Path

import psutil
import torch

from looc_ldm.errors import is_first_process
from looc_ldm.files import replace_text

logger = logging.getLogger(__name__)

# What depends on the machine and the moment, and so is not the same in a run that was interrupted.
OF_THE_MOMENT = ("images_per_second", "data_wait", "other_seconds", "memory_gib")


def show_log_lines() -> None:
    """Show the log of training on stderr: what a trainer's command line does first.

    Of several processes only the first one shows more than warnings.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    if is_first_process():
        logging.getLogger("looc_ldm").setLevel(logging.INFO)


class Means:
    """Means of scalars that are recorded step by step. Values that are not finite are left out.

    Sums stay on the device, so that recording does not wait for it.

    Args:
        device (`torch.device`): Where the scalars are.
    """

    def __init__(self, device: torch.device):
        self.device = device
        # By the names that are recorded together: sums and counts, float32 (2, names); and the latest values.
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}
        self._latest: dict[tuple[str, ...], torch.Tensor] = {}

    def record(self, **values: torch.Tensor | float) -> None:
        """Take in scalars of one forward pass."""
        names = tuple(values)
        latest = torch.stack([self._scalar(value) for value in values.values()])
        finite = latest.isfinite()
        sums = torch.stack([torch.where(finite, latest, 0), finite.float()])
        self._sums[names] = self._sums[names] + sums if names in self._sums else sums
        self._latest[names] = latest

    def _scalar(self, value: torch.Tensor | float) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.detach().float().reshape(()).to(self.device)
        return torch.full((), float(value), device=self.device)

    def not_finite(self) -> list[str]:
        """Names of the scalars whose latest value is not finite. Waits for the device."""
        pairs = (pair for names, values in self._latest.items() for pair in zip(names, values.tolist(), strict=True))
        return [name for name, value in pairs if not math.isfinite(value)]

    def state(self) -> list[dict]:
        """What was recorded since the last `reset`, as JSON holds it. Waits for the device."""
        lists = [(names, *sums.tolist()) for names, sums in self._sums.items()]
        return [{"names": list(names), "sums": sums, "counts": counts} for names, sums, counts in lists]

    def reset(self, state: list[dict] | None = None) -> None:
        """Forget what was recorded, or go on from a `state`."""
        self._sums = {
            tuple(part["names"]): torch.tensor([part["sums"], part["counts"]], device=self.device)
            for part in state or []
        }


def means_of(states: list[list[dict]]) -> dict[str, float]:
    """The means of all that the `Means.state` of several processes hold; without scalars that were never finite."""
    totals: dict[str, list[float]] = {}
    for part in (part for state in states for part in state):
        for name, value, count in zip(part["names"], part["sums"], part["counts"], strict=True):
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += value
            total[1] += count
    return {name: value / count for name, (value, count) in totals.items() if count}


def memory_gib(device: torch.device) -> float:
    """The most memory that this process has taken on its GPU so far, or what it takes of the machine's, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def progress_line(images: int, total: int, values: dict) -> str:
    """One line for people, of what a line of `metrics.jsonl` holds."""
    known = (
        ("images_per_second", lambda value: f"{value:.4g} images/s"),
        ("data_wait", lambda value: f"data wait {value:.1%}"),
        ("other_seconds", lambda value: f"besides {value:.0f} s" if value >= 1 else ""),
        ("memory_gib", lambda value: f"{value:.1f} GiB"),
        ("learning_rate", lambda value: f"learning rate {value:.3g}"),
    )
    parts = [f"{images:,}/{total:,} images"]
    parts += [text(values[name]) for name, text in known if name in values]
    shown = {name: value for name, value in values.items() if name not in dict(known)}
    if not shown.get("skipped_steps"):
        shown.pop("skipped_steps", None)
    words = {name: value if isinstance(value, str) else f"{value:.4g}" for name, value in shown.items()}
    return ", ".join([part for part in parts if part] + [f"{name} {word}" for name, word in words.items()])


def append_line(file: Path, values: dict) -> None:
    """Add a JSON object to a file of lines. A disk that is full leaves the file as it was.

    Raises:
        OSError: It could not be written.
    """
    line = (json.dumps(values, allow_nan=False) + "\n").encode()
    with open(file, "ab", buffering=0) as stream:
        start = stream.tell()
        try:
            if stream.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            stream.truncate(start)
            raise


def cut_lines(file: Path, images: int) -> None:
    """Forget lines of more than so many images, and one that was half written when the process was killed."""
    if not file.is_file():
        return
    lines = file.read_text().splitlines()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["images"] <= images:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            if number < len(lines):
                logger.warning("%s: line %d is damaged, and left out", file, number)
    text = "".join(line + "\n" for line in kept)
    if text != file.read_text():
        replace_text(file, text)


def figures_at(file: Path, images: int) -> dict:
    """All that the lines of just so many images say. Of a file whose damaged lines `cut_lines` has left out."""
    lines = map(json.loads, file.read_text().splitlines()) if file.is_file() else ()
    return {name: value for line in lines if line["images"] == images for name, value in line.items()}


def lasting_id(file: Path) -> str:
    """A random name of eight letters and digits, made once and kept in a file."""
    if not file.is_file():
        replace_text(file, uuid.uuid4().hex[:8] + "\n")
    return file.read_text().strip()


def data_line(images, held_out, classes: list[str], model: torch.nn.Module) -> str:
    """What a run trains, and on what."""
    count = f"{images.num_shards} shards of images" if hasattr(images, "num_shards") else f"{len(images):,} images"
    return (
        f"{count}, {len(held_out):,} held out, {len(classes) or 'no'} classes; "
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.3g} M parameters"
    )
