"""Signals that ask a run to stop: it finishes the step under way, saves, and ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from functools import partial

from looc_ldm.utils.errors import Terminated, is_first_process

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A launcher passes on signals that the system sends to every process anyway: what comes so soon is the same request.
SAME_REQUEST_SECONDS = 1.0

# Shared with the loaders' workers: whether the training that they load for is over.
_over = multiprocessing.RawValue(ctypes.c_bool, False)


class StopSignals:
    """Remember SIGINT and SIGTERM while entered. A second one, a second later, ends the process at once.

    Attributes:
        received (`int`): Number of the signal that came, or 0.
    """

    def __init__(self):
        self.received = 0
        self._received_at = 0.0
        self._previous = {}

    def __enter__(self) -> StopSignals:
        _over.value = False
        self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        _over.value = True
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        if not self.received:
            self.received, self._received_at = number, time.monotonic()
            if is_first_process():
                # Not `print`, in the middle of which the signal may have come.
                os.write(2, b"\nstopping after what is under way, with a checkpoint; once more: at once, without\n")
        elif time.monotonic() - self._received_at > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def stopped_by(number: int, message: str) -> KeyboardInterrupt:
    """Return the exception that ends a run after a signal: `Terminated` after SIGTERM."""
    return (Terminated if number == signal.SIGTERM else KeyboardInterrupt)(message)


def _leave_signals(worker: int, over: ctypes.c_bool) -> None:
    """Let a loader's worker go on while the trainer, which gets the same signals, finishes its step.

    Once the training is over, SIGTERM ends the worker at once: the loader sends it to a worker that is slow to end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if over.value else None)


leave_signals_to_the_trainer = partial(_leave_signals, over=_over)  # also for workers that are not forked
