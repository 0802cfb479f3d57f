"""One training step of the VQGAN recipe in diffusers' examples (examples/vqgan, 0.42), rebuilt from its description.

What it does differently from our trainer: even batches train the autoencoder, odd ones the discriminator, and both run
the whole autoencoder; the perceptual term is the squared difference of VGG19 features at 224 pixels, whose own weights
get gradients that nobody uses; the discriminator has six strided layers with spectral and instance norm, ends in a
sigmoid, and is held by a gradient penalty; its quantizer searches with `torch.cdist`. Images are in [0, 1].
VGG19 has random weights here, which take as long as trained ones.
"""

from __future__ import annotations

import inspect
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import VQModel
from torch.nn.utils import clip_grad_norm_, spectral_norm
from torchvision.models import vgg19

VGG_SIDE = 224
VGG_LAYERS = 18  # up to the third pooling
VGG_MEAN, VGG_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PENALTY_WEIGHT = 10.0


def vq_model(arguments: dict, sample_size: int) -> VQModel:
    """diffusers' VQModel with the encoder, decoder, latent channels and codebook size of one of ours.

    A position is one code there: log2(K) bits.
    """
    known = set(inspect.signature(VQModel.__init__).parameters) - {"self", "scaling_factor"}
    return VQModel(sample_size=sample_size, **{name: value for name, value in arguments.items() if name in known})


def discriminator(in_channels: int) -> nn.Sequential:
    """Six convolutions of stride 2 from 64 to 512 channels, and one number in (0, 1) for each of what is left."""
    widths = [in_channels, 64, 128, 256, 512, 512, 512]
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(widths)):
        layers.append(spectral_norm(nn.Conv2d(before, after, 3, stride=2, padding=1)))
        layers += [nn.InstanceNorm2d(after)] if number else []
        layers.append(nn.LeakyReLU(0.2))
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1), nn.Sigmoid())


class VQGANRecipe:
    """Two networks, two optimizers and a batch of random images.

    Args:
        arguments (`dict`): Arguments of our model, of which diffusers' takes those it knows.
        resolution (`int`): Side of the images, at least 128: what the discriminator leaves needs an instance norm.
        batch_size (`int`): Images of a step.
        device (`str`): Where.
        dtype (`torch.dtype`, *optional*): Autocast to it; the recipe's default is float32.
    """

    def __init__(self, arguments: dict, resolution: int, batch_size: int, device: str, dtype: torch.dtype | None):
        self.model = vq_model(arguments, resolution).to(device).train()
        channels = self.model.config.in_channels
        self.critic = discriminator(channels).to(device)
        self.vgg = vgg19(weights=None).features[:VGG_LAYERS].to(device).eval()
        self.mean, self.std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (VGG_MEAN, VGG_STD))
        settings = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **settings)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), **settings)
        self.images = torch.rand(batch_size, channels, resolution, resolution, device=device)
        self.autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)
        self.steps = 0

    def step(self) -> None:
        """Train the autoencoder in even steps and the discriminator in odd ones."""
        trains_autoencoder = self.steps % 2 == 0
        self.steps += 1
        (self.optimizer if trains_autoencoder else self.critic_optimizer).zero_grad()
        with self.autocast:
            reconstruction, commit_loss = self.model(self.images, return_dict=False)
        reconstruction = reconstruction.float()
        if trains_autoencoder:
            self._step_of_autoencoder(reconstruction, commit_loss)
        else:
            self._step_of_discriminator(reconstruction.detach())

    def _step_of_autoencoder(self, reconstruction: torch.Tensor, commit_loss: torch.Tensor) -> None:
        perceptual_loss = F.mse_loss(self._features(self.images), self._features(reconstruction))
        adversarial_loss = -self._logits(reconstruction).mean()
        last = self.model.decoder.conv_out.weight
        norms = [
            torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (perceptual_loss, adversarial_loss)
        ]
        weight = (norms[0] / norms[1].clamp(min=1e-8)).clamp(max=1e4)
        loss = F.mse_loss(self.images, reconstruction) + commit_loss + perceptual_loss + weight * adversarial_loss
        loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def _step_of_discriminator(self, reconstruction: torch.Tensor) -> None:
        images = self.images.clone().requires_grad_()
        real, fake = self._logits(images), self._logits(reconstruction)
        loss = (F.relu(1 + fake) + F.relu(1 - real)).mean()
        (gradient,) = torch.autograd.grad(real.sum(), images, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        (loss + PENALTY_WEIGHT * penalty).backward()
        clip_grad_norm_(self.critic.parameters(), 1.0)
        self.critic_optimizer.step()

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        with self.autocast:
            rgb = images.expand(-1, 3, -1, -1)
            return self.vgg((F.interpolate(rgb, VGG_SIDE) - self.mean) / self.std).float()

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        with self.autocast:
            return self.critic(images).float()
