"""Terms of the autoencoder's loss: LPIPS, the PatchGAN, and the weight between them (VQGAN, taming-transformers).

The networks here compute in float32 whatever autocast surrounds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from looc_ldm.metrics import lpips as metrics_lpips
from looc_ldm.metrics.lpips import LPIPS
from looc_ldm.utils.errors import ConfigError


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
        """Return float32 logits `(B, 1, h, w)` of images `(B, C, H, W)` in [-1, 1]: positive if a patch looks real."""
        with torch.autocast(images.device.type, enabled=False):
            return self.layers(images.float())


def hinge_discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Return (mean relu(1 - D(x)) + mean relu(1 + D(x'))) / 2, a scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_adversarial_weight(
    reconstruction_loss: torch.Tensor,
    generator_loss: torch.Tensor,
    last_layer: torch.Tensor,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the ratio of the two losses' gradient norms at the decoder's last layer, at most 1e4; detached, float32.

    Args:
        reduce (`Callable`, *optional*): Returns the mean of a tensor over all processes, which makes this a collective.
            The norm of the mean gradient is what one process would get for the whole batch; the mean of norms is not.
            With gradient accumulation, every forward pass has its own ratio.
    """
    gradients = torch.stack(
        [
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().flatten()
            for loss in (reconstruction_loss, generator_loss)
        ]
    )
    if reduce is not None:
        gradients = reduce(gradients)
    reconstruction, adversarial = gradients.norm(dim=1)
    return (reconstruction / (adversarial + 1e-4)).clamp(0, 1e4)


def load_lpips(network: str, weights: str | None) -> LPIPS:
    """Return `looc_ldm.metrics.lpips.load_lpips` for images in [-1, 1], frozen. Errors name the setting.

    Raises:
        ConfigError: The file is missing or is for a different network. Or no file is given and the download fails.
    """
    try:
        return metrics_lpips.load_lpips(network, None if weights is None else Path(weights))
    except ConnectionError as error:
        raise ConfigError(
            f"{error} Give --loss.lpips_weights FILE, a download of {metrics_lpips.weights_url(network)}, or train "
            "without this term: --loss.lpips_weight 0."
        ) from error
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"loss.lpips_weights: {error}") from error
