"""Read other projects' checkpoints without running code from them, and load their weights under our names."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file

from looc_ldm.utils.errors import ModelError, one_line

Tensors = dict[str, torch.Tensor]
# Pairs of a pattern and its replacement, applied to a key one after the other, as `re.sub` does.
Rules = Sequence[tuple[str, str | Callable[[re.Match], str]]]

# Attention of one head in taming's and LDM's code, once its module has our name.
ATTENTION_RULES: Rules = (
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def read_checkpoint(file: Path) -> Tensors:
    """Read a `.safetensors` file or a PyTorch pickle: a state dict, or a Lightning checkpoint with one.

    Pickles are read with `weights_only=True`, so that nothing in them can run.

    Raises:
        ModelError: The file is missing, in a different format, or a pickle of more than tensors and plain containers.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # the error that follows says more
            # Memory-mapped if the format allows it: optimizer states are then never read.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ModelError(
            f"{str(file)!r} is refused: it is neither safetensors nor a pickle of only tensors and plain containers "
            f"({found[1] if found else 'unknown format'}), and reading any other pickle can run any code. If you trust "
            "it, save only its weights where it was trained: "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = "it ends too early" if isinstance(error, EOFError) else one_line(error, file)[:300]
        raise ModelError(f"cannot read {str(file)!r}: {reason}.") from error
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


def numbered(tensors: Tensors, module: str) -> int:
    """Return the length of a list of modules: 1 + the highest number after `module.`, or 0."""
    found = (re.match(rf"{re.escape(module)}\.(\d+)\.", key) for key in tensors)
    return max((1 + int(match[1]) for match in found if match), default=0)


def without_ema(tensors: Tensors) -> Tensors:
    """Return the tensors without averages."""
    return {key: tensor for key, tensor in tensors.items() if not key.startswith("model_ema.")}


def with_ema(tensors: Tensors, module: str = "") -> tuple[Tensors, int | None]:
    """Replace weights by their averages, if there are any.

    LDM's `LitEma` (CompVis/latent-diffusion, ldm/modules/ema.py) keeps the average of `module.a.b` in the buffer
    `model_ema.ab`: the name inside the module without its dots.

    Returns:
        The tensors, and the number of updates of the average: -1 if unknown, None without an average.
    """
    averages = under(tensors, "model_ema.")
    if not averages.keys() - {"decay", "num_updates"}:
        return tensors, None
    updates = averages.pop("num_updates", torch.tensor(-1))
    if updates.ndim:
        raise ModelError(f"mis-shaped: model_ema.num_updates is {tuple(updates.shape)} instead of a number.")
    averages.pop("decay", None)
    result = without_ema(tensors)
    for key in result:
        if key.startswith(module):
            result[key] = averages.pop(key.removeprefix(module).replace(".", ""), result[key])
    # The rest is reported as unexpected, unless it is ignored.
    return result | {f"model_ema.{name}": tensor for name, tensor in averages.items()}, int(updates)


def shape_of(tensors: Tensors, key: str, dimensions: int = 4) -> tuple[int, ...]:
    """Return the shape of a weight. Raise ModelError unless it has N dimensions, none of size 0."""
    if key not in tensors:
        raise ModelError(f"the checkpoint is not complete: missing {key}.")
    shape = tuple(tensors[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ModelError(f"mis-shaped: {key} is {shape} instead of {dimensions} dimensions, none of size 0.")
    return shape


def load_renamed(model: nn.Module, tensors: Tensors, rules: Rules) -> None:
    """Load all tensors, under the names that the rules give, into a model on the meta device, which keeps its dtypes.

    Raises:
        ModelError: Weights are missing (by our name), unexpected or mis-shaped; names the first of each and counts the
            others.
    """
    theirs = {}
    for key in tensors:
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        theirs[name] = key
    expected = model.state_dict()
    state, wrong = {}, []
    for name in theirs.keys() & expected.keys():
        tensor, parameter = tensors[theirs[name]], expected[name]
        shape = tuple(tensor.shape)
        if set(shape[parameter.ndim :]) == {1}:
            tensor = tensor.reshape(shape[: parameter.ndim])  # a 1x1 convolution as a layer
        if tensor.shape != parameter.shape:
            wrong.append(f"{theirs[name]} is {shape} instead of {tuple(parameter.shape)}")
        # A copy: parts of one tensor must not share memory, and a mapped file must not be needed.
        state[name] = tensor.to(parameter.dtype, copy=True).contiguous()
    problems = {
        "missing": [name for name in expected if name not in theirs],
        "unexpected": [key for name, key in theirs.items() if name not in expected],
        "mis-shaped:": wrong,
    }
    found = [f"{problem} {names[0]} and {len(names) - 1} more" for problem, names in problems.items() if names]
    if found:
        raise ModelError(f"the weights do not fit a {type(model).__name__}: {'; '.join(found)}.")
    model.load_state_dict(state, assign=True)
    model.eval()
