"""Load a first stage, with errors that say what is wrong with the folder or repository."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import looc_ldm
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.registration import AUTOENCODERS
from looc_ldm.models.starter import STARTER
from looc_ldm.utils.errors import ModelError


def load_autoencoder(name: str, dtype: torch.dtype = torch.float32, revision: str | None = None) -> LooCVQModel:
    """Return the `LooCVQModel` in a folder or hub repository (its own, or a pipeline's), from safetensors only.

    A plain `VQModel` is returned as a `LooCVQModel` that quantizes as it did.

    What comes from the hub is verified (`utils.hub_download`). The quantizer stays float32 whatever the `dtype`.

    Raises:
        ModelError: Nothing is there, it is another kind of model, the weights do not fit the config, or what the hub
            objects to.
    """
    folder = model_folder(name, revision, component="vqvae")
    if (folder / "model_index.json").is_file():
        folder = folder / "vqvae"
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"no model in {str(folder)!r}: it holds no config.json.")
    try:
        kind = json.loads(config.read_text()).get("_class_name")
    except (ValueError, AttributeError):
        raise ModelError(f"{str(config)!r} is not the JSON of a model's config.") from None
    if kind not in (*AUTOENCODERS, "VQModel"):
        raise ModelError(f"{str(folder)!r} holds a {kind}, not a {' or '.join(AUTOENCODERS)}.")
    try:
        model, report = getattr(looc_ldm, kind if kind in AUTOENCODERS else "LooCVQModel").from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # whatever a constructor raises, values in the config are the reason
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot load {name!r}: {reason[:400]}") from error
    missing = {*report["missing_keys"]} - ({"quantize.usage"} if kind == "VQModel" else set())
    wrong = [*missing, *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise ModelError(f"the weights in {name!r} do not fit its config: {wrong[0]} and {len(wrong) - 1} more differ.")
    return model.eval()


def model_folder(name: str, revision: str | None = None, component: str | None = None, kind: str = "model") -> Path:
    """The folder that `name` is, that of the starter model, or one with the hub repository `name`, downloaded.

    Raises:
        ModelError: Neither, or what the hub objects to.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if name == "starter":
        return STARTER
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ModelError(f"no {kind} {name!r}: neither a folder nor a hub id (user/name) nor 'starter'.")
    from looc_ldm.utils.hub_download import download

    try:
        return download(name, revision, component=component)
    except ModelError as error:
        if error.__cause__ is None:
            raise
        raise ModelError(f"{error} There is no folder {name!r} either.") from error  # perhaps one was meant
