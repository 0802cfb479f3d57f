"""Stop a run on a signal: it finishes the step under way, saves, and ends."""

from __future__ import annotations

import ctypes
import multiprocessing.queues
import os
import signal
import time
from contextlib import suppress
from functools import partial

from looc_ldm.utils.errors import is_first_process

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a batch system, a terminal that was closed
# A launcher passes on signals that the system sends to every process anyway: what comes so soon is the same request.
SAME_REQUEST_SECONDS = 1.0

# Shared with the loaders' workers: whether the training that they load for is over, or has not begun.
_over = multiprocessing.RawValue(ctypes.c_bool, True)


class StopSignals:
    """Remember `SIGNALS` while entered. A second one, a second later, ends the process at once.

    SIGHUP stays ignored if it was, as under nohup.

    Attributes:
        received (`int`): Number of the signal that came, or 0.
    """

    def __init__(self):
        self.received = 0
        self._received_at = 0.0
        self._previous = {}

    def __enter__(self) -> StopSignals:
        _over.value = False
        handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._remember) for number in handled}
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
                with suppress(OSError):  # the terminal may be closed
                    os.write(2, b"\nending this step and writing a checkpoint; once more stops at once, without one\n")
        elif time.monotonic() - self._received_at > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _start_worker(worker: int, over: ctypes.c_bool) -> None:
    """Keep a loader's worker running while the trainer, which gets the same signals, finishes its step.

    When no training is under way, SIGTERM ends the worker at once: the loader sends it to a worker that is slow to end.
    A worker that cannot send a batch, because /dev/shm is full, ends too; otherwise the trainer would wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if over.value else None)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))


start_worker = partial(_start_worker, over=_over)  # also for workers that are not forked
