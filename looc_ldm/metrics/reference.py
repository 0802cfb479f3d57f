"""Cache features of reference images on disk, so that a data set of a million images is read once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from looc_ldm.metrics.collect import Features
from looc_ldm.metrics.frechet import FeatureMoments
from looc_ldm.utils.errors import UserError, one_line
from looc_ldm.utils.files import make_folder, renamed_when_complete

PREFIX = "moments."  # begins the names of tensors that belong to moments


def default_cache_folder() -> Path:
    """Return $LOOC_LDM_CACHE, or looc_ldm in $XDG_CACHE_HOME, or in ~/.cache."""
    if folder := os.environ.get("LOOC_LDM_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "looc_ldm")


class ReferenceCache:
    """A folder with one safetensors file for each key.

    A key is a `dict`, ready for JSON, of everything the features depend on: fingerprint of the data, transform, the
    network's identity. The order of its entries does not matter.

    Args:
        folder (`Path`, *optional*): Made when the first file is written. None keeps nothing and finds nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def load(self, key: dict) -> Features | None:
        """Return the features that were saved under an equal key, without logits; None if there are none.

        Raises:
            UserError: The file is damaged.
        """
        if self.folder is None or not self.file(key).is_file():
            return None
        try:
            tensors = load_file(self.file(key))
        except SafetensorError as error:
            raise UserError(f"cannot read {str(self.file(key))!r}: {one_line(error)}; delete it.") from error
        moments = {name.removeprefix(PREFIX): x for name, x in tensors.items() if name.startswith(PREFIX)}
        return Features(FeatureMoments.from_tensors(moments), tensors.get("rows"), logits=None)

    def save(self, key: dict, features: Features) -> None:
        """Store features, without logits, under a key; a file of this key is replaced when the new one is complete.

        Raises:
            UserError: The folder cannot be made or written to.
        """
        if self.folder is None:
            return
        tensors = {f"{PREFIX}{name}": x.contiguous() for name, x in features.moments.tensors().items()}
        if features.vectors is not None:
            tensors["rows"] = features.vectors.contiguous()
        make_folder(self.folder)
        file = self.file(key)
        # The process is in the name: two runs may compute the same reference at a time.
        with renamed_when_complete(file, file.with_name(f".{file.name}.{os.getpid()}.partial")) as partial:
            try:
                save_file(tensors, partial)
            except SafetensorError as error:  # for instance, a full disk
                raise OSError(str(error)) from error

    def file(self, key: dict) -> Path:
        """Return the path of the features of this key."""
        canonical = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return self.folder / f"{hashlib.sha256(canonical.encode()).hexdigest()}.safetensors"
