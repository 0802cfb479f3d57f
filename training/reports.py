"""What the loaders' workers report: images that cannot be read, and how far a streamed data set was read."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from looc_ldm.distributed import write_or_stop_all
from looc_ldm.errors import TrainingError
from looc_ldm.files import replace_bytes
from looc_ldm.training.data import Report

# Unreadable images of streamed data, whose size is not known, that say nothing about their share yet.
FEW = 10

logger = logging.getLogger(__name__)


def write_unreadable(file: Path, names: list[str]) -> None:
    """Name images in a file, one a line, byte by byte as file systems do: names need not be text. None: no file."""
    if names:
        replace_bytes(file, b"".join(os.fsencode(name) + b"\n" for name in names))
    else:
        file.unlink(missing_ok=True)


def too_many(bad: int, images: int, max_share: float, file: Path, least: int = 1) -> str | None:
    """The error for more unreadable images than may be; None if there are fewer.

    One may be unreadable however few images there are, unless the share is 0.

    Args:
        bad, images: How many cannot be read, of how many.
        max_share: `data.max_unreadable_share`.
        file: Where they are named.
        least: How many may be, whatever the share.
    """
    if bad <= (max(least, max_share * images) if max_share else 0):
        return None
    return (
        f"{bad} of {images} images cannot be read, more than data.max_unreadable_share={max_share} allows; "
        f"they are named in {str(file)!r}."
    )


class Reports:
    """The reports of all processes together.

    Args:
        file (`Path`): Where unreadable images are named, one a line.
        accelerator (`Accelerator`): Knows the processes.
        max_share (`float`): Share of the images that may be unreadable.

    Attributes:
        cursors (`dict`): Of streamed data: lane -> where it goes on. This process follows those that it reads.
        unreadable (`list[str]`): Names of images that cannot be read, each once, that all processes know of.
    """

    def __init__(self, file: Path, accelerator: Accelerator, max_share: float):
        self.file = file
        self.accelerator = accelerator
        self.max_share = max_share
        self.cursors: dict[int, tuple[int, ...]] = {}
        self.unreadable: list[str] = []
        self._times = 0  # that an image could not be read, the same one again counted
        self._new: list[str] = []  # of this process, not told to the others yet
        self._images: int | None = None  # of a map-style data set

    def listen(self, loader: DataLoader) -> None:
        """The reports to come are of this loader."""
        self._images = getattr(loader.dataset, "length", None)

    def take(self, report: Report) -> None:
        """Take in the report on a batch that the loop goes on to train on."""
        self._new += report.unreadable
        if report.cursor is not None:
            self.cursors[report.cursor[0]] = tuple(report.cursor)

    def gather(self) -> None:
        """Tell each other which images cannot be read, and name them in the file. Collective."""
        names = [name for part in gather_object([self._new]) for name in part]
        self._new = []
        self._times += len(names)
        known = set(self.unreadable)
        new = [name for name in dict.fromkeys(names) if name not in known]
        if not new:
            return
        self.unreadable += new
        write_or_stop_all(self.accelerator, self.file.name, self.file.parent, self.write_names, main_only=True)
        if self.accelerator.is_main_process:
            logger.warning("images that cannot be read: %d so far, named in %s", len(self.unreadable), self.file)

    def write_names(self) -> None:
        """Bring the file to what is known. Main process only."""
        write_unreadable(self.file, self.unreadable)

    def state(self) -> dict:
        """For a checkpoint. Collective."""
        self.gather()
        # A process knows old cursors of the others' lanes from its start; lanes only go forward.
        everywhere = sorted(cursor for part in gather_object([self.cursors]) for cursor in part.values())
        cursors = {cursor[0]: cursor for cursor in everywhere}
        return {"unreadable": self.unreadable, "unreadable_times": self._times, "cursors": cursors}

    def load_state(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.unreadable, self._times = list(state["unreadable"]), state["unreadable_times"]
        self.cursors = {int(lane): tuple(cursor) for lane, cursor in state["cursors"].items()}

    def too_many(self, images_seen: int) -> TrainingError | None:
        """The error for more unreadable images than may be; None if there are fewer. The same on all processes.

        Streamed data, whose size is not known, is judged by how often an image seen so far could not be read, and from
        the eleventh time on.
        """
        if self._images is not None:
            bad, images, least = len(self.unreadable), self._images, 1
        else:
            bad, images, least = self._times, images_seen, FEW
        problem = too_many(bad, images, self.max_share, self.file, least)
        return None if problem is None else TrainingError(problem)
