"""The networks of other projects, rewritten under their key names: references for `tests/convert`.

Only the names are theirs (Visual-AI/LooC, lyndonzheng/CVQ-VAE, CompVis/taming-transformers, CompVis/latent-diffusion).
`small_vqvae`, `vqgan` and `unet` build tiny ones with random weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock

# Small VQ-VAE ---------------------------------------------------------------------------------------------------------


class Codebook(nn.Module):
    """The quantizers of all four projects. `interpolation_factor` and `distance` as LooC's code has them."""

    def __init__(self, size: int, channels: int, usage: bool, distance: str = "l2", scale: int = 1):
        super().__init__()
        self.embedding = nn.Embedding(size, channels)
        if usage:
            self.register_buffer("embed_prob", torch.rand(size))
        self.distance, self.scale = distance, scale

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        s, codebook = self.scale, self.embedding.weight
        if s > 1:
            z = F.pixel_unshuffle(F.interpolate(z, scale_factor=s, mode="bilinear"), s)
        last = z.permute(0, 2, 3, 1)
        rows = last.reshape(-1, codebook.shape[1])
        if self.distance == "l2":
            codes = torch.cdist(rows, codebook).argmin(1)
        else:
            codes = (F.normalize(rows, dim=1) @ F.normalize(codebook, dim=1).T).argmax(1)
        z = codebook[codes].view(last.shape).permute(0, 3, 1, 2)
        return F.avg_pool2d(F.pixel_shuffle(z, s), s) if s > 1 else z


class SmallStack(nn.Module):
    def __init__(self, channels: int, residual: int, layers: int):
        super().__init__()
        self._layers = nn.ModuleList()
        for _ in range(layers):
            layer = nn.Module()
            first, second = nn.Conv2d(channels, residual, 3, 1, 1), nn.Conv2d(residual, channels, 1)
            layer._block = nn.Sequential(nn.ReLU(inplace=True), first, nn.ReLU(inplace=True), second)
            self._layers.append(layer)

    def forward(self, x):
        for layer in self._layers:
            x = x.relu()  # theirs works in place: the sum sees it
            x = x + layer._block(x)
        return F.relu(x)


class SmallVQVAE(nn.Module):
    def __init__(self, channels: int, hidden: int, residual: int, layers: int, latent: int, quantizer: Codebook):
        super().__init__()
        self._encoder = nn.Module()
        self._encoder._conv_1 = nn.Conv2d(channels, hidden // 2, 4, 2, 1)
        self._encoder._conv_2 = nn.Conv2d(hidden // 2, hidden, 4, 2, 1)
        self._encoder._conv_3 = nn.Conv2d(hidden, hidden, 3, 1, 1)
        self._encoder._residual_stack = SmallStack(hidden, residual, layers)
        self._pre_vq_conv = nn.Conv2d(hidden, latent, 1)
        self._vq_vae = quantizer
        self._decoder = nn.Module()
        self._decoder._conv_1 = nn.Conv2d(latent, hidden, 3, 1, 1)
        self._decoder._residual_stack = SmallStack(hidden, residual, layers)
        self._decoder._conv_trans_1 = nn.ConvTranspose2d(hidden, hidden // 2, 4, 2, 1)
        self._decoder._conv_trans_2 = nn.ConvTranspose2d(hidden // 2, channels, 4, 2, 1)

    def encode(self, x):
        x = F.relu(self._encoder._conv_2(F.relu(self._encoder._conv_1(x))))
        return self._pre_vq_conv(self._encoder._residual_stack(self._encoder._conv_3(x)))

    def decode(self, z):
        z = self._decoder._residual_stack(self._decoder._conv_1(self._vq_vae(z)))
        return self._decoder._conv_trans_2(F.relu(self._decoder._conv_trans_1(z)))


# VQGAN ----------------------------------------------------------------------------------------------------------------


class VQGANBlock(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(32, channels, eps=1e-6) for channels in (before, after))
        self.conv1, self.conv2 = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class VQGANAttention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # (B, C, n)
        weights = (q.mT @ k / math.sqrt(q.shape[1])).softmax(-1)  # (B, queries, keys)
        return x + self.proj_out((v @ weights.mT).view_as(x))


class Resample(nn.Module):
    def __init__(self, channels: int, down: bool):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if down else nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        # Downwards they pad right and below only.
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2))


def _middle(channels: int, attention: bool) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = VQGANBlock(channels, channels)
    mid.attn_1 = VQGANAttention(channels) if attention else nn.Identity()
    mid.block_2 = VQGANBlock(channels, channels)
    return mid


def _level(before: int, after: int, layers: int, attention: bool) -> nn.Module:
    level = nn.Module()
    level.block = nn.ModuleList([VQGANBlock(after if i else before, after) for i in range(layers)])
    level.attn = nn.ModuleList([VQGANAttention(after) for _ in range(layers if attention else 0)])
    return level


def _run(level: nn.Module, x):
    for i, block in enumerate(level.block):
        x = block(x)
        if len(level.attn):
            x = level.attn[i](x)
    return x


class Half(nn.Module):
    """Encoder or decoder."""

    def __init__(self, ch: int, mult: tuple, layers: int, attention: tuple, ins: int, outs: int, down: bool, mid: bool):
        super().__init__()
        widths, levels = [ch * m for m in mult], nn.ModuleList()
        self.encodes = down
        self.conv_in = nn.Conv2d(ins, ch if down else widths[-1], 3, padding=1)
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)] if down else widths[min(i + 1, len(widths) - 1)]
            levels.append(_level(before, width, layers if down else layers + 1, attention[i]))
            if down and i < len(widths) - 1:
                levels[i].downsample = Resample(width, down=True)
            if not down and i > 0:
                levels[i].upsample = Resample(width, down=False)
        setattr(self, "down" if down else "up", levels)
        self.mid = _middle(widths[-1], mid)
        end = widths[-1] if down else widths[0]
        self.norm_out = nn.GroupNorm(32, end, eps=1e-6)
        self.conv_out = nn.Conv2d(end, outs, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        if self.encodes:
            for level in self.down:
                x = _run(level, x)
                x = level.downsample(x) if hasattr(level, "downsample") else x
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        if not self.encodes:
            for level in reversed(self.up):
                x = _run(level, x)
                x = level.upsample(x) if hasattr(level, "upsample") else x
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """Taming's VQModel. `attention` says which levels have it; the method names are of LDM's VQModelInterface."""

    def __init__(self, ch, mult, layers, attention, z_channels, latent, quantizer, mid_attention=True):
        super().__init__()
        self.encoder = Half(ch, mult, layers, attention, 3, z_channels, True, mid_attention)
        self.decoder = Half(ch, mult, layers, attention, z_channels, 3, False, mid_attention)
        self.quantize = quantizer
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z_channels, latent, 1), nn.Conv2d(latent, z_channels, 1)

    def encode(self, x):
        return self.quant_conv(self.encoder(x))

    def decode(self, z):
        return self.decoder(self.post_quant_conv(self.quantize(z)))


# LDM's UNet -----------------------------------------------------------------------------------------------------------


class UNetBlock(nn.Module):
    def __init__(self, before: int, after: int, embedding: int, scale_shift: bool, resample: str | None = None):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, after * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, after), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(after, after, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def _resampled(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2) if self.resample == "up" else x

    def forward(self, x, embedding):
        h = self.in_layers[2](self._resampled(F.silu(self.in_layers[0](x))))
        e = self.emb_layers(embedding)[..., None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return h + self.skip_connection(self._resampled(x))


class UNetAttention(nn.Module):
    """The fused projection is cut into heads, then each into query, key and value, or the other way round."""

    def __init__(self, channels: int, heads: int, by_head: bool):
        super().__init__()
        self.heads, self.by_head = heads, by_head
        self.norm = nn.GroupNorm(32, channels)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        if self.by_head:
            q, k, v = qkv.unflatten(1, (self.heads, 3, -1)).unbind(2)  # (B, heads, c, n)
        else:
            q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        h = v @ (q.mT @ k / math.sqrt(q.shape[2])).softmax(-1).mT
        return x + self.proj_out(h.flatten(1, 2)).view_as(x)


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, context: int, heads: int, depth: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        size = channels // heads
        blocks = [BasicTransformerBlock(channels, heads, size, cross_attention_dim=context) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)  # diffusers kept LDM's code and names

    def forward(self, x, context):
        h = self.proj_in(self.norm(x)).flatten(2).mT
        for block in self.transformer_blocks:
            h = block(h, encoder_hidden_states=context)
        return x + self.proj_out(h.mT.reshape(x.shape))


class UNetResample(nn.Module):
    def __init__(self, channels: int, down: bool):
        super().__init__()
        setattr(self, "op" if down else "conv", nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=1))

    def forward(self, x):
        return self.op(x) if hasattr(self, "op") else self.conv(F.interpolate(x, scale_factor=2))


class UNet(nn.Module):
    """LDM's UNetModel. Attention is where the downsampling rate is in `attention`."""

    def __init__(
        self,
        channels: int,
        width: int,
        mult: tuple,
        layers: int,
        attention: tuple,
        num_heads: int | None = None,
        num_head_channels: int | None = None,
        scale_shift: bool = False,
        in_blocks: bool = False,
        context: int | None = None,
        depth: int = 1,
        by_head: bool = True,
    ):
        super().__init__()
        self.width, time = width, 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))

        def attend(c: int) -> nn.Module:
            heads = num_heads or c // num_head_channels
            return SpatialTransformer(c, context, heads, depth) if context else UNetAttention(c, heads, by_head)

        def block(before: int, after: int, resample: str | None = None) -> nn.Module:
            return UNetBlock(before, after, time, scale_shift, resample)

        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(channels, width, 3, padding=1)])])
        skips, now = [width], width
        for level, m in enumerate(mult):
            for _ in range(layers):
                parts = [block(now, m * width)]
                now = m * width
                if 2**level in attention:
                    parts.append(attend(now))
                self.input_blocks.append(nn.ModuleList(parts))
                skips.append(now)
            if level < len(mult) - 1:
                self.input_blocks.append(
                    nn.ModuleList([block(now, now, "down") if in_blocks else UNetResample(now, down=True)])
                )
                skips.append(now)
        self.middle_block = nn.ModuleList([block(now, now), attend(now), block(now, now)])
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(layers + 1):
                parts = [block(now + skips.pop(), m * width)]
                now = m * width
                if 2**level in attention:
                    parts.append(attend(now))
                if level and i == layers:
                    parts.append(block(now, now, "up") if in_blocks else UNetResample(now, down=False))
                self.output_blocks.append(nn.ModuleList(parts))
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, channels, 3, padding=1))

    def forward(self, x, timesteps, context=None):
        half = self.width // 2
        angles = timesteps[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)  # float32, as theirs
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype))

        def run(parts: nn.ModuleList, x):
            for part in parts:
                if isinstance(part, UNetBlock):
                    x = part(x, embedding)
                else:
                    x = part(x, context) if isinstance(part, SpatialTransformer) else part(x)
            return x

        skips = []
        for parts in self.input_blocks:
            x = run(parts, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for parts in self.output_blocks:
            x = run(parts, torch.cat([x, skips.pop()], 1))
        return self.out(x)


# LatentDiffusion ------------------------------------------------------------------------------------------------------


def latent_diffusion(unet: nn.Module, vqgan: nn.Module, classes: nn.Embedding | None = None, **extra) -> dict:
    """A state dict of LDM's LatentDiffusion with the schedule of the LSUN bedrooms model."""
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    return {
        "betas": betas.float(),
        "alphas_cumprod": alphas.float(),
        "alphas_cumprod_prev": alphas.float(),
        "logvar": torch.zeros(1000),
        **{f"model.diffusion_model.{key}": value for key, value in unet.state_dict().items()},
        **{f"first_stage_model.{key}": value for key, value in vqgan.state_dict().items()},
        **({} if classes is None else {"cond_stage_model.embedding.weight": classes.weight.detach()}),
        **extra,
    }


# Tiny ones ------------------------------------------------------------------------------------------------------------


def small_vqvae(quantizer: Codebook | None = None, channels: int = 3, layers: int = 2, latent: int = 16) -> SmallVQVAE:
    quantizer = quantizer or Codebook(32, 4, usage=True, distance="cos")
    return _randomized(lambda: SmallVQVAE(channels, 16, 8, layers, latent, quantizer))


def vqgan(quantizer: Codebook | None = None, attention=(False, True), layers=1, latent=4, mid_attention=True) -> VQGAN:
    """Two levels, f = 2."""
    quantizer = quantizer or Codebook(64, latent, usage=False)
    return _randomized(lambda: VQGAN(32, (1, 2), layers, attention, 8, latent, quantizer, mid_attention))


def unet(channels: int = 4, mult: tuple = (1, 2), layers: int = 1, attention: tuple = (1, 2), **options) -> UNet:
    """Heads of 16 channels unless `num_heads` is given."""
    heads = {} if "num_heads" in options else {"num_head_channels": 16}
    return _randomized(lambda: UNet(channels, 32, mult, layers, attention, **{**heads, **options}))


def _randomized(make: Callable[[], nn.Module]) -> nn.Module:
    """Random weights everywhere, norms included, that keep activations of about unit size and let all inputs matter."""
    torch.manual_seed(0)
    model = make()
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1.0, std=0.1)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
            gain = 2.0 if "emb" in name else 1.0  # large for the time, which must not drown
            nn.init.normal_(module.weight, std=gain / math.sqrt(module.weight[0].numel()))
    return model.eval().requires_grad_(False)
