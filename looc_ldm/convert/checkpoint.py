"""Read other projects' checkpoints without running code from them, and load their weights under our names."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file

from looc_ldm.utils.errors import ModelError

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Fused:
    """Query, key or value as a part of a projection that makes all three.

    Args:
        module (`str`): The original module.
        part (`int`): 0, 1, 2 for query, key, value.
        groups (`int`): Number of (query, key, value) along the output channels: one per head, or one.
    """

    module: str
    part: int
    groups: int


# Maps our modules to the original ones. A single tensor goes by its whole key.
Sources = Mapping[str, str | Fused]


def read_checkpoint(file: Path) -> Tensors:
    """Read a `.safetensors` file or a PyTorch pickle: a state dict, or a Lightning checkpoint with one.

    Pickles are read with `weights_only=True`, so that nothing in them can run.

    Raises:
        ModelError: The file is missing, of another format, or a pickle of more than tensors and plain containers.
    """
    if not file.is_file():
        raise ModelError(f"no checkpoint {str(file)!r}: not a file.")
    if file.stat().st_size == 0:
        raise ModelError(f"cannot read {str(file)!r}: the file is empty.")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"cannot read {str(file)!r}: {' '.join(str(error).split())}") from error
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # the error that follows says more
            # Memory-mapped if the format allows it: optimizer states are then never read.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise ModelError(f"{str(file)!r} is neither safetensors nor a checkpoint of torch.save.") from error
        raise ModelError(
            f"{str(file)!r} is a pickle that holds more than tensors and plain containers ({found[1]}), and reading "
            "such a pickle can run any code: it is refused. If you trust it, save only its weights where it was "
            "trained: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ModelError(f"cannot read {str(file)!r}: {reason[:300] or type(error).__name__}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # Lightning
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"{str(file)!r} holds no state dict.")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ModelError(f"{str(file)!r} is not a state dict: its entry {key!r} is a {type(value).__name__}.")
    return dict(content)


def under(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors whose keys start with a prefix, without the prefix."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def numbered(tensors: Tensors, pattern: str) -> int:
    """Return the length of a list of modules: 1 + the highest number at the `#` of `pattern`, or 0."""
    matcher = re.compile(re.escape(pattern).replace(r"\#", r"(\d+)") + r"\.")
    return max((1 + int(found[1]) for found in map(matcher.match, tensors) if found), default=0)


def with_ema(tensors: Tensors, module: str = "") -> tuple[Tensors, int | None]:
    """Replace weights by their averages, if there are any.

    LDM's `LitEma` (CompVis/latent-diffusion, ldm/modules/ema.py) keeps the average of `module.a.b` in the buffer
    `model_ema.ab`: the name inside the module without its dots.

    Returns:
        The tensors, and the number of updates of the average: -1 if unknown, None without an average.
    """
    averages = under(tensors, "model_ema.")
    updates = averages.pop("num_updates", None)
    if not averages:
        return tensors, None
    averages.pop("decay", None)
    result, used = {}, set()
    for key, tensor in tensors.items():
        if key.startswith("model_ema."):
            continue
        name = key.removeprefix(module).replace(".", "") if key.startswith(module) else None
        if name in averages:
            used.add(name)
            tensor = averages[name]
        result[key] = tensor
    # What is left is reported as surplus, unless it is ignored.
    result.update({f"model_ema.{name}": tensor for name, tensor in averages.items() if name not in used})
    return result, -1 if updates is None else int(scalar(updates, "model_ema.num_updates"))


def need(tensors: Tensors, dimensions: Mapping[str, int], prefix: str = "") -> None:
    """Raise ModelError unless these weights exist, with this number of dimensions, none of size 0."""
    missing = [key for key in dimensions if key not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"the checkpoint is not complete: missing {prefix}{missing[0]}{more}.")
    for key, ndim in dimensions.items():
        shape = tuple(tensors[key].shape)
        if len(shape) != ndim or 0 in shape:
            raise ModelError(f"mis-shaped: {prefix}{key} is {shape} instead of {ndim} dimensions, none of size 0.")


def scalar(tensor: torch.Tensor, key: str) -> float:
    """Return the only number in a tensor. Raise ModelError if there is not exactly one."""
    if tensor.numel() != 1:
        raise ModelError(f"mis-shaped: {key} is {tuple(tensor.shape)} instead of one number.")
    return tensor.item()


def load_renamed(
    model: nn.Module, tensors: Tensors, sources: Sources, ignored: tuple[str, ...] = (), prefix: str = ""
) -> None:
    """Load tensors under other names into a model on the meta device. Every tensor must be used or ignored.

    Args:
        model (`nn.Module`): The model; it keeps its dtypes.
        tensors: The original weights.
        sources: The origin of each of our weights.
        ignored: Prefixes of original keys that are not needed.
        prefix: Prefix of the keys in the file, for errors.

    Raises:
        ModelError: Weights are missing, surplus or mis-shaped; names the first of each and counts the others.
    """
    state, used, missing, wrong = {}, set(), [], []
    for key, parameter in model.state_dict().items():
        source, theirs = _their_key(key, sources)
        if theirs not in tensors:
            missing.append(theirs)
            continue
        used.add(theirs)
        tensor = tensors[theirs]
        if isinstance(source, Fused):
            if tensor.ndim == 0 or tensor.numel() == 0 or len(tensor) % (3 * source.groups):
                wrong.append(f"{theirs} is {tuple(tensor.shape)} instead of three times {source.groups} heads")
                continue
            tensor = tensor.unflatten(0, (source.groups, 3, -1))[:, source.part].flatten(0, 1)
        shape = tuple(tensor.shape)
        if shape[: parameter.ndim] == parameter.shape and set(shape[parameter.ndim :]) == {1}:
            tensor = tensor.flatten(1) if parameter.ndim > 1 else tensor.flatten()  # a 1x1 convolution as a layer
        elif shape != parameter.shape:
            wrong.append(f"{theirs} is {shape} instead of {tuple(parameter.shape)}")
            continue
        # A copy: parts of one tensor must not share memory, and a mapped file must not be needed.
        state[key] = tensor.to(parameter.dtype, copy=True).contiguous()
    surplus = [key for key in tensors if key not in used and not key.startswith(ignored)]
    problems = [
        f"{what} {prefix}{found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
        for what, found in (("missing", sorted(set(missing))), ("surplus", surplus), ("mis-shaped:", wrong))
        if found
    ]
    if problems:
        raise ModelError(f"the weights do not fit a {type(model).__name__}: {'; '.join(problems)}.")
    model.load_state_dict(state, assign=True)
    model.eval()


def _their_key(key: str, sources: Sources) -> tuple[str | Fused, str]:
    if key in sources:
        return sources[key], sources[key]
    module, _, name = key.rpartition(".")
    source = sources[module]
    return source, f"{source.module if isinstance(source, Fused) else source}.{name}"
