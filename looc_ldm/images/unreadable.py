"""Name unreadable images in warnings, and stop a run that meets too many."""

from __future__ import annotations

import logging

FEW = 10  # unreadable images that are too few to estimate their share in streamed data, whose size is unknown

logger = logging.getLogger(__name__)


def warn_of(problems: list[str], warned: set[str]) -> None:
    """Log a warning for each problem that is not among `warned`, and add it there."""
    for problem in problems:
        if problem not in warned:
            logger.warning("%s; the next readable image takes its place", problem)
            warned.add(problem)


def too_many(bad: int, images: int, max_share: float, least: int = 1) -> str | None:
    """Return the error message if `bad` of `images` are more than `data.max_unreadable_share` allows, else None.

    `least` unreadable images are allowed however few images there are, unless the share is 0.
    """
    if bad <= (max(least, max_share * images) if max_share else 0):
        return None
    return (
        f"{bad} of {images} images cannot be read, more than data.max_unreadable_share={max_share} allows; "
        "the warnings in the log name them."
    )


class UnreadableImages:
    """Warn of each unreadable image that one process meets in training, and count how often it meets one.

    `started_at` is the position in the stream of images at which the process started. `size` is the number of images of
    the data set, None if it is streamed.
    """

    def __init__(self, max_share: float, started_at: int = 0, size: int | None = None):
        self.max_share, self.started_at, self.size = max_share, started_at, size
        self.count = 0
        self._warned: set[str] = set()

    def add(self, problems: list[str]) -> None:
        """Count and name the problems of one batch; see `ImageReader.first_readable`."""
        self.count += len(problems)
        warn_of(problems, self._warned)

    def too_many(self, count: int, images_seen: int) -> str | None:
        """Return the error message if `count`, the sum over all processes, is more than allowed."""
        if self.size is None:
            return too_many(count, images_seen - self.started_at, self.max_share, FEW)
        epochs = (images_seen - 1) // self.size - self.started_at // self.size + 1  # each meets an image at most once
        return too_many(count, epochs * self.size, self.max_share, epochs)
