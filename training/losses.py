"""Terms of the autoencoder's loss: LPIPS, the PatchGAN, and the weight between them (VQGAN, taming-transformers)."""

from __future__ import annotations

import math
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from looc_ldm.errors import ConfigError


class PatchDiscriminator(nn.Module):
    """PatchGAN: a logit for each patch of an image, 70x70 pixels with three strided layers.

    Group norm instead of the original's batch norm: with it, the logit of an image does not depend on the other images
    of its batch, and several processes need not agree on statistics.

    Args:
        in_channels (`int`): Channels of the image.
        channels (`int`): Channels of the first layer; doubled by each strided layer, up to 8 times.
        num_layers (`int`): Strided layers.
    """

    def __init__(self, in_channels: int, channels: int = 64, num_layers: int = 3):
        super().__init__()
        layers = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, num_layers + 1):
            previous, width = width, channels * min(2**i, 8)
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(previous, width, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(math.gcd(32, width), width),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, C, H, W)` images in [-1, 1] to `(B, 1, h, w)` logits, positive where a patch looks real."""
        return self.layers(images)


def hinge_discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """(mean relu(1 - D(x)) + mean relu(1 + D(x'))) / 2, a scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_adversarial_weight(
    reconstruction_loss: torch.Tensor, generator_loss: torch.Tensor, last_layer: torch.Tensor
) -> torch.Tensor:
    """The ratio of the two losses' gradient norms at the decoder's last layer, at most 1e4; detached, float32."""
    (reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (adversarial,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    return (reconstruction.float().norm() / (adversarial.float().norm() + 1e-4)).clamp(0, 1e4).detach()


def load_lpips(network: str, weights: str | None) -> nn.Module:
    """LPIPS on images in [-1, 1], frozen.

    Args:
        network (`str`): `"vgg"` or `"alex"`.
        weights (`str`, *optional*): Local file with the network's convolutions under torchvision's names
            (`features.0.weight`, ...), .safetensors or .pth. Without it, torchvision downloads them.

    Raises:
        ConfigError: The file is missing or is not of this network; or there is none and no network to load it from.
    """
    import lpips

    if weights is None:
        try:
            model = lpips.LPIPS(net=network, verbose=False)
        except OSError as error:
            raise ConfigError(f"cannot download LPIPS' {network} ({error}); give loss.lpips_weights, a file.") from None
    else:
        model = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
        _fill_convolutions(model.net, _read_weights(weights), weights)
    return model.eval().requires_grad_(False)


def _read_weights(file: str) -> dict[str, torch.Tensor]:
    if not Path(file).is_file():
        raise ConfigError(f"loss.lpips_weights={file!r}: no such file.")
    try:
        if file.endswith(".safetensors"):
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"loss.lpips_weights={file!r} is not a file of weights: {reason}") from None


def _fill_convolutions(network: nn.Module, stored: dict[str, torch.Tensor], file: str) -> None:
    """Copy torchvision's `features.N.weight` into lpips' slices, whose layers keep the number N as their name."""
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
                raise ConfigError(
                    f"loss.lpips_weights={file!r} does not hold features.{number}.{kind} of this network."
                )
            target.copy_(value)
