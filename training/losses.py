"""Terms of the autoencoder's loss: LPIPS, the PatchGAN, and the weight between them (VQGAN, taming-transformers).

The networks here compute in float32 whatever autocast surrounds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file

from looc_ldm.errors import ConfigError
from looc_ldm.training.config import LossConfig

LECAM_DECAY = 0.99  # of its moving averages, as its authors'


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
        """`(B, C, H, W)` images in [-1, 1] to `(B, 1, h, w)` float32 logits, positive where a patch looks real."""
        with torch.autocast(images.device.type, enabled=False):
            return self.layers(images.float())


def hinge_discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """(mean relu(1 - D(x)) + mean relu(1 + D(x'))) / 2, a scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


class LeCam(nn.Module):
    """LeCam regularization of a discriminator: mean(relu(D(x) - a_fake)^2) + mean(relu(a_real - D(x'))^2).

    Tseng et al. 2021, "Regularizing Generative Adversarial Networks under Limited Data"; the paper has the squares
    without relu, its authors' code and experiments are this. a_real and a_fake are moving averages of the mean logits
    of the steps before, free of the bias of a start at 0; in the first step there are none, and nothing is regularized.
    Forward passes only collect, so that accumulated ones are the same as one of the whole batch.

    Args:
        decay (`float`): Of the averages.

    Attributes:
        totals (`torch.Tensor` of shape `(2,)`), weight (`torch.Tensor` of shape `()`): a_real and a_fake are
            `totals / weight`. Buffers: saved and loaded with the module.
    """

    def __init__(self, decay: float = LECAM_DECAY):
        super().__init__()
        self.decay = decay
        self.register_buffer("totals", torch.zeros(2))
        self.register_buffer("weight", torch.zeros(()))
        self._collected: list[torch.Tensor] = []  # mean logits of each pass since the last step, (2,)

    def forward(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """The regularization of logits of any shape, a float32 scalar."""
        real, fake = real.float(), fake.float()
        self._collected.append(torch.stack([real.detach().mean(), fake.detach().mean()]))
        of_real, of_fake = self.totals / self.weight.clamp_min(torch.finfo(torch.float32).tiny)
        regularization = F.relu(real - of_fake).square().mean() + F.relu(of_real - fake).square().mean()
        return regularization * (self.weight > 0)

    @torch.no_grad()
    def update(self, accelerator: Accelerator) -> None:
        """After an optimizer step: take what was collected into the averages, of all processes. A collective."""
        means = accelerator.reduce(torch.stack(self._collected).mean(0), reduction="mean")
        self.totals.lerp_(means, 1 - self.decay)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - self.decay)
        self.discard()

    def discard(self) -> None:
        """Forget what was collected: for a step that is skipped."""
        self._collected = []


def adversarial_weight_at(loss: LossConfig, images_seen: int) -> float:
    """Weight of the PatchGAN term in the step that starts after `images_seen` images: 0, then a ramp, then in full."""
    since_start = images_seen - loss.adversarial_start_images
    if since_start < 0:
        return 0.0
    risen = min(1.0, since_start / loss.adversarial_ramp_images) if loss.adversarial_ramp_images else 1.0
    return loss.adversarial_weight * risen


def adaptive_adversarial_weight(
    reconstruction_loss: torch.Tensor,
    generator_loss: torch.Tensor,
    last_layer: torch.Tensor,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The ratio of the two losses' gradient norms at the decoder's last layer, at most 1e4; detached, float32.

    Args:
        reduce (`Callable`, *optional*): The mean of a tensor over all processes, which this then is a collective of:
            norms of mean gradients, unlike a mean of norms, are those that one process has for the whole batch. (With
            gradient accumulation the ratio is that of each forward pass.)
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


class Perceptual(nn.Module):
    """A network that compares images, frozen: LPIPS of two batches `(B, 3, H, W)` in [-1, 1], as `(B, 1, 1, 1)`."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The distances, float32."""
        with torch.autocast(first.device.type, enabled=False):
            return self.network(first.float(), second.float())


def load_lpips(network: str, weights: str | None) -> Perceptual:
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
    return Perceptual(model).eval()


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
