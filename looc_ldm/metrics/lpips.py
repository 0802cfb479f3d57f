"""LPIPS (Zhang et al. 2018): distance of two images in the features of VGG16 or AlexNet, by the package lpips."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn as nn
from diffusers.models.model_loading_utils import load_state_dict

from looc_ldm.metrics.networks import downloaded_weights, file_sha256
from looc_ldm.utils.errors import one_line

NETWORKS = ("vgg", "alex")
SMALLEST = {"vgg": 16, "alex": 31}  # pixels: the last layers of smaller images have no pixels


class LPIPS(nn.Module):
    """Frozen network that compares images. See `load_lpips`."""

    def __init__(self, network: nn.Module, smallest: int):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.smallest = smallest

    def forward(self, first: torch.Tensor, second: torch.Tensor, autocast: bool = False) -> torch.Tensor:
        """Return the distances of RGB images `(B, 3, H, W)` in [-1, 1], `(B, 1, 1, 1)` float32, at least 0.

        Args:
            autocast (`bool`): Compute in the precision of the surrounding autocast, for a loss: twice as fast in
                bfloat16. Otherwise in float32 whatever surrounds it, for a figure.

        Raises:
            ValueError: Images smaller than the network can see.
        """
        height, width = first.shape[-2:]
        if min(height, width) < self.smallest:
            raise ValueError(
                f"this LPIPS network needs images of at least {self.smallest}x{self.smallest}, got {height}x{width}."
            )
        kind = first.device.type
        with torch.autocast(kind, enabled=autocast and torch.is_autocast_enabled(kind)):
            return self.network(first.float(), second.float()).float()


def load_lpips(network: str, weights: Path | None = None) -> LPIPS:
    """Return LPIPS version 0.1 for images in [-1, 1], on the CPU.

    Args:
        network (`str`): `"vgg"` or `"alex"`.
        weights (`Path`, *optional*): Local file with the network's convolutions under torchvision's names
            (`features.0.weight`, ...), .safetensors or .pth. Without it, torchvision downloads them once (528 MB,
            233 MB). The linear heads come with the package.

    Raises:
        ValueError: An unknown network, or a file of a different network.
        FileNotFoundError: No such file.
        ConnectionError: No file was given, and the weights could not be downloaded.
    """
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {network!r}.")
    if weights is None:
        try:
            model = _lpips(network)
        except (OSError, RuntimeError) as error:  # RuntimeError: a download that does not have its checksum
            raise ConnectionError(
                f"The weights of LPIPS' {network} could not be downloaded ({one_line(error)})."
            ) from error
    else:
        model = _lpips(network, pnet_rand=True)
        _fill_convolutions(model.net, weights)
    return LPIPS(model, SMALLEST[network]).eval()


def lpips_identity(network: str, weights: Path | None = None) -> dict[str, str]:
    """Return network, weights and their SHA-256, for the record of a figure. Downloads the weights if need be."""
    if weights is None:
        weights = downloaded_weights(weights_url(network), lambda: load_lpips(network))
    return {"network": f"lpips-{network}", "weights": str(weights), "sha256": file_sha256(weights)}


def weights_url(network: str) -> str:
    """Return the address of torchvision's file of a network's weights."""
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    return {"vgg": VGG16_Weights, "alex": AlexNet_Weights}[network].IMAGENET1K_V1.url


def _lpips(network: str, **settings) -> nn.Module:
    import lpips

    with warnings.catch_warnings():  # lpips asks torchvision for the network in a deprecated way
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        return lpips.LPIPS(net=network, verbose=False, **settings)


def _fill_convolutions(network: nn.Module, file: Path) -> None:
    """Copy torchvision's `features.N.weight` into lpips' slices, whose layers keep the number N as their name."""
    try:
        stored = dict(load_state_dict(file))  # safetensors, or a pickle of nothing but tensors
    except FileNotFoundError:
        raise
    except Exception as error:  # pickles of other things, and files that are no pickles, fail in many ways
        raise ValueError(f"{str(file)!r} is not a file of weights: {one_line(error)}") from error
    layers = {
        name: layer
        for slice_ in network.children()
        if isinstance(slice_, nn.Sequential)
        for name, layer in slice_.named_children()
        if isinstance(layer, nn.Conv2d)
    }
    for number, layer in layers.items():
        for kind in ("weight", "bias"):
            value, target = stored.get(f"features.{number}.{kind}"), getattr(layer, kind).data
            if value is None or value.shape != target.shape:
                raise ValueError(f"{str(file)!r} does not hold features.{number}.{kind} of this network.")
            target.copy_(value)
