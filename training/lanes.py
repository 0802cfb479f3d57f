"""How the shards of a data set are divided, shuffled and entered anywhere.

What is read is divided by *lanes*, one for each worker of each process's loader. The batches of one forward pass are
dealt out to them in turn, so that a worker meets one lane only, and lane `l` of `L` reads every `L`-th shard of an
order that belongs to the epoch. A shard is read in blocks of `data.shuffle_images` images, each permuted by (seed,
epoch, shard, block). A *cursor* says exactly where a lane goes on: `(lane, epoch, place of the shard in the epoch's
order, images of it already given)`. Nothing is lost, and nothing comes twice within an epoch of a lane.

The division of `datasets` itself (`split_dataset_by_node`, and by worker within a loader) is not used: where it goes on
depends on the state of each process's iterator, and its shuffle buffer is filled anew after an interruption, which
loses what was in it.

Resuming opens each lane's shard and reads it up to the end of the block that was left: at most one shard a worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

from looc_ldm.errors import DataError
from looc_ldm.training.data import BLOCKS, SHARDS, random_at
from looc_ldm.training.sources import Stored

if TYPE_CHECKING:
    from looc_ldm.training.streaming import StreamedSet

Cursor = tuple[int, int, int, int]


def starting_cursors(cursors: dict[int, Cursor], lanes: int) -> dict[int, Cursor]:
    """Where each lane starts: at the beginning, or where a checkpoint's cursors say, one for each of its lanes.

    With another number of lanes than the checkpoint's, an epoch goes on behind the shards that all lanes had finished.
    A shard that was being read goes on where it was left, if a lane meets it first; those that some lane had finished
    ahead of the others are read again. So no image is left out, and few come twice.
    """
    if not cursors:
        return {lane: (lane, 0, lane, 0) for lane in range(lanes)}
    if len(cursors) == lanes:
        return {lane: tuple(cursors[lane]) for lane in range(lanes)}
    epoch = min(cursor[1] for cursor in cursors.values())
    begun = {place: given for _, own, place, given in cursors.values() if own == epoch}
    finished = min(begun)  # all shards at places before it
    places = {lane: finished + (lane - finished) % lanes for lane in range(lanes)}
    return {lane: (lane, epoch, place, begun.get(place, 0)) for lane, place in places.items()}


class Lane:
    """The examples of one lane from a cursor on, without end. A thread reads the next block while one is given.

    Attributes:
        cursor (`Cursor`): Behind the last example that was given.
    """

    def __init__(self, images: StreamedSet, seed: int, lanes: int, cursor: Cursor):
        self.cursor = cursor
        self._examples: list[Stored] = []  # of the present block, the next one last
        self._blocks = _blocks(images, seed, lanes, cursor)
        self._reader = ThreadPoolExecutor(1, "shards")
        self._ahead = self._reader.submit(next, self._blocks)

    def __next__(self) -> Stored:
        while not self._examples:
            self.cursor, self._examples = self._ahead.result()
            self._examples.reverse()
            self._ahead = self._reader.submit(next, self._blocks)
        lane, epoch, place, given = self.cursor
        self.cursor = (lane, epoch, place, given + 1)
        return self._examples.pop()


def _blocks(images: StreamedSet, seed: int, lanes: int, cursor: Cursor) -> Iterator[tuple[Cursor, list[Stored]]]:
    """A lane's blocks in the order in which their examples are given, each with the cursor in front of it."""
    lane, epoch, place, given = cursor
    size = images.config.shuffle_images
    fruitless = 0
    while fruitless <= images.num_shards:  # a lane that was left at the end of a shard finds nothing there
        if place >= images.num_shards:
            epoch, place, given = epoch + 1, lane, 0
        shard = int(random_at(seed, SHARDS, epoch).permutation(images.num_shards)[place])
        first = given - given % size
        examples = images.read(shard, first)
        while block := list(islice(examples, size)):
            fruitless = 0
            number = ((epoch * images.num_shards + place) << 20) + first // size  # of the block, in the whole stream
            order = random_at(seed, BLOCKS, number).permutation(len(block))[max(given - first, 0) :]
            yield (lane, epoch, place, max(given, first)), [block[index] for index in order]
            first += len(block)
            del block  # or it would be held while the next one is read
        fruitless += 1
        place, given = place + lanes, 0
    raise DataError(f"there are no images in the shards of {images.config.path}.")
