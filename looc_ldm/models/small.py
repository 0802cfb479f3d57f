"""`LooCSmallVQModel`: the VQ-VAE of the papers' tables on MNIST, Fashion-MNIST and CIFAR-10."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config

from looc_ldm.models.autoencoder import LooCVQModel


class LooCSmallVQModel(LooCVQModel):
    """A small convolutional VQ autoencoder, f = 4, with a LooC quantizer: the papers' network for small images.

    It has the methods of `LooCVQModel`, but no norms, no attention, no gradient checkpointing and no tiling. With the
    defaults it has, without the codebook, 744,707 parameters (740,609
    for images of one channel; with `vq_embed_dim=64`, CVQ-VAE's, 662,723 and 658,625).

    Args:
        in_channels (`int`, defaults to 3): Channels of the input image.
        out_channels (`int`, defaults to 3): Channels of the output image.
        hidden_channels (`int`, defaults to 128): Channels at a quarter of the resolution; half as many at half of it.
        residual_channels (`int`, defaults to 32): Channels inside a residual layer.
        layers_per_block (`int`, defaults to 2): Residual layers of the encoder, and of the decoder.
        sample_size (`int`, defaults to 32): Side of the images in pixels; a hint for pipelines, not a limit.
        num_vq_embeddings (`int`, defaults to 256): K, codevectors in the codebook.
        vq_embed_dim (`int`, *optional*): n_q, channels of the latents; `hidden_channels` if not given.
        scaling_factor (`float`, *optional*): As in `LooCVQModel`.
        norm_type (`str`, defaults to `"group"`): For readers of `LooCVQModel` configs; nothing is normalized
            here, and `"spatial"` is refused.
        codevector_dim, interpolation_factor, segment_layout, distance, commitment_weight: As in `LooCVQModel`.
        anchor, usage_decay, codebook_update, gradient, latents_mean, latents_std: As in `LooCVQModel`.

    Raises:
        ValueError: `hidden_channels` is not even, a `norm_type` other than `"group"`, or sizes that do not fit
            together, see `LooCVQModel`.

    Example:

    ```py
    >>> import torch
    >>> from looc_ldm import LooCSmallVQModel
    >>> model = LooCSmallVQModel(num_vq_embeddings=256, codevector_dim=4, interpolation_factor=1)
    >>> model.encode(torch.rand(1, 3, 32, 32) * 2 - 1).latents.shape
    torch.Size([1, 128, 8, 8])
    ```
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["_ResidualLayer", "LooCQuantizer"]
    _repeated_blocks = ["_ResidualLayer"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        hidden_channels: int = 128,
        residual_channels: int = 32,
        layers_per_block: int = 2,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        vq_embed_dim: int | None = None,
        scaling_factor: float | None = None,
        norm_type: str = "group",
        codevector_dim: int | None = None,
        interpolation_factor: int = 2,
        segment_layout: str = "channel",
        distance: str = "euclidean",
        commitment_weight: float = 0.25,
        anchor: str = "closest",
        usage_decay: float = 0.99,
        codebook_update: str = "ema",
        gradient: str = "rotation",
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ):
        if hidden_channels < 2 or hidden_channels % 2:
            raise ValueError(f"hidden_channels must be a positive even number, got {hidden_channels!r}.")
        if norm_type != "group":
            raise ValueError(f'norm_type must be "group", since this network normalizes nothing, got {norm_type!r}.')
        ModelMixin.__init__(self)  # not LooCVQModel's, which makes the networks of diffusers' VQModel
        vq_embed_dim = vq_embed_dim if vq_embed_dim is not None else hidden_channels
        self.encoder = _Encoder(in_channels, hidden_channels, residual_channels, layers_per_block)
        self.quant_conv = nn.Conv2d(hidden_channels, vq_embed_dim, 1)
        self._make_quantizer(vq_embed_dim)
        self.post_quant_conv = nn.Identity()
        self.decoder = _Decoder(vq_embed_dim, hidden_channels, residual_channels, layers_per_block, out_channels)

    @property
    def downsampling_factor(self) -> int:
        """f, the ratio of the image's side to the latents' side: two convolutions of stride 2."""
        return 4


class _Encoder(nn.Module):
    """Images `(B, in_channels, H, W)` to features `(B, hidden, H / 4, W / 4)`."""

    def __init__(self, in_channels: int, hidden: int, residual: int, layers: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, hidden // 2, 4, stride=2, padding=1)
        self.conv_down = nn.Conv2d(hidden // 2, hidden, 4, stride=2, padding=1)
        self.conv_out = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.layers = nn.ModuleList([_ResidualLayer(hidden, residual) for _ in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv_in(x))  # (B, hidden / 2, H / 2, W / 2)
        x = F.relu(self.conv_down(x))
        x = self.conv_out(x)
        for layer in self.layers:
            x = layer(x)
        return F.relu(x)


class _Decoder(nn.Module):
    """Quantized latents `(B, n_q, h, w)` to images `(B, out_channels, 4 h, 4 w)`."""

    def __init__(self, vq_embed_dim: int, hidden: int, residual: int, layers: int, out_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(vq_embed_dim, hidden, 3, padding=1)
        self.layers = nn.ModuleList([_ResidualLayer(hidden, residual) for _ in range(layers)])
        self.conv_up = nn.ConvTranspose2d(hidden, hidden // 2, 4, stride=2, padding=1)
        self.conv_out = nn.ConvTranspose2d(hidden // 2, out_channels, 4, stride=2, padding=1)

    def forward(self, z: torch.Tensor, spatial: None = None) -> torch.Tensor:
        """Decode; `spatial` is for the signature of diffusers' decoder and not used."""
        x = self.conv_in(z)
        for layer in self.layers:
            x = layer(x)
        x = F.relu(self.conv_up(F.relu(x)))  # (B, hidden / 2, 2 h, 2 w)
        return self.conv_out(x)


class _ResidualLayer(nn.Module):
    """r + f(r) with r = relu(x): the sum takes the rectified input.

    In both papers' code the layer's first activation works in place. Weights trained there need it.
    """

    def __init__(self, channels: int, residual: int):
        super().__init__()
        self.conv_1 = nn.Conv2d(channels, residual, 3, padding=1)
        self.conv_2 = nn.Conv2d(residual, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(x)
        return x + self.conv_2(F.relu(self.conv_1(x)))
