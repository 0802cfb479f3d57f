"""Loading a first stage with errors that say what is wrong with the folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from looc_ldm.autoencoder import LooCVQModel
from looc_ldm.errors import ModelError


def load_autoencoder(name: str, dtype: torch.dtype = torch.float32) -> LooCVQModel:
    """The `LooCVQModel` in a folder (its own, or a pipeline's) or on the hub, from safetensors only.

    Its quantizer stays float32 whatever the `dtype`.

    Raises:
        ModelError: Nothing is there, it is another kind of model, or the weights do not fit the config.
    """
    folder = Path(name)
    subfolder = None
    if folder.is_dir():
        if (folder / "model_index.json").is_file():
            subfolder = "vqvae"
            folder = folder / subfolder
        config = folder / "config.json"
        if not config.is_file():
            raise ModelError(f"no model in {str(folder)!r}: it holds no config.json.")
        try:
            kind = json.loads(config.read_text()).get("_class_name")
        except (ValueError, AttributeError):
            raise ModelError(f"{str(config)!r} is not the JSON of a model's config.") from None
        if kind != "LooCVQModel":
            raise ModelError(f"{str(folder)!r} holds a {kind}, not a LooCVQModel.")
    elif folder.is_absolute() or name.count("/") != 1:
        raise ModelError(f"no model {name!r}: neither a folder nor a hub id (user/name).")
    try:
        model, report = LooCVQModel.from_pretrained(
            name, subfolder=subfolder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:  # TypeError: a config with values of another type
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot load {name!r}: {reason[:400]}") from error
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise ModelError(f"the weights in {name!r} do not fit its config: {wrong[0]} and {len(wrong) - 1} more differ.")
    return model.eval()
