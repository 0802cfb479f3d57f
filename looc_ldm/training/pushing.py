"""Upload models to the hub during training. Each upload runs in a separate process, which can be killed if it hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from looc_ldm.hub.upload import push
from looc_ldm.utils.errors import one_line_errors

WAIT_AT_END_SECONDS = 300


class Pusher:
    """Upload folders to a repository `user/name`, one at a time. A failed upload prints its own error line."""

    def __init__(self, repo_id: str, private: bool):
        self.repo_id, self.private = repo_id, private
        self._process: subprocess.Popen | None = None

    @property
    def busy(self) -> bool:
        """Whether an upload is under way."""
        return self._process is not None and self._process.poll() is None

    def push(self, folder: Path, message: str) -> None:
        """Start to upload a folder, which must not change until the upload ends. Kills an earlier upload."""
        self.wait(0)
        command = [sys.executable, "-m", __name__, str(folder), self.repo_id, message, *["private"] * self.private]
        environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)  # Ctrl-C is for the trainer

    def wait(self, seconds: float = WAIT_AT_END_SECONDS) -> bool:
        """Wait up to `seconds` for the running upload, then kill it; return whether it succeeded."""
        if self._process is None:
            return True
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self._process.kill()
        return self._process.wait() == 0


if __name__ == "__main__":
    folder, repo_id, message, *private = sys.argv[1:]
    with one_line_errors():
        push(folder, repo_id, private=bool(private) or None, commit_message=message)
