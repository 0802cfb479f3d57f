"""Uploads of checkpoints to the hub while training goes on, in processes of their own.

An upload may take as long as it wants and fail as it wants: the hub's client waits for ever for a network that has
gone silent, and its threads would then keep the interpreter from ending. A process can be ended.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from looc_ldm.training.together import disk_problem

WAIT_AT_END_SECONDS = 300

logger = logging.getLogger(__name__)


class Pusher:
    """Uploads folders, one at a time. No method waits for the network, but `push_result` and `finish`.

    Args:
        folder (`Path`): Where what is uploaded is kept meanwhile; it is removed afterwards.
        repo_id (`str`): "user/name".
        private (`bool`): Of a repository that is made.
    """

    def __init__(self, folder: Path, repo_id: str, private: bool):
        self.folder = folder
        self.repo_id = repo_id
        self.private = private
        self._process: subprocess.Popen | None = None
        self._waiting: threading.Thread | None = None
        self._given_up = False  # whether the upload under way is ended without a word
        self._consequence = ", training goes on"  # of an upload that fails
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed

    @property
    def busy(self) -> bool:
        """Whether an upload is under way."""
        return self._waiting is not None and self._waiting.is_alive()

    def push_snapshot(self, save: Callable[[Path], Path], message: str) -> None:
        """Save a snapshot and begin to upload it. While another upload is under way nothing is done.

        Args:
            save: Writes the snapshot into the folder it is given; returns which part of it is to be uploaded.
            message: Of the commit.
        """
        if self.busy:
            logger.info("not pushed to %s, because the last upload still runs: %s", self.repo_id, message)
            return
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            folder = save(self.folder)
        except Exception as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            problem = disk_problem(error, self.folder.parent)
            if problem is None:
                raise
            self._failed(problem)
            return
        self._push(folder, message)

    def push_result(self, folder: Path, message: str, seconds: float = WAIT_AT_END_SECONDS) -> None:
        """Upload the finished model, and wait for it at most so long. An upload of an older one is ended."""
        self._consequence = f"; try again with `looc-ldm push {folder} {self.repo_id}`"
        if self.busy:
            logger.info("the upload under way gives way to that of the result")
            self._given_up = True
            self.finish(seconds=0)
            self._given_up = False
        self._push(folder, message)
        self.finish(seconds)

    def _push(self, folder: Path, message: str) -> None:
        """Begin to upload a folder, which has to stay as it is until the upload has ended."""
        command = [sys.executable, "-m", __name__, str(folder), self.repo_id, message]
        try:
            self._process = subprocess.Popen(
                [*command, *(["--private"] if self.private else [])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                start_new_session=True,  # Ctrl-C is for the trainer
            )
        except OSError as error:
            self._failed(" ".join(str(error).split()))
            return
        self._waiting = threading.Thread(target=self._wait, args=(self._process, message), daemon=True)
        self._waiting.start()

    def finish(self, seconds: float = WAIT_AT_END_SECONDS) -> None:
        """Wait for the upload under way, at most so long; then end it."""
        if not self.busy:
            return
        try:
            if seconds:
                logger.info("waiting for the upload to %s, at most %.0f s", self.repo_id, seconds)
                self._waiting.join(seconds)
        finally:  # Ctrl-C, too
            if self.busy:
                self._process.kill()
                self._waiting.join()

    def _wait(self, process: subprocess.Popen, message: str) -> None:
        started = time.monotonic()
        printed = process.communicate()[1].strip().splitlines()
        shutil.rmtree(self.folder, ignore_errors=True)
        if process.returncode == 0:
            logger.info("pushed to %s in %.0f s: %s", self.repo_id, time.monotonic() - started, message)
        elif self._given_up:
            return
        elif process.returncode < 0:
            self._failed(f"it was ended after {time.monotonic() - started:.0f} s")
        else:
            self._failed(printed[-1] if printed else f"exit status {process.returncode}")

    def _failed(self, reason: str) -> None:
        logger.warning("not pushed to %s%s: %s", self.repo_id, self._consequence, reason.removeprefix("error: "))


def main(arguments: list[str]) -> None:
    """What the process of an upload does: FOLDER REPO MESSAGE [--private]."""
    from looc_ldm.errors import one_line_errors
    from looc_ldm.hub import push

    folder, repo_id, message, *private = arguments
    with one_line_errors():
        push(Path(folder), repo_id, private=bool(private) or None, commit_message=message)


if __name__ == "__main__":
    main(sys.argv[1:])
