"""Upload checkpoints to the hub while training goes on.

Each upload is a process: the hub's client may wait for ever for a silent network, and a thread cannot be ended.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from looc_ldm.hub.upload import push
from looc_ldm.utils.errors import one_line_errors

WAIT_AT_END_SECONDS = 300

logger = logging.getLogger(__name__)


class Pusher:
    """Upload folders, one at a time. Only `push_result` and `finish` wait for the network.

    Args:
        folder (`Path`): Holds the snapshot that is being uploaded; removed afterwards.
        repo_id (`str`): "user/name".
        private (`bool`): Whether a new repository is private.
    """

    def __init__(self, folder: Path, repo_id: str, private: bool):
        self.folder, self.repo_id, self.private = folder, repo_id, private
        self._process: subprocess.Popen | None = None
        self._message = ""
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed

    def push_snapshot(self, save: Callable[[Path], Path], message: str) -> None:
        """Save a snapshot and begin to upload it; do nothing while another upload is under way.

        Args:
            save: Writes the snapshot into the folder it is given; returns which part of it is to be uploaded.
            message: Of the commit.
        """
        if self._process is not None and self._process.poll() is None:
            logger.info("not pushed to %s, because the last upload still runs: %s", self.repo_id, message)
            return
        self.finish()
        self.folder.mkdir(parents=True)
        self._begin(save(self.folder), message)

    def push_result(self, folder: Path, message: str, seconds: float = WAIT_AT_END_SECONDS) -> None:
        """Upload the finished model and wait for it. An upload under way is ended."""
        self.finish(seconds=0)
        self._begin(folder, message)
        logger.info("waiting for the upload to %s, at most %.0f s", self.repo_id, seconds)
        if not self.finish(seconds):
            logger.warning("try again with `looc-ldm push %s %s`", folder, self.repo_id)

    def finish(self, seconds: float = WAIT_AT_END_SECONDS) -> bool:
        """Wait for the upload under way, end it after `seconds`, and log the outcome. Return whether it succeeded."""
        if self._process is None:
            return True
        process, self._process = self._process, None
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:  # after Ctrl-C, too
            process.kill()
            printed = process.communicate()[1].strip() or "the upload was ended before it was complete"
            shutil.rmtree(self.folder, ignore_errors=True)
        if process.returncode == 0:
            logger.info("pushed to %s: %s", self.repo_id, self._message)
        else:
            logger.warning("not pushed to %s: %s: %s", self.repo_id, self._message, printed.splitlines()[-1])
        return process.returncode == 0

    def _begin(self, folder: Path, message: str) -> None:
        """Begin to upload a folder, which must stay as it is until the upload has ended."""
        self._message = message
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), self.repo_id, message, *["private"] * self.private],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            start_new_session=True,  # Ctrl-C is for the trainer
        )


if __name__ == "__main__":
    folder, repo_id, message, *private = sys.argv[1:]
    with one_line_errors():
        push(folder, repo_id, private=bool(private) or None, commit_message=message)
