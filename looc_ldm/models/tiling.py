"""Encode and decode in tiles, with the result of one pass over the whole image, up to rounding.

Layers at latent resolution, attention above all, run on the whole map, which is 1 / f**2 of the image. The blocks above
run stage by stage, in tiles that overlap by the receptive field of the stage's convolutions. The mean and variance of a
group norm belong to the whole image: for each norm of a stage, one pass over all tiles, up to that norm, measures them.
Memory holds a tile, the feature maps between two stages (half the resolution of the larger one) and the image. A stage
of n norms costs about n / 2 + 1 times its usual computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

# From a tile and the latents there (see `_latents_at`) to its part of the stage's result.
Compute = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@torch.no_grad()
def encode_in_tiles(encoder: Encoder, image: torch.Tensor, tile_size: int) -> torch.Tensor:
    """Return `encoder(image)`, for images `(B, C, H, W)`, in tiles of `tile_size` pixels on a side (even)."""
    _check_hooks(encoder, encoder.down_blocks)
    blocks = list(encoder.down_blocks)
    # The last block is at latent resolution.
    in_tiles = next((number for number, block in enumerate(blocks) if _has_attention(block)), len(blocks) - 1)
    sample = image
    for number, block in enumerate(blocks[:in_tiles]):

        def compute(tile: torch.Tensor, _: None, block=block, first=number == 0) -> torch.Tensor:
            tile = encoder.conv_in(tile) if first else tile
            return block.downsamplers[0](_before_resampling(block, tile, None))

        # The first convolution, two of each resnet, and one to the right of the downsampler's; must be even.
        halo = 2 * len(block.resnets) + 2
        sample = _run_stage(compute, sample, core=tile_size, halo=halo, scale=(1, 2))
    if in_tiles == 0:
        sample = encoder.conv_in(sample)
    for block in blocks[in_tiles:]:
        sample = block(sample)
    return encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(sample))))


@torch.no_grad()
def decode_in_tiles(
    decoder: Decoder, sample: torch.Tensor, latents: torch.Tensor | None, tile_size: int
) -> torch.Tensor:
    """Return `decoder(sample, latents)`, for samples `(B, C, h, w)`, in tiles of `tile_size` pixels on a side (even).

    `latents` `(B, n_q, h, w)` are the input of the norms of `norm_type="spatial"`, else None.
    """
    _check_hooks(decoder, decoder.up_blocks)
    blocks = list(decoder.up_blocks)
    # The first block is at latent resolution.
    whole = max((number for number, block in enumerate(blocks) if _has_attention(block)), default=0)
    sample = decoder.mid_block(decoder.conv_in(sample), latents)
    for block in blocks[:whole]:
        sample = block(sample, latents)
    sample = _before_resampling(blocks[whole], sample, latents)

    def finish(tile: torch.Tensor, latents: torch.Tensor | None) -> torch.Tensor:
        tile = decoder.conv_norm_out(tile) if latents is None else decoder.conv_norm_out(tile, latents)
        return decoder.conv_out(decoder.conv_act(tile))

    for below, block in zip(blocks[whole:-1], blocks[whole + 1 :], strict=True):

        def compute(tile: torch.Tensor, latents: torch.Tensor | None, below=below, block=block) -> torch.Tensor:
            tile = _before_resampling(block, below.upsamplers[0](tile), latents)
            return finish(tile, latents) if block is blocks[-1] else tile

        # The upsampler's convolution, two of each resnet, and the last: half as many pixels before upsampling.
        halo = (2 * len(block.resnets) + 2) // 2
        sample = _run_stage(compute, sample, core=tile_size // 2, halo=halo, scale=(2, 1), latents=latents)
    return sample if len(blocks) > whole + 1 else finish(sample, latents)


def _has_attention(block: nn.Module) -> bool:
    return bool(getattr(block, "attentions", None))


def _before_resampling(block: nn.Module, sample: torch.Tensor, latents: torch.Tensor | None) -> torch.Tensor:
    """Run a block of encoder or decoder without its downsampler or upsampler."""
    for number, resnet in enumerate(block.resnets):
        sample = resnet(sample, temb=latents)
        if _has_attention(block):
            sample = block.attentions[number](sample, temb=latents)
    return sample


def _check_hooks(part: Encoder | Decoder, blocks: nn.ModuleList) -> None:
    """Refuse hooks that load the weights of the part or of a block when it is called, as block-level offloading adds.

    A stage calls the layers of a block, not the block, so these hooks would not run.
    """
    hooks = [getattr(getattr(module, "_diffusers_hook", None), "hooks", ()) for module in (part, *blocks)]
    if any(hooks) or any(hasattr(module, "_hf_hook") for module in (part, *blocks)):
        raise RuntimeError(
            f"tiling does not work if whole blocks of the {type(part).__name__.lower()} are offloaded or spread over "
            'devices. Offload layer by layer (offload_type="leaf_level" or enable_sequential_cpu_offload) or the whole '
            "model (enable_model_cpu_offload), or call disable_tiling()."
        )


@dataclass
class _Tile:
    """The part of a stage's input that a tile reads, and its core, which only this tile writes.

    Both are (top, bottom, left, right).
    """

    read: tuple[int, int, int, int]
    core: tuple[int, int, int, int]

    def core_in(self, part: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the core of the tile's output, which has `scale` times the input's resolution."""
        top, bottom, left, right = (
            round((c - r) * scale) for c, r in zip(self.core, (self.read[0],) * 2 + (self.read[2],) * 2, strict=True)
        )
        return part[:, :, top:bottom, left:right]


def _tiles(height: int, width: int, core: int, halo: int) -> Iterator[_Tile]:
    for top in range(0, height, core):
        for left in range(0, width, core):
            bottom, right = min(top + core, height), min(left + core, width)
            read = (max(top - halo, 0), min(bottom + halo, height), max(left - halo, 0), min(right + halo, width))
            yield _Tile(read, (top, bottom, left, right))


def _run_stage(
    compute: Compute,
    sample: torch.Tensor,
    core: int,
    halo: int,
    scale: tuple[int, int],
    latents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `compute(sample, latents)`, in tiles: (B, C, H, W) -> (B, C', H * scale, W * scale), scale a fraction."""
    batch, _, height, width = sample.shape
    result, known = None, []
    while result is None:
        collected = _Moments()
        tiles = list(_tiles(height, width, core, halo))
        for tile in tqdm(tiles, f"stage of {width}x{height}", leave=False, delay=2, unit="tile"):
            top, bottom, left, right = tile.read
            at_tile = None if latents is None else _latents_at(latents, tile.read, height // latents.shape[2])
            try:
                with _GroupNorms(known, tile, collected):
                    part = compute(sample[:, :, top:bottom, left:right], at_tile)
            except _Measured:
                continue
            if result is None:
                size = (height * scale[0] // scale[1], width * scale[0] // scale[1])
                result = part.new_empty(batch, part.shape[1], *size)
            top, bottom, left, right = (edge * scale[0] // scale[1] for edge in tile.core)
            result[:, :, top:bottom, left:right] = tile.core_in(part, scale[0] / scale[1])
        if result is None:
            known.append(collected.mean_and_variance())
    return result


def _latents_at(latents: torch.Tensor, read: tuple[int, int, int, int], ratio: int) -> torch.Tensor:
    """Return the latents, enlarged by `ratio` to the nearest as a spatial norm does it, at a tile."""
    top, bottom, left, right = read
    rows = torch.arange(top, bottom, device=latents.device) // ratio
    columns = torch.arange(left, right, device=latents.device) // ratio
    return latents[:, :, rows][:, :, :, columns]


class _Measured(Exception):
    """Ends a pass over a tile once its share of the next norm's statistics is collected."""


class _Moments:
    """Mean and variance of each group, (B, G), merged from tiles as Chan, Golub and LeVeque do."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, groups: torch.Tensor) -> None:
        """Merge the values `(B, G, values)` of one tile."""
        variance, mean = torch.var_mean(groups.float(), dim=-1, correction=0)
        count = groups.shape[-1]
        total = self.count + count
        shift = mean - self.mean
        self.squares = self.squares + variance * count + shift.square() * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def mean_and_variance(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mean, self.squares / self.count


class _GroupNorms(TorchFunctionMode):
    """Group norms with the statistics of the whole map: uses the known ones, collects the next, and stops.

    A mode meets every group norm, also those inside spatial norms, and changes no module.
    """

    def __init__(self, known: list[tuple[torch.Tensor, torch.Tensor]], tile: _Tile, collected: _Moments):
        super().__init__()
        self.known, self.tile, self.collected = known, tile, collected
        self.met = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.group_norm:
            return func(*args, **(kwargs or {}))
        return self._normalize(*args, **(kwargs or {}))

    def _normalize(
        self,
        sample: torch.Tensor,
        num_groups: int,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        if self.met == len(self.known):
            core = self.tile.core_in(sample, sample.shape[2] / (self.tile.read[1] - self.tile.read[0]))
            self.collected.add(core.reshape(core.shape[0], num_groups, -1))
            raise _Measured
        mean, variance = self.known[self.met]
        self.met += 1
        in_group = sample.shape[1] // num_groups
        scale = (variance + eps).rsqrt().repeat_interleave(in_group, dim=1)  # (B, C)
        scale = scale if weight is None else scale * weight
        shift = -mean.repeat_interleave(in_group, dim=1) * scale
        shift = shift if bias is None else shift + bias
        return torch.addcmul(shift[:, :, None, None], sample, scale[:, :, None, None]).to(sample.dtype)
