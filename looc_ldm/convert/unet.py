"""Convert LDM's UNet to `UNet2DModel`, `FixedHeadsUNet2DModel` or, with cross-attention, `UNet2DConditionModel`.

Key names are those of CompVis/latent-diffusion (ldm/modules/diffusionmodules/openaimodel.py, ldm/modules/attention.py).
diffusers' `convert_ldm_unet_checkpoint` is for cross-attention only: it has neither fused projections nor residual
blocks that resample, and ignores unknown keys. Hence our own table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from looc_ldm.convert.checkpoint import Fused, Sources, Tensors, load_renamed, need, numbered
from looc_ldm.convert.settings import Settings, require
from looc_ldm.models.unet import FixedHeadsUNet2DModel
from looc_ldm.utils.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """Architecture of a UNet, as far as its weights show it.

    Args:
        channels (`tuple[int]`): Channels of each resolution.
        layers (`int`): Residual blocks per resolution on the way down.
        attention (`tuple[bool]`): Whether a resolution has attention.
        resample_in_blocks (`bool`): Residual blocks change the resolution (`resblock_updown`), not convolutions.
        scale_shift (`bool`): The time embedding scales and shifts norms (`use_scale_shift_norm`).
        context (`int`, *optional*): Channels of the context of cross-attention; None without.
        depth (`int`): Transformer blocks per place with cross-attention.
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    layers: int
    attention: tuple[bool, ...]
    resample_in_blocks: bool
    scale_shift: bool
    context: int | None
    depth: int

    @property
    def levels(self) -> int:
        return len(self.channels)


def architecture_of(tensors: Tensors, prefix: str = "") -> Architecture:
    """Read the architecture off keys and shapes. Raise ModelError if this is not LDM's UNet."""
    outputs = numbered(tensors, "output_blocks.#")
    if outputs == 0:
        raise ModelError(f"the checkpoint is not complete: missing {prefix}output_blocks.")
    # The last block of a level also upsamples: by a convolution, or by a second residual block.
    by_convolution = [i for i in range(outputs) for j in (1, 2) if f"output_blocks.{i}.{j}.conv.weight" in tensors]
    by_block = [i for i in range(outputs) for j in (1, 2) if f"output_blocks.{i}.{j}.in_layers.0.weight" in tensors]
    ends = by_convolution or by_block
    per_level = ends[0] + 1 if ends else outputs
    levels, layers = outputs // per_level, per_level - 1
    # Input blocks: the first convolution, then per level `layers` blocks and one that halves the resolution.
    firsts = [f"input_blocks.{1 + level * per_level}" for level in range(levels)]
    transformer = "middle_block.1.transformer_blocks"
    convolutions = ["input_blocks.0.0.weight", "out.2.weight", *(f"{first}.0.out_layers.3.weight" for first in firsts)]
    need(tensors, dict.fromkeys(convolutions, 4), prefix)
    channels = tuple(tensors[f"{first}.0.out_layers.3.weight"].shape[0] for first in firsts)
    time, key = "input_blocks.1.0.emb_layers.1.weight", f"{transformer}.0.attn2.to_k.weight"
    need(tensors, {time: 2, **({key: 2} if key in tensors else {})}, prefix)
    embedded, to_context = tensors[time].shape[0], tensors.get(key)
    return Architecture(
        in_channels=tensors["input_blocks.0.0.weight"].shape[1],
        out_channels=tensors["out.2.weight"].shape[0],
        channels=channels,
        layers=layers,
        attention=tuple(numbered(tensors, f"{first}.#") > 1 for first in firsts),
        resample_in_blocks=bool(by_block and not by_convolution),
        scale_shift=embedded == 2 * channels[0],
        context=None if to_context is None else to_context.shape[1],
        depth=numbered(tensors, f"{transformer}.#"),
    )


def convert_unet(
    tensors: Tensors, settings: Settings, latent_size: int, prefix: str = ""
) -> UNet2DModel | UNet2DConditionModel:
    """Convert LDM's `UNetModel`, unconditional or with cross-attention on a context.

    Args:
        tensors: Keys start with `time_embed.`, `input_blocks.`, `middle_block.`, `output_blocks.`, `out.`.
        settings (`Settings`): Needs `num_heads` or `num_head_channels`: the weights show neither.
        latent_size (`int`): Side of the latents, stored as `sample_size`.
        prefix (`str`): Prefix of the keys in the file, for errors.
    """
    architecture = architecture_of(tensors, prefix)
    require(heads=settings.num_heads or settings.num_head_channels)
    width = architecture.channels[0]
    found = {
        "model_channels": width,
        "channel_mult": tuple(channels // width for channels in architecture.channels),
        "num_res_blocks": architecture.layers,
    }
    settings.check_architecture(**found, **({"context_dim": architecture.context} if architecture.context else {}))
    heads = {channels: _heads(channels, settings) for channels in architecture.channels}
    with torch.device("meta"):
        model = _make(architecture, heads, settings, latent_size)
    if architecture.context:
        attention = partial(_transformer, depth=architecture.depth)
    else:
        attention = partial(_fused_attention, heads=heads, by_head=settings.qkv_by_head)
    load_renamed(model, tensors, _sources(architecture, attention), prefix=prefix)
    return model


def _heads(channels: int, settings: Settings) -> int:
    parts = settings.num_heads or settings.num_head_channels
    if channels % parts:
        name = "num_heads" if settings.num_heads else "num_head_channels"
        raise ModelError(f"{name}={parts} must divide the {channels} channels of a resolution of the UNet.")
    return settings.num_heads or channels // settings.num_head_channels


def _make(
    architecture: Architecture, heads: dict[int, int], settings: Settings, latent_size: int
) -> UNet2DModel | UNet2DConditionModel:
    config = {
        "sample_size": latent_size,
        "in_channels": architecture.in_channels,
        "out_channels": architecture.out_channels,
        "block_out_channels": architecture.channels,
        "layers_per_block": architecture.layers,
        "norm_num_groups": 32,  # fixed in their normalization()
        "resnet_time_scale_shift": "scale_shift" if architecture.scale_shift else "default",
    }
    if architecture.context:
        if architecture.resample_in_blocks:
            raise ModelError("resblock_updown with cross-attention is not supported by UNet2DConditionModel.")
        return UNet2DConditionModel(
            **config,
            down_block_types=[_named("Down", a, False, "CrossAttn") for a in architecture.attention],
            up_block_types=[_named("Up", a, False, "CrossAttn") for a in reversed(architecture.attention)],
            cross_attention_dim=architecture.context,
            transformer_layers_per_block=architecture.depth,
            # Despite its name, the number of heads in this class (kept by diffusers for old configs).
            attention_head_dim=[heads[channels] for channels in architecture.channels],
        )
    resample = architecture.resample_in_blocks
    config |= {
        "down_block_types": [_named("Down", a, resample) for a in architecture.attention],
        "up_block_types": [_named("Up", a, resample) for a in reversed(architecture.attention)],
        "downsample_type": "resnet" if resample else "conv",
        "upsample_type": "resnet" if resample else "conv",
        "attn_norm_num_groups": 32,  # else the middle attention has no norm with scale_shift
    }
    if settings.num_heads:
        return FixedHeadsUNet2DModel(**config, num_attention_heads=settings.num_heads)
    return UNet2DModel(**config, attention_head_dim=settings.num_head_channels)


def _named(direction: str, attention: bool, resample_in_blocks: bool, attention_name: str = "Attn") -> str:
    """Return the class name of a resolution's block."""
    if attention:
        return f"{attention_name}{direction}Block2D"
    return f"Resnet{direction}sampleBlock2D" if resample_in_blocks else f"{direction}Block2D"


# Takes our module, theirs, and the channels of the resolution.
Attention = Callable[[str, str, int], Sources]


def _sources(architecture: Architecture, attention: Attention) -> Sources:
    levels, layers = architecture.levels, architecture.layers
    sources: dict[str, str | Fused] = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        **_block("mid_block.resnets.0", "middle_block.0"),
        **attention("mid_block.attentions.0", "middle_block.1", architecture.channels[-1]),
        **_block("mid_block.resnets.1", "middle_block.2"),
    }
    for level, channels in enumerate(architecture.channels):
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        first_in, first_out = 1 + level * (layers + 1), (levels - 1 - level) * (layers + 1)
        for j in range(layers):
            theirs = f"input_blocks.{first_in + j}"
            sources.update(_block(f"{down}.resnets.{j}", f"{theirs}.0"))
            sources.update(attention(f"{down}.attentions.{j}", f"{theirs}.1", channels))
        sources.update(_resample(f"{down}.downsamplers.0", f"input_blocks.{first_in + layers}.0", "op"))
        for j in range(layers + 1):
            theirs = f"output_blocks.{first_out + j}"
            sources.update(_block(f"{up}.resnets.{j}", f"{theirs}.0"))
            sources.update(attention(f"{up}.attentions.{j}", f"{theirs}.1", channels))
        last = f"output_blocks.{first_out + layers}.{2 if architecture.attention[level] else 1}"
        sources.update(_resample(f"{up}.upsamplers.0", last, "conv"))
    return sources


def _block(ours: str, theirs: str) -> Sources:
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return {f"{ours}.{our}": f"{theirs}.{their}" for our, their in names.items()}


def _resample(ours: str, theirs: str, convolution: str) -> Sources:
    """Return the sources of a convolution and of a residual block: their names differ, so only one applies."""
    return {f"{ours}.conv": f"{theirs}.{convolution}", **_block(ours, theirs)}


def _fused_attention(ours: str, theirs: str, channels: int, heads: dict[int, int], by_head: bool) -> Sources:
    """Return the sources of `AttentionBlock`: its projection is split by heads first (`QKVAttentionLegacy`) or last."""
    groups = heads[channels] if by_head else 1
    return {
        f"{ours}.group_norm": f"{theirs}.norm",
        **{f"{ours}.to_{name}": Fused(f"{theirs}.qkv", part, groups) for part, name in enumerate("qkv")},
        f"{ours}.to_out.0": f"{theirs}.proj_out",
    }


def _transformer(ours: str, theirs: str, channels: int, depth: int) -> Sources:
    """Return the sources of `SpatialTransformer`, whose names diffusers kept."""
    attention = [f"{name}.{part}" for name in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")]
    layers = ["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2", *attention]
    names = [
        "norm",
        "proj_in",
        "proj_out",
        *(f"transformer_blocks.{i}.{name}" for i in range(depth) for name in layers),
    ]
    return {f"{ours}.{name}": f"{theirs}.{name}" for name in names}
