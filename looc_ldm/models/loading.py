"""Load networks. Errors say what is wrong with the folder or repository."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin

import looc_ldm
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.fingerprint import model_fingerprint
from looc_ldm.models.registration import AUTOENCODERS, COMPONENTS
from looc_ldm.models.starter import bundled_models, starter_model
from looc_ldm.utils.errors import ModelError, one_line
from looc_ldm.utils.files import read_json


def load_autoencoder(name: str) -> LooCVQModel:
    """Return the `LooCVQModel` in a folder or hub repository (its own, or a pipeline's), from safetensors only.

    A plain `VQModel` is returned as a `LooCVQModel` with the same quantization.

    Downloads are verified (`looc_ldm.utils.hub_download`).

    Raises:
        ModelError: There is no model, it is of a different kind, the weights do not fit the config, or the hub
            raises an error.
    """
    folder = model_folder(name, component="vqvae")
    if (folder / "model_index.json").is_file():
        folder = folder / "vqvae"
    kind = _class_name(folder)
    if kind not in (*AUTOENCODERS, "VQModel"):
        raise ModelError(f"{str(folder)!r} holds a {kind}, not a {' or '.join(AUTOENCODERS)}.")
    return load_network(folder, kind=LooCVQModel if kind == "VQModel" else None).eval()


def load_network(folder: Path, dtype: torch.dtype = torch.float32, kind: type[ModelMixin] | None = None) -> ModelMixin:
    """Return the network in a folder, from safetensors only. `kind` replaces the class that its config names.

    Raises:
        ModelError: The folder has no network, or the weights do not fit the config.
    """
    name = _class_name(folder)
    kind = kind or getattr(looc_ldm if name in COMPONENTS else diffusers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, ModelMixin):
        raise ModelError(f"{str(folder)!r} holds a {name}, which cannot be loaded as a network.")
    try:
        model, report = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # the constructor raises anything if the config has wrong values
        raise ModelError(f"cannot load {str(folder)!r}: {one_line(error)[:400]}") from error
    missing = {*report["missing_keys"]} - ({"quantize.usage"} if name == "VQModel" else set())
    wrong = [*missing, *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise ModelError(
            f"the weights in {str(folder)!r} do not fit its config: {wrong[0]} and {len(wrong) - 1} more differ."
        )
    return model


def training_record(model: LooCVQModel) -> dict:
    """Return the training.json of the first stage's folder, or of its pipeline's folder; {} if there is none."""
    folder = model.config.get("_name_or_path")
    for place in (Path(folder), Path(folder).parent) if folder else ():
        if (place / "training.json").is_file():
            return read_json(place / "training.json")
    return {}


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


def _class_name(folder: Path) -> str | None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"no model in {str(folder)!r}: it holds no config.json.")
    return read_json(folder / "config.json").get("_class_name")


def is_bundled(name: str) -> bool:
    """Whether a name means a bundled model. A folder of that name comes first if it holds a model."""
    return name in ("starter", *bundled_models()) and not holds_model(Path(name))


def holds_model(folder: Path) -> bool:
    """Whether a folder is a saved model or pipeline, or the output of a training."""
    marks = ("model_index.json", "config.json", "pipeline", "vqvae", "config.yaml", "plan.json")
    return any((folder / mark).exists() for mark in marks)


def model_folder(name: str, component: str | None = None, kind: str = "model") -> Path:
    """Return the folder of the bundled model `name`, the folder `name`, or that of the downloaded hub repository.

    Raises:
        ModelError: None of them exists, or the hub raises an error.
    """
    folder = Path(name)
    if is_bundled(name):
        return Path(starter_model(None if name == "starter" else name))
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        bundled = ", ".join(["starter", *bundled_models()])
        raise ModelError(f"no {kind} {name!r}: neither bundled ({bundled}), a folder, nor a hub id (user/name).")
    from looc_ldm.utils.hub_download import download

    try:
        return download(name, component)
    except ModelError as error:
        if error.__cause__ is None:
            raise
        raise ModelError(f"{error} There is no folder {name!r} either.") from error  # the user may have meant a folder
