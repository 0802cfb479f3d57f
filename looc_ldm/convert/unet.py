"""Convert LDM's UNet to `UNet2DModel`, `FixedHeadsUNet2DModel` or, with cross-attention, `UNet2DConditionModel`.

Key names are those of CompVis/latent-diffusion (ldm/modules/diffusionmodules/openaimodel.py, ldm/modules/attention.py).
diffusers' `convert_ldm_unet_checkpoint` is for cross-attention only: it has neither fused projections nor residual
blocks that resample, and ignores unknown keys. Hence our own rules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from looc_ldm.convert.checkpoint import ATTENTION_RULES, Rules, Tensors, load_renamed, numbered, shape_of
from looc_ldm.convert.settings import Settings, require
from looc_ldm.models.unet import FixedHeadsUNet2DModel
from looc_ldm.utils.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """Architecture of a UNet, as far as its weights show it."""

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]  # of each resolution
    layers: int  # residual blocks per resolution on the way down
    attention: tuple[bool, ...]  # whether a resolution has attention
    resample_in_blocks: bool  # residual blocks change the resolution (`resblock_updown`), not convolutions
    scale_shift: bool  # the time embedding scales and shifts norms (`use_scale_shift_norm`)
    context: int | None  # channels of the context of cross-attention
    depth: int  # transformer blocks per place with cross-attention


def architecture_of(tensors: Tensors, prefix: str = "") -> Architecture:
    """Read the architecture off keys and shapes. Raise ModelError if this is not LDM's UNet."""
    outputs = numbered(tensors, "output_blocks")
    if outputs == 0:
        raise ModelError(f"the checkpoint is not complete: missing {prefix}output_blocks.")

    def shape(key: str, dimensions: int = 4) -> tuple[int, ...]:
        return shape_of(tensors, f"{key}.weight", dimensions, prefix)

    # The last block of a level also upsamples: by a convolution, or by a second residual block.
    by_convolution = [i for i in range(outputs) for j in (1, 2) if f"output_blocks.{i}.{j}.conv.weight" in tensors]
    by_block = [i for i in range(outputs) for j in (1, 2) if f"output_blocks.{i}.{j}.in_layers.0.weight" in tensors]
    ends = by_convolution or by_block
    per_level = ends[0] + 1 if ends else outputs
    # Input blocks: the first convolution, then per level `layers` blocks and one that halves the resolution.
    firsts = [f"input_blocks.{1 + level * per_level}" for level in range(outputs // per_level)]
    channels = tuple(shape(f"{first}.0.out_layers.3")[0] for first in firsts)
    to_context = "middle_block.1.transformer_blocks.0.attn2.to_k"
    return Architecture(
        in_channels=shape("input_blocks.0.0")[1],
        out_channels=shape("out.2")[0],
        channels=channels,
        layers=per_level - 1,
        attention=tuple(numbered(tensors, first) > 1 for first in firsts),
        resample_in_blocks=bool(by_block and not by_convolution),
        scale_shift=shape("input_blocks.1.0.emb_layers.1", 2)[0] == 2 * channels[0],
        context=shape(to_context, 2)[1] if f"{to_context}.weight" in tensors else None,
        depth=numbered(tensors, "middle_block.1.transformer_blocks"),
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
    settings.check_architecture(
        model_channels=width,
        channel_mult=tuple(channels // width for channels in architecture.channels),
        num_res_blocks=architecture.layers,
        **({"context_dim": architecture.context} if architecture.context else {}),
    )
    with torch.device("meta"):
        model = _make(architecture, settings, latent_size)
    if not architecture.context:
        tensors = _split_attention(tensors, settings, prefix)
    load_renamed(model, tensors, _rules(architecture), prefix)
    return model


def _heads(channels: int, settings: Settings) -> int:
    parts = settings.num_heads or settings.num_head_channels
    if channels % parts:
        name = "num_heads" if settings.num_heads else "num_head_channels"
        raise ModelError(f"{name}={parts} must divide the {channels} channels of a resolution of the UNet.")
    return settings.num_heads or channels // settings.num_head_channels


def _make(architecture: Architecture, settings: Settings, latent_size: int) -> UNet2DModel | UNet2DConditionModel:
    heads = [_heads(channels, settings) for channels in architecture.channels]
    config = {
        "sample_size": latent_size,
        "in_channels": architecture.in_channels,
        "out_channels": architecture.out_channels,
        "block_out_channels": architecture.channels,
        "layers_per_block": architecture.layers,
        "norm_num_groups": 32,  # fixed in their normalization()
        "resnet_time_scale_shift": "scale_shift" if architecture.scale_shift else "default",
    }
    down, up = architecture.attention, architecture.attention[::-1]
    if architecture.context:
        if architecture.resample_in_blocks:
            raise ModelError("resblock_updown with cross-attention is not supported by UNet2DConditionModel.")
        return UNet2DConditionModel(
            **config,
            down_block_types=["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in down],
            up_block_types=["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in up],
            cross_attention_dim=architecture.context,
            transformer_layers_per_block=architecture.depth,
            # Despite its name, the number of heads in this class (kept by diffusers for old configs).
            attention_head_dim=heads,
        )
    resample = "resnet" if architecture.resample_in_blocks else "conv"
    plain = "Resnet{}sampleBlock2D" if architecture.resample_in_blocks else "{}Block2D"
    config |= {
        "down_block_types": ["AttnDownBlock2D" if attention else plain.format("Down") for attention in down],
        "up_block_types": ["AttnUpBlock2D" if attention else plain.format("Up") for attention in up],
        "downsample_type": resample,
        "upsample_type": resample,
        "attn_norm_num_groups": 32,  # else the middle attention has no norm with scale_shift
    }
    if settings.num_heads:
        return FixedHeadsUNet2DModel(**config, num_attention_heads=settings.num_heads)
    return UNet2DModel(**config, attention_head_dim=settings.num_head_channels)


def _split_attention(tensors: Tensors, settings: Settings, prefix: str) -> Tensors:
    """Split the fused projections of `AttentionBlock`: by heads first (`QKVAttentionLegacy`), or by query, key, value.

    `qkv.weight` is replaced by `q.weight`, `k.weight` and `v.weight`.
    """
    split = {}
    for key, tensor in tensors.items():
        if ".qkv." not in key:
            split[key] = tensor
            continue
        channels = len(tensor) // 3 if tensor.ndim else 0
        groups = _heads(channels, settings) if settings.qkv_by_head else 1
        if channels == 0 or tensor.numel() == 0 or len(tensor) % (3 * groups):
            shape = tuple(tensor.shape)
            raise ModelError(f"mis-shaped: {prefix}{key} is {shape} instead of three times {groups} heads.")
        parts = tensor.unflatten(0, (groups, 3, -1)).unbind(1)
        split |= {
            key.replace(".qkv.", f".{name}."): part.flatten(0, 1) for name, part in zip("qkv", parts, strict=True)
        }
    return split


def _rules(architecture: Architecture) -> Rules:
    levels, per_level = len(architecture.channels), architecture.layers + 1

    def down(found: re.Match) -> str:
        level, j = divmod(int(found[1]) - 1, per_level)
        if j == architecture.layers:
            return f"down_blocks.{level}.downsamplers.0."
        return f"down_blocks.{level}.{'attentions' if found[2] == '1' else 'resnets'}.{j}."

    def up(found: re.Match) -> str:
        level, j = divmod(int(found[1]), per_level)  # in the order in which they run
        if found[2] == "0":
            return f"up_blocks.{level}.resnets.{j}."
        if found[2] == "1" and architecture.attention[levels - 1 - level]:
            return f"up_blocks.{level}.attentions.{j}."
        return f"up_blocks.{level}.upsamplers.0."

    return (
        (r"^time_embed\.0\.", "time_embedding.linear_1."),
        (r"^time_embed\.2\.", "time_embedding.linear_2."),
        (r"^out\.0\.", "conv_norm_out."),
        (r"^out\.2\.", "conv_out."),
        (r"^middle_block\.0\.", "mid_block.resnets.0."),
        (r"^middle_block\.1\.", "mid_block.attentions.0."),
        (r"^middle_block\.2\.", "mid_block.resnets.1."),
        (r"^input_blocks\.0\.0\.", "conv_in."),
        (r"^input_blocks\.(\d+)\.(\d+)\.", down),
        (r"^output_blocks\.(\d+)\.(\d+)\.", up),
        (r"\.in_layers\.0\.", ".norm1."),
        (r"\.in_layers\.2\.", ".conv1."),
        (r"\.emb_layers\.1\.", ".time_emb_proj."),
        (r"\.out_layers\.0\.", ".norm2."),
        (r"\.out_layers\.3\.", ".conv2."),
        (r"\.skip_connection\.", ".conv_shortcut."),
        (r"\.downsamplers\.0\.op\.", ".downsamplers.0.conv."),
        # diffusers kept the names inside LDM's `SpatialTransformer`.
        *(() if architecture.context else ATTENTION_RULES),
    )
