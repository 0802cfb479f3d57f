"""Of which model figures are: fingerprints of what a model folder holds, for evaluations and for the card."""

from __future__ import annotations

import json
from pathlib import Path

from looc_ldm.errors import ModelError


def stored_fingerprints(folder: Path, generation: bool = False) -> dict[str, str]:
    """`model_fingerprint` of the plain weights in a model folder, by component, as they are stored.

    Args:
        folder (`Path`): Of a pipeline or of an autoencoder.
        generation (`bool`): Of all networks of a pipeline, instead of its first stage only.

    Returns:
        `dict`: "vqvae", which an autoencoder is called too; with `generation` also "unet" and, where there is one,
        "class_embedding".

    Raises:
        ModelError: A network is missing or cannot be loaded.
    """
    from looc_ldm.fingerprint import model_fingerprint
    from looc_ldm.loading import load_autoencoder

    fingerprints = {"vqvae": model_fingerprint(load_autoencoder(str(folder)))}
    if generation:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        names = ["unet", *(["class_embedding"] if (index.get("class_embedding") or [None])[0] else [])]
        fingerprints |= {name: model_fingerprint(_network(folder, name, index.get(name))) for name in names}
    return fingerprints


def _network(folder: Path, name: str, entry: list[str] | None):
    import diffusers

    import looc_ldm

    library, kind = entry or (None, None)
    network = getattr({"diffusers": diffusers, "looc_ldm": looc_ldm}.get(library), str(kind), None)
    if network is None:
        raise ModelError(f"{str(folder)!r} names no {name} that figures could be told to be of, but {entry}.")
    try:
        return network.from_pretrained(folder / name, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"cannot load {str(folder / name)!r}: {' '.join(str(error).split())[:400]}") from error
