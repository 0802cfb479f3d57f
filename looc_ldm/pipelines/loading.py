"""Load a pipeline, with errors that name the fault of the folder or repository."""

from __future__ import annotations

import torch
from diffusers.utils import logging as diffusers_logging

from looc_ldm.models.loading import load_network, model_folder
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.utils.errors import ModelError, one_line
from looc_ldm.utils.files import read_json


def load_pipeline(name: str, dtype: torch.dtype = torch.float32) -> LooCLDMPipeline:
    """Return the pipeline in a folder or hub repository, from safetensors only.

    Raises:
        ModelError: There is no model, it is of a different kind, or the hub raises an error.
    """
    folder = model_folder(name, kind="pipeline")
    if not (folder / "model_index.json").is_file():
        hint = ""
        if (folder / "pipeline" / "model_index.json").is_file():
            hint = f" Give {str(folder / 'pipeline')!r}."
        elif (folder / "config.json").is_file():
            hint = " It is a model by itself, not a pipeline."
        raise ModelError(f"no pipeline in {name!r}: it holds no model_index.json.{hint}")
    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()  # for loading a handful of files
    try:
        # diffusers alone would take networks that lack weights.
        networks = {
            component: load_network(folder / component, dtype)
            for component, entry in read_json(folder / "model_index.json").items()
            if isinstance(entry, list) and (folder / component / "config.json").is_file()
        }
        return LooCLDMPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, **networks)
    except ModelError:
        raise
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError, KeyError) as error:
        raise ModelError(f"cannot load {name!r}: {one_line(error)[:400]}") from error
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()
