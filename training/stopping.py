"""Signals that ask a run to stop: it finishes the step under way, saves, and ends."""

from __future__ import annotations

import os
import signal
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A launcher passes on signals that the system sends to every process anyway: what comes so soon is the same request.
SAME_REQUEST_SECONDS = 1.0
GRACE = 30  # seconds after SIGTERM, at the end of which launchers and batch systems send SIGKILL


class StopSignals:
    """Remembers SIGINT and SIGTERM while it is entered. A second one, a second later, ends the process at once.

    Attributes:
        received (`int`): Number of the signal that came, or 0.
    """

    def __init__(self):
        self.received = 0
        self._received_at = 0.0
        self._previous = {}

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        if not self.received:
            self.received, self._received_at = number, time.monotonic()
        elif time.monotonic() - self._received_at > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def leave_signals_to_the_trainer(worker: int) -> None:
    """What a loader's worker does first: go on while the trainer, which gets the same signals, finishes its step.

    SIGTERM ends a worker, but not at once: the trainer, too, uses it, for one that hangs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.getitimer(signal.ITIMER_REAL)[0] or signal.alarm(GRACE))
