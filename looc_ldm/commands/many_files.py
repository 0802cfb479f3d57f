"""Work on many files: which becomes which, reading ahead of the network, batches of one size that fit into memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from accelerate.utils.memory import should_reduce_batch_size

from looc_ldm.errors import DataError, UserError
from looc_ldm.files import check_folder, check_name

READERS = min(8, os.cpu_count() or 1)  # threads: Pillow decodes without holding the interpreter
# At a time, where no batch size is given. On a CPU batches are worth something for small images only.
PIXELS_PER_BATCH = {"cpu": 2**18}
PIXELS_PER_BATCH_ELSEWHERE = 2**21
MOST_PIXELS_WAITING = 2**26  # for others of their size

T = TypeVar("T")
Result = TypeVar("Result")


def targets_of(inputs: list[str], suffixes: tuple[str, ...], output: Path, suffix: str) -> list[tuple[Path, Path]]:
    """Return each file that is meant, with the file that it becomes."""
    targets = []
    for name in inputs:
        place = Path(name)
        if place.is_dir():
            files = sorted(
                file
                for file in place.rglob("*")
                if file.suffix.lower() in suffixes
                and not any(part.startswith(".") for part in file.relative_to(place).parts)
                and file.is_file()
            )
            if not files:
                raise DataError(f"nothing to read in the folder {name} (looked for {', '.join(suffixes)}).")
            targets += [(file, output / file.relative_to(place).with_suffix(suffix)) for file in files]
        elif place.is_file():
            targets.append((place, output / place.with_suffix(suffix).name))
        elif suffix == ".looc":
            raise DataError(f"no file or folder {name!r} (data sets by name go with --format parquet).")
        else:
            raise DataError(f"no file or folder {name!r}.")
    return targets


def check_targets(targets: list[tuple[Path | str, Path]], overwrite: bool) -> None:
    """Refuse, before any work, what would lose a file or cannot be written. Sources are only named."""
    sources: dict[Path, Path | str] = {}
    for source, target in targets:
        check_name(target)
        if target in sources:
            raise UserError(f"{str(sources[target])!r} and {str(source)!r} would both become {str(target)!r}.")
        sources[target] = source
    for target, parent in parents_among(sources):
        raise UserError(
            f"{str(sources[parent])!r} would become the file {str(parent)!r}, and {str(sources[target])!r} "
            f"{str(target)!r} in a folder of that name."
        )
    for folder in {target.parent for target in sources}:
        check_folder(folder)
    for target in sources:
        if target.is_dir():
            raise UserError(f"cannot write {str(target)!r}: it is a folder.")
    existing = [target for target in sources if os.path.lexists(target)]
    if existing and not overwrite:
        raise UserError(
            f"{len(existing)} of {len(sources)} outputs are there already, such as {str(existing[0])!r}: "
            "--overwrite replaces them, or give another --output."
        )


def parents_among(targets: Collection[Path]) -> Iterator[tuple[Path, Path]]:
    """Yield each target with a different one that it would lie in, as if that were a folder."""
    return ((target, parent) for target in targets for parent in target.parents if parent in targets)


def read_ahead(
    sources: Iterable[T], read: Callable[[T], Result], ahead: int = 2 * READERS
) -> Iterator[tuple[T, Future[Result]]]:
    """Yield each source with what `read` makes of it in a thread, in order; only `ahead` are held at a time."""
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


def largest_batch_that_fits(
    batch: list[T], compute: Callable[[list[T]], Iterable[Result]], too_large: Callable[[T], None]
) -> Iterator[tuple[T, Result]]:
    """Yield each item of a batch with what `compute` makes of it; if memory runs out, in batches of one.

    Args:
        batch: Items of one size.
        compute: Gives one result per item.
        too_large: Called with an item for which memory runs out even alone; it is then left out.
    """
    try:
        results = compute(batch)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        results = None
    if results is not None:
        yield from zip(batch, results, strict=True)
    elif len(batch) == 1:
        too_large(batch[0])
    else:
        for item in batch:
            yield from largest_batch_that_fits([item], compute, too_large)


def one_size_batches(
    items: Iterable[T], size_of: Callable[[T], tuple[int, int]], limit: int | None, device: str, in_order: bool = False
) -> Iterator[list[T]]:
    """Yield items in batches of one height and width.

    Args:
        items: In any order.
        size_of: Height and width of an item.
        limit: Most items of a batch; None for as many as suit the kind of device.
        device: Kind of device, for instance "cpu".
        in_order: Keep the order of the items: then only neighbours come together.
    """
    pixels_per_batch = pixel_budget(device)
    waiting: dict[tuple[int, int], list[T]] = {}
    pixels_waiting = 0
    for item in items:
        size = height, width = size_of(item)
        if in_order and waiting and size not in waiting:
            yield waiting.popitem()[1]
            pixels_waiting = 0
        waiting.setdefault(size, []).append(item)
        pixels_waiting += height * width
        full = size
        if len(waiting[size]) < (limit or max(1, pixels_per_batch // (height * width))):
            if pixels_waiting <= MOST_PIXELS_WAITING:
                continue
            full = max(waiting, key=lambda each: each[0] * each[1] * len(waiting[each]))
        batch = waiting.pop(full)
        pixels_waiting -= full[0] * full[1] * len(batch)
        yield batch
    yield from waiting.values()
