"""Cache features of reference images on disk, so that a data set of a million images is read once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from looc_ldm.files import make_folder, renamed_when_complete
from looc_ldm.metrics.collect import Features
from looc_ldm.metrics.frechet import FeatureMoments

logger = logging.getLogger(__name__)

PREFIX = "moments."  # of the names of tensors that belong to moments


def default_cache_folder() -> Path:
    """Return $LOOC_LDM_CACHE, or looc_ldm in $XDG_CACHE_HOME, or in ~/.cache."""
    if folder := os.environ.get("LOOC_LDM_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "looc_ldm")


class ReferenceCache:
    """A folder with one safetensors file for each key.

    Args:
        folder (`Path`, *optional*): Made when the first file is written. None keeps nothing and finds nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def load(self, key: dict) -> Features | None:
        """Return the features that were saved under an equal key, on the CPU; None if there are none.

        Args:
            key (`dict`): Everything the features depend on, ready for JSON: fingerprint of the data, transform, the
                network's identity. The order of its entries does not matter.

        A damaged file is named in a warning of the log, and counts as missing.
        """
        file = self.file(key)
        if file is None or not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                if (stored.metadata() or {}).get("key") != _canonical(key):
                    raise ValueError("it was saved under another key")
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            moments = {name.removeprefix(PREFIX): x for name, x in tensors.items() if name.startswith(PREFIX)}
            return Features(
                moments=FeatureMoments.from_tensors(moments),
                rows=tensors.get("rows"),
                logits=None,
                count=int(tensors["count"]),
            )
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            logger.warning("%s is damaged (%s): the features are computed anew.", file, reason)
            return None

    def save(self, key: dict, features: Features) -> None:
        """Store features, without logits, under a key; a file of this key is replaced when the new one is complete.

        With many processes only the first one saves: the others have no rows.

        Raises:
            UserError: The folder cannot be made or written to.
        """
        file = self.file(key)
        if file is None:
            return
        tensors = {f"{PREFIX}{name}": x for name, x in features.moments.tensors().items()}
        if features.rows is not None:
            tensors["rows"] = features.rows
        tensors["count"] = torch.tensor(features.count)
        make_folder(self.folder)
        # The process is in the name: two runs may compute the same reference at a time.
        with renamed_when_complete(file, file.with_name(f".{file.name}.{os.getpid()}.partial")) as partial:
            try:
                save_file({name: x.contiguous() for name, x in tensors.items()}, partial, {"key": _canonical(key)})
            except SafetensorError as error:  # for instance, a full disk
                raise OSError(str(error)) from error

    def file(self, key: dict) -> Path | None:
        """Return the path of the features of this key; None without a folder."""
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(_canonical(key).encode()).hexdigest()}.safetensors"


def _canonical(key: dict) -> str:
    """Return text that is equal for equal keys."""
    return json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
