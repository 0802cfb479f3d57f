"""Fingerprints of the networks in a model folder: evaluations note them, and the model card compares them."""

from __future__ import annotations

from pathlib import Path

from looc_ldm.models.fingerprint import model_fingerprint
from looc_ldm.models.loading import load_autoencoder, load_network


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
    networks = {"vqvae": load_autoencoder(str(folder))}
    if generation:
        networks["unet"] = load_network(folder / "unet")
        if (folder / "class_embedding").is_dir():
            networks["class_embedding"] = load_network(folder / "class_embedding")
    return {name: model_fingerprint(network) for name, network in networks.items()}
