"""Divide and shuffle the shards of a data set, so that reading can start anywhere.

Each worker of each process's loader reads one *lane*: the batches are dealt out to the lanes in turn. Shards are
numbered through all epochs: number `g` of a set of `n` shards stands at place `g mod n` of epoch `g div n`, whose
order depends on the seed and the epoch. Lane `l` of `L` reads the numbers `l`, `l + L`, `l + 2 L`, ..., so that lanes
stay near each other. A shard is read in blocks of `data.shuffle_images` images, each permuted by (seed, number,
block).

A *cursor* is the exact position at which a lane continues: `(lane, number of a shard, images of it already given)`.
After the number of lanes has changed, further pairs of number and images follow. The lane continues in steps of `L`
from the last.

The division of `datasets` itself is not used: its shuffle buffer is lost in an interruption.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from itertools import islice

from looc_ldm.images.image_set import BLOCKS, SHARDS, random_at
from looc_ldm.images.source import Stored
from looc_ldm.utils.errors import DataError

Cursor = tuple[int, ...]


def starting_cursors(cursors: dict[int, Cursor], lanes: int) -> dict[int, Cursor]:
    """Return the start of each lane: the beginning, or the cursors of a checkpoint, one for each of its lanes.

    If the number of lanes has changed, the images that are left are dealt out again, first from the shards that were
    being read: no image is left out, and none comes twice.
    """
    if len(cursors) == lanes:
        return {lane: tuple(cursors[lane]) for lane in range(lanes)}
    left = {number: given for cursor in cursors.values() for number, given in _pairs(cursor)}
    start = max(left, default=-1) + 1  # no lane has begun a shard from here on
    for cursor in cursors.values():
        left |= dict.fromkeys(range(cursor[-2] + len(cursors), start, len(cursors)), 0)
    unfinished = sorted(left.items())
    starts = {}
    for lane in range(lanes):
        mine = unfinished[lane::lanes]
        mine.append((start + lane + len(mine) * lanes - len(unfinished), 0))
        starts[lane] = (lane, *(value for pair in mine for value in pair))
    return starts


def _pairs(cursor: Cursor) -> list[tuple[int, int]]:
    """Return numbers of shards, and how many images of each were given."""
    return list(zip(cursor[1::2], cursor[2::2], strict=True))


class Lane(Iterator[Stored]):
    """Iterate over the examples of one lane from a cursor on, without end.

    Args:
        images: The shards, with `num_shards`, `config` and `read(shard, start)` as `StreamedSet` has them.
        seed (`int`): Seed of the order.
        lanes (`int`): Number of all lanes.
        cursor (`Cursor`): Its start.
        read_ahead (`bool`): Read the next block in a thread while one is given. For loaders' workers, which end without
            waiting for it and without tidying up.

    Attributes:
        cursor (`Cursor`): Behind the last example that was given.
    """

    def __init__(self, images, seed: int, lanes: int, cursor: Cursor, read_ahead: bool = False):
        self.cursor = cursor
        self._examples: list[Stored] = []  # the rest of the present block, the next one last
        self._blocks = _blocks(images, seed, lanes, cursor)
        self._ahead = _Ahead(self._blocks) if read_ahead else None
        if not read_ahead:  # close readers before Python unloads their modules
            weakref.finalize(self, self._blocks.close)

    def __next__(self) -> Stored:
        while not self._examples:
            if self._ahead is None:
                self.cursor, self._examples = next(self._blocks)
            else:
                self.cursor, self._examples = self._ahead.result()
                self._ahead = _Ahead(self._blocks)
            self._examples.reverse()
        lane, number, given, *later = self.cursor
        self.cursor = (lane, number, given + 1, *later)
        return self._examples.pop()


class _Ahead(threading.Thread):
    """Fetch the next item of an iterator in a thread. Python does not wait for it at its end, as for an executor's."""

    def __init__(self, items: Iterator):
        super().__init__(name="shards", daemon=True)
        self._items = items
        self._outcome: list = []
        self.start()

    def run(self) -> None:
        try:
            self._outcome = [next(self._items), None]
        except BaseException as error:  # raised by `result`
            self._outcome = [None, error]

    def result(self):
        """Wait for the item and return it, or raise what was raised instead."""
        self.join()
        item, error = self._outcome
        if error is not None:
            raise error
        self._outcome = []  # or the block would be held as long as this thread's object
        return item


def _blocks(images, seed: int, lanes: int, cursor: Cursor) -> Iterator[tuple[Cursor, list[Stored]]]:
    """Yield a lane's blocks, each with the cursor to its start and with its examples in their shuffled order."""
    lane, shards = cursor[0], _pairs(cursor)
    size = images.config.shuffle_images
    empty: set[int] = set()
    while len(empty) < images.num_shards:
        (number, given), *later = shards
        epoch, place = divmod(number, images.num_shards)
        shard = int(random_at(seed, SHARDS, epoch).permutation(images.num_shards)[place])
        first = given - given % size
        examples = images.read(shard, first)
        found = first > 0
        while block := list(islice(examples, size)):
            found = True
            order = random_at(seed, BLOCKS, (number << 20) + first // size).permutation(len(block))
            order = order[max(given - first, 0) :]
            rest = (value for pair in later for value in pair)
            yield (lane, number, max(given, first), *rest), [block[index] for index in order]
            first += len(block)
            del block  # or it would be held while the next one is read
        if not found:
            empty.add(shard)
        shards = later or [(number + lanes, 0)]
    raise DataError(f"there are no images in the shards of {images.config.path}.")
