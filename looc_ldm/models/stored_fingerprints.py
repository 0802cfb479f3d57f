"""Fingerprints of the networks in a model folder: evaluations note them, and the model card compares them."""

from __future__ import annotations

from pathlib import Path

import diffusers

import looc_ldm
from looc_ldm.models.fingerprint import model_fingerprint
from looc_ldm.models.loading import load_autoencoder
from looc_ldm.utils.errors import ModelError
from looc_ldm.utils.files import read_json


def stored_fingerprints(folder: Path, generation: bool = False) -> dict[str, str]:
    """Return `model_fingerprint` of the plain weights in a model folder, by component, as they are stored.

    Args:
        folder (`Path`): A saved pipeline or autoencoder.
        generation (`bool`): Include all networks of a pipeline, not only its first stage.

    Returns:
        `dict`: "vqvae", also for an autoencoder; with `generation` also "unet" and, if there is one,
        "class_embedding".

    Raises:
        ModelError: A network is missing or cannot be loaded.
    """
    fingerprints = {"vqvae": model_fingerprint(load_autoencoder(str(folder)))}
    if generation:
        index = read_json(folder / "model_index.json")
        names = ["unet", *(["class_embedding"] if (index.get("class_embedding") or [None])[0] else [])]
        fingerprints |= {name: model_fingerprint(_network(folder, name, index.get(name))) for name in names}
    return fingerprints


def _network(folder: Path, name: str, entry: list[str] | None):
    library, kind = entry or (None, None)
    network = getattr({"diffusers": diffusers, "looc_ldm": looc_ldm}.get(library), str(kind), None)
    if network is None:
        raise ModelError(f"{str(folder)!r}: its model_index.json names {entry} as {name}, which cannot be loaded.")
    try:
        return network.from_pretrained(folder / name, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"cannot load {str(folder / name)!r}: {' '.join(str(error).split())[:400]}") from error
