"""Fingerprints of models: two models with the same fingerprint write and read the same codes."""

from __future__ import annotations

import hashlib
import inspect
import json

import torch
from diffusers import ModelMixin

# Measured for the second stage, after the first is trained. They do not change codes or images.
SECOND_STAGE_SETTINGS = ("scaling_factor", "latents_mean", "latents_std")


def model_fingerprint(model: ModelMixin) -> str:
    """Return the SHA-256 of all weights and of the config, as 64 hexadecimal digits.

    The config enters with the arguments that differ from their defaults, without `scaling_factor`, `latents_mean` and
    `latents_std`, so that a later version may add arguments. Each tensor of the state dict enters with its name, its
    shape, and its values as little-endian float32 in row-major order, so that device, memory format and dtype do not
    matter. Rounding does: take the fingerprint of the stored weights, before `model.to(torch.bfloat16)`.
    """
    digest = hashlib.sha256(json.dumps(_settings(model), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(values.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _settings(model: ModelMixin) -> dict:
    settings = {}
    for name, parameter in inspect.signature(type(model).__init__).parameters.items():
        if name not in model.config or name in SECOND_STAGE_SETTINGS:
            continue
        # Tuples come back as lists from a stored config.
        value, default = (list(v) if isinstance(v, tuple) else v for v in (model.config[name], parameter.default))
        if value != default:
            settings[name] = value
    return settings
