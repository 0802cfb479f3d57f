"""DINOv2 and CLIP as feature networks, through transformers: by hub id or from a local folder, safetensors only."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from looc_ldm.metrics.networks import as_rgb, in_float32

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINOV2_SIZE = 224  # pixels, of the image that the network sees
POSITION_OFFSET = 0.1  # patches
# Entries of a config that do not change the features.
VOLATILE_KEYS = ("_commit_hash", "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class _TransformersFeatures:
    """Base class of both networks; `looc_ldm.metrics.extractors` describes the methods."""

    model: str | Path
    kind: ClassVar[str]  # transformers' model_type
    dim_setting: ClassVar[str]  # name in the config

    @property
    def name(self) -> str:
        """The last part of the id or folder, such as "dinov2-large"."""
        folder = Path(self.model)
        return folder.resolve().name if folder.is_dir() else folder.name

    @property
    def dim(self) -> int:
        return _read_config(str(self.model), self.kind)[self.dim_setting]

    def identity(self) -> dict[str, str]:
        """Return the network, its hub id or folder, and the SHA-256 of weights and config. May download the model."""
        model = str(self.model)
        config = {key: value for key, value in _read_config(model, self.kind).items() if key not in VOLATILE_KEYS}
        return {
            "network": self.kind,
            "weights": model,
            "sha256": _hash_weights(model, self.kind),
            # The weights do not show heads and activations.
            "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        }


@dataclass(frozen=True)
class DINOv2Features(_TransformersFeatures):
    """The class token of DINOv2 after the last norm: the features of FD-DINOv2 (Stein et al. 2023).

    Images are resized to 224x224 with an antialiased bicubic filter, not cropped, and normalized by ImageNet's
    statistics. Positions are interpolated as the model's authors do it, which differs slightly from transformers.

    Args:
        model (`str` or `Path`, defaults to `"facebook/dinov2-large"`): Hub id, or folder with `config.json` and
            safetensors as transformers saves a DINOv2. Published figures use the default.
    """

    model: str | Path = "facebook/dinov2-large"
    kind: ClassVar[str] = "dinov2"
    dim_setting: ClassVar[str] = "hidden_size"

    def load(self, device: torch.device | str) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
        """Return the function of images to "features" `(B, dim)`."""
        network = _load(str(self.model), self.kind)
        _interpolate_positions(network, DINOV2_SIZE // network.config.patch_size)
        network = network.to(device)

        @torch.no_grad()
        def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
            with in_float32(device):
                pixels = _normalized(as_rgb(images).to(device), DINOV2_SIZE, IMAGENET_MEAN, IMAGENET_STD)
                return {"features": network(pixel_values=pixels).last_hidden_state[:, 0]}

        return features


@dataclass(frozen=True)
class CLIPFeatures(_TransformersFeatures):
    """The image embedding of CLIP, projected and of length 1: the features of CMMD (Jayasumana et al. 2024).

    Images are resized to the square the model was trained on with an antialiased bicubic filter, not cropped. (The
    publication's script crops images that are not square to the square in their centre; to compare, do so before.)

    Args:
        model (`str` or `Path`, defaults to `"openai/clip-vit-large-patch14-336"`): Hub id, or folder with
            `config.json` and safetensors as transformers saves a CLIP. Published figures use the default.
    """

    model: str | Path = "openai/clip-vit-large-patch14-336"
    kind: ClassVar[str] = "clip"
    dim_setting: ClassVar[str] = "projection_dim"

    def load(self, device: torch.device | str) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
        """Return the function of images to "features" `(B, dim)`."""
        network = _load(str(self.model), self.kind).to(device)
        size = network.config.vision_config.image_size

        @torch.no_grad()
        def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
            with in_float32(device):
                pixels = _normalized(as_rgb(images).to(device), size, CLIP_MEAN, CLIP_STD)
                seen = network.vision_model(pixel_values=pixels).pooler_output
                return {"features": F.normalize(network.visual_projection(seen), dim=1)}

        return features


def _normalized(images: torch.Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Resize uint8 `(B, 3, H, W)` to float32 `(B, 3, size, size)` as Pillow's bicubic filter does, and normalize.

    The published figures use Pillow: first along the width, then the height, with 8-bit numbers in between.
    """
    x = images.float()
    for shape in ((x.shape[-2], size), (size, size)):
        if x.shape[-2:] != shape:
            x = F.interpolate(x, shape, mode="bicubic", antialias=True).clamp(0, 255).round()
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (mean, std))
    return (x / 255 - mean) / std


def _interpolate_positions(network: nn.Module, side: int) -> None:
    """Interpolate a DINOv2's position embeddings to side x side patches, once.

    facebookresearch/dinov2, and with it published figures, adds an offset to the factor; transformers does not, and
    leaves embeddings of the right size alone.
    """
    stored = network.embeddings.position_embeddings  # (1, 1 + M * M, D)
    class_token, patches = stored[:, :1], stored[:, 1:]
    stored_side = math.isqrt(patches.shape[1])
    if stored_side == side:
        return
    grid = patches.unflatten(1, (stored_side, stored_side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(side + POSITION_OFFSET) / stored_side, mode="bicubic")
    positions = torch.cat([class_token, grid.flatten(2).transpose(1, 2)], dim=1)
    network.embeddings.position_embeddings = nn.Parameter(positions, requires_grad=False)


def _load(model: str, kind: str) -> nn.Module:
    """Return the model on the CPU, in float32 and eval mode. Raises ValueError for pickles and missing weights, too."""
    from transformers import AutoModel

    _read_config(model, kind)
    try:
        network, found = AutoModel.from_pretrained(
            model, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # each library has its own errors for damaged files
        raise _cannot_load(model, kind, error) from error
    if missing := sorted(found["missing_keys"]):  # transformers would fill them at random, and only warn
        raise ValueError(f"{model!r} does not hold {missing[0]} of a {kind} model.")
    return network.eval().requires_grad_(False)


def _read_config(model: str, kind: str) -> dict:
    """Return the stored config of a model of this kind. Raises ValueError for anything else."""
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(model)
    except (OSError, ValueError) as error:
        raise _cannot_load(model, kind, error) from error
    found = config.get("model_type")
    if found != kind:
        raise ValueError(
            f"{model!r} is not a {kind} model: its config.json must have model_type {kind!r}, got {found!r}."
        )
    return config


def _cannot_load(model: str, kind: str, error: Exception) -> ValueError:
    message = f"{model!r} cannot be loaded as a {kind} model; give a hub id, or a folder with config.json and"
    return ValueError(f"{message} safetensors: {' '.join(str(error).split())[:200]}")


@cache
def _hash_weights(model: str, kind: str) -> str:
    """Return the SHA-256 of names and float32 values of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_load(model, kind).state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
