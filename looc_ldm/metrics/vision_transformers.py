"""DINOv2 and CLIP as feature networks, through transformers: by hub id or from a local folder, safetensors only."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from looc_ldm.metrics.float32 import in_float32
from looc_ldm.metrics.weights import weights_identity

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINOV2_SIZE = 224  # pixels, of the image that the network sees
POSITION_OFFSET = 0.1  # patches
CONVERTER = "SFconvertbot"  # of the hub
NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")  # in a config


@dataclass(frozen=True)
class _OfTransformers:
    """What both networks are alike in."""

    model: str | Path
    kind: ClassVar[str]  # transformers' model_type
    dim_setting: ClassVar[str]  # of the config

    @property
    def name(self) -> str:
        """The last part of the id or folder, such as "dinov2-large"."""
        folder = Path(self.model)
        return folder.resolve().name if folder.is_dir() else folder.name

    @property
    def dim(self) -> int:
        """The number of features; reads the config."""
        return _check_folder(self.model, _folder(self.model), self.kind)[self.dim_setting]

    def check(self) -> None:
        """Fail now rather than after hours of sampling. Downloads the model if need be.

        Raises:
            FileNotFoundError: No such folder.
            ValueError: Another kind of model, or not all of its weights are there, as safetensors.
            ConnectionError: The model could not be downloaded.
        """
        _load(self.model, self.kind)

    def identity(self) -> dict[str, str]:
        """Network, hub id or folder, and the SHA-256 of safetensors and config. Downloads the model if need be."""
        folder = _folder(self.model)
        config = _check_folder(self.model, folder, self.kind)
        config = {name: value for name, value in config.items() if name not in NOT_OF_THE_MODEL}
        return {
            "network": self.kind,
            "weights": str(self.model),
            "sha256": weights_identity(folder.glob("*.safetensors")),
            # Heads and activations show in no weight.
            "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        }


@dataclass(frozen=True)
class DINOv2Features(_OfTransformers):
    """The class token of DINOv2 after the last norm: the features of FD-DINOv2 (Stein et al. 2023).

    Images are brought to 224x224 with an antialiased bicubic filter, not cut, and normalized by ImageNet's statistics;
    positions are interpolated as the model's makers do it, which is a little off from what transformers does.

    Args:
        model (`str` or `Path`, defaults to `"facebook/dinov2-large"`): Hub id, or folder with `config.json` and
            safetensors as transformers saves a DINOv2. Published figures use the default.
    """

    model: str | Path = "facebook/dinov2-large"
    kind: ClassVar[str] = "dinov2"
    dim_setting: ClassVar[str] = "hidden_size"

    def load(self, device: torch.device | str) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
        """The network: uint8 `(B, 1 or 3, H, W)` to "features" `(B, dim)`. Raises what `check` raises."""
        network = _load(self.model, self.kind)
        _interpolate_positions(network, DINOV2_SIZE // network.config.patch_size)
        network = network.to(device)

        @torch.no_grad()
        def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
            with in_float32(device):
                pixels = _normalized(as_rgb(images).to(device), DINOV2_SIZE, IMAGENET_MEAN, IMAGENET_STD)
                return {"features": network(pixel_values=pixels).last_hidden_state[:, 0]}

        return features


@dataclass(frozen=True)
class CLIPFeatures(_OfTransformers):
    """The image embedding of CLIP, projected and of length 1: the features of CMMD (Jayasumana et al. 2024).

    Images are brought to the square the model was made for with an antialiased bicubic filter, and not cut. (The
    publication's script cuts images that are not square to the square in their centre; do so before, to compare.)

    Args:
        model (`str` or `Path`, defaults to `"openai/clip-vit-large-patch14-336"`): Hub id, or folder with
            `config.json` and safetensors as transformers saves a CLIP. Published figures use the default.
    """

    model: str | Path = "openai/clip-vit-large-patch14-336"
    kind: ClassVar[str] = "clip"
    dim_setting: ClassVar[str] = "projection_dim"

    def load(self, device: torch.device | str) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
        """The network: uint8 `(B, 1 or 3, H, W)` to "features" `(B, dim)`. Raises what `check` raises."""
        network = _load(self.model, self.kind).to(device)
        size = network.config.vision_config.image_size

        @torch.no_grad()
        def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
            with in_float32(device):
                pixels = _normalized(as_rgb(images).to(device), size, CLIP_MEAN, CLIP_STD)
                seen = network.vision_model(pixel_values=pixels).pooler_output
                return {"features": F.normalize(network.visual_projection(seen), dim=1)}

        return features


def as_rgb(images: torch.Tensor) -> torch.Tensor:
    """uint8 `(B, 1 or 3, H, W)` as `(B, 3, H, W)`. Raises ValueError for anything else."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            "images must be uint8 tensors of shape (batch, 1 or 3, height, width), "
            f"got {images.dtype} of shape {tuple(images.shape)}."
        )
    return images.expand(-1, 3, -1, -1)


def _normalized(images: torch.Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 `(B, 3, H, W)` to float32 `(B, 3, size, size)`, resized as Pillow's bicubic filter does it.

    Which the published figures go through: first along the width, then the height, with 8-bit numbers in between.
    """
    x = images.float()
    for shape in ((x.shape[-2], size), (size, size)):
        if x.shape[-2:] != shape:
            x = F.interpolate(x, shape, mode="bicubic", antialias=True).clamp(0, 255).round()
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (mean, std))
    return (x / 255 - mean) / std


def _interpolate_positions(network: nn.Module, side: int) -> None:
    """Bring a DINOv2's position embeddings to side x side patches, once.

    With the offset to the factor that facebookresearch/dinov2 interpolates by, and with which the features of published
    figures were computed; transformers interpolates to the size itself, and leaves alone what has that size.
    """
    stored = network.embeddings.position_embeddings  # (1, 1 + M * M, D)
    of_class, of_patches = stored[:, :1], stored[:, 1:]
    stored_side = math.isqrt(of_patches.shape[1])
    if stored_side == side:
        return
    grid = of_patches.unflatten(1, (stored_side, stored_side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(side + POSITION_OFFSET) / stored_side, mode="bicubic")
    positions = torch.cat([of_class, grid.flatten(2).transpose(1, 2)], dim=1)
    network.embeddings.position_embeddings = nn.Parameter(positions, requires_grad=False)


def _load(model: str | Path, kind: str) -> nn.Module:
    """The model on the CPU, in float32 and eval mode. Errors as in `DINOv2Features.check`."""
    from transformers import AutoModel

    folder = _folder(model)
    _check_folder(model, folder, kind)
    try:
        with _no_progress_bar():
            network, found = AutoModel.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # of damaged files each library has its own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{str(model)!r} cannot be loaded as a {kind} model: {reason}") from error
    if missing := sorted(found["missing_keys"]):  # transformers would fill them at random, and only warn
        raise ValueError(f"{str(model)!r} does not hold {missing[0]} of a {kind} model.")
    return network.eval().requires_grad_(False)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Of transformers, which has one for reading a file."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_folder(model: str | Path, folder: Path, kind: str) -> dict:
    """The config of a model of this kind; ValueError where the folder holds no such model."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found != kind:
        what = "there is no config.json of transformers" if found is None else f"model_type is {found!r}"
        raise ValueError(f"{str(model)!r} is not a {kind} model: {what}.")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{str(model)!r} holds no safetensors; give a folder or hub id that does.")
    return config


def _folder(model: str | Path) -> Path:
    """The local folder itself, or that of the hub's model in the cache, downloaded if it is not there."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if Path(model).is_dir():
        return Path(model)
    try:
        validate_repo_id(str(model))
    except HFValidationError as error:
        raise FileNotFoundError(f"{str(model)!r} is neither a folder nor a hub id (user/name).") from error
    return _hub_folder(str(model))


@cache
def _hub_folder(model: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    from looc_ldm.hub_errors import explain

    # Of a repository that holds the weights for several frameworks, only what is needed.
    wanted = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        folder = Path(snapshot_download(model, allow_patterns=wanted))
        if any(folder.glob("*.safetensors")):
            return folder
        # Old repositories hold pickles, CLIP's for 336 pixels among them. The hub's converter proposes safetensors for
        # them; to get these is what transformers does, too.
        if (known := _cached_proposal(folder)) is not None:
            return known
        proposals = HfApi().get_repo_discussions(
            model, author=CONVERTER, discussion_type="pull_request", discussion_status="open"
        )
        proposal = next((proposal for proposal in proposals if "safetensors" in proposal.title), None)
        if proposal is None:
            return folder
        return Path(snapshot_download(model, revision=proposal.git_reference, allow_patterns=wanted))
    except Exception as error:  # the client wraps its own errors in several builtin ones
        reason = explain(error, model)
        if reason is None:
            raise
        raise ConnectionError(f"{reason.rstrip('.')}; or give the path of a folder that holds the model.") from error


def _cached_proposal(folder: Path) -> Path | None:
    """The folder of a proposed revision that was downloaded before, so that it is found without a network, too."""
    repository = folder.parent.parent
    for reference in sorted((repository / "refs" / "refs" / "pr").glob("*")):
        proposed = repository / "snapshots" / reference.read_text()
        if any(proposed.glob("*.safetensors")):
            return proposed
    return None
