"""Process many files: map inputs to outputs, read ahead of the network, and batch to fit into memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

from accelerate.utils.memory import should_reduce_batch_size

from looc_ldm.codes.images import set_tiling
from looc_ldm.images.folders import files_in
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.utils.errors import DataError, UserError
from looc_ldm.utils.files import check_folder

READERS = min(8, os.cpu_count() or 1)  # threads, not processes: Pillow releases the GIL while it decodes
# Pixels that go through the network at a time. On a CPU batches help small images only.
PIXELS_PER_BATCH = {"cpu": 2**18}
PIXELS_PER_BATCH_ELSEWHERE = 2**21

T = TypeVar("T")
Result = TypeVar("Result")


def targets_of(inputs: list[str], suffixes: tuple[str, ...], output: Path, suffix: str) -> list[tuple[Path, Path]]:
    """Return a pair (input, output) for each input file and for each file in an input folder."""
    targets = []
    for place in map(Path, inputs):
        if place.is_dir():
            files = [place / file for file in files_in(place, suffixes)]
            if not files:
                raise DataError(f"nothing to read in the folder {place} (looked for {', '.join(suffixes)}).")
            targets += [(file, output / file.relative_to(place).with_suffix(suffix)) for file in files]
        elif place.is_file():
            targets.append((place, output / place.with_suffix(suffix).name))
        else:
            raise DataError(f"no file or folder {str(place)!r} (encode takes data sets by name with --format parquet).")
    return targets


def check_targets(targets: list[tuple[Path | str, Path]], overwrite: bool) -> None:
    """Raise UserError if two sources share a target, or a target exists or cannot be written. Changes no files.

    Call it before any work. Sources are only used in messages.
    """
    sources: dict[Path, Path | str] = {}
    for source, target in targets:
        if target in sources:
            raise UserError(f"{str(sources[target])!r} and {str(source)!r} would both become {str(target)!r}.")
        sources[target] = source
    for folder in {target.parent for target in sources}:
        check_folder(folder)
    existing = [target for target in sources if os.path.lexists(target)]
    if existing and not overwrite:
        raise UserError(
            f"{len(existing)} of {len(sources)} outputs already exist, such as {str(existing[0])!r}: "
            "--overwrite replaces them, or give another --output."
        )


def read_ahead(
    sources: Iterable[T], read: Callable[[T], Result], ahead: int = 2 * READERS
) -> Iterator[tuple[T, Future[Result]]]:
    """Yield each source, in order, with the future of `read(source)`, which runs in a thread; at most `ahead` wait."""
    with ThreadPoolExecutor(READERS) as pool:
        pending: deque[tuple[T, Future[Result]]] = deque()
        for source in sources:
            pending.append((source, pool.submit(read, source)))
            if len(pending) > ahead:
                yield pending.popleft()
        yield from pending


def pixel_budget(device: str) -> int:
    """Return how many pixels go through the network at a time on this kind of device."""
    return PIXELS_PER_BATCH.get(device, PIXELS_PER_BATCH_ELSEWHERE)


def batch_of_squares(device: str, side: int, most: int) -> int:
    """Return how many square images go through the network at a time on this kind of device, 1 to `most`."""
    return max(1, min(most, pixel_budget(device) // side**2))


def compute_in_batches(
    items: Iterable[T],
    size_of: Callable[[T], tuple[int, int]],
    compute: Callable[[list[T]], Iterable[Result]],
    model: LooCVQModel,
    limit: int | None = None,
) -> Iterator[tuple[T, Result | None]]:
    """Yield each item, in order, with its result; None if memory runs out for this item alone.

    Consecutive items of one size (height, width) are computed together, at most `limit` at a time. The default limit
    depends on the kind of device. Images with more pixels than one batch may have are computed in tiles.
    """
    budget = pixel_budget(model.device.type)
    for (height, width), neighbours in groupby(items, size_of):
        set_tiling(model, height * width, budget)
        most = limit or max(1, budget // (height * width))
        while batch := list(islice(neighbours, most)):
            yield from _compute_or_halve(batch, compute)


def _compute_or_halve(
    batch: list[T], compute: Callable[[list[T]], Iterable[Result]]
) -> Iterator[tuple[T, Result | None]]:
    """Yield each item of a batch with its result; if memory runs out, compute the halves of the batch."""
    try:
        results = compute(batch)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        results = None
    if results is not None:
        yield from zip(batch, results, strict=True)
    elif len(batch) == 1:
        yield batch[0], None
    else:
        half = len(batch) // 2
        yield from _compute_or_halve(batch[:half], compute)
        yield from _compute_or_halve(batch[half:], compute)
