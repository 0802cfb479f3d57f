"""A number that tells models apart: two models with one fingerprint give and take the same codes."""

from __future__ import annotations

import hashlib
import inspect
import json

import torch
from diffusers import ModelMixin

# Measured after the first stage is trained, for the second one. They leave codes and images as they are.
OF_THE_SECOND_STAGE = ("scaling_factor", "latents_mean", "latents_std")


def model_fingerprint(model: ModelMixin) -> str:
    """SHA-256 of all weights and of the config, as 64 hexadecimal digits.

    Of the config count the constructor's arguments that have another value than their default, without
    `scaling_factor`, `latents_mean` and `latents_std`: an argument that a later version adds, with a default that
    changes nothing, leaves the fingerprints of older models as they were. Of each tensor of the state dict count name,
    shape and values as little-endian float32 in row-major order, so that neither device nor memory format matter, nor
    whether the values are held in another dtype. Rounding the values to another dtype does matter: take the
    fingerprint of the weights as they were stored, before `model.to(torch.bfloat16)`.
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
        if name not in model.config or name in OF_THE_SECOND_STAGE:
            continue
        # Tuples come back as lists from a stored config.
        value, default = (list(v) if isinstance(v, tuple) else v for v in (model.config[name], parameter.default))
        if value != default:
            settings[name] = value
    return settings
