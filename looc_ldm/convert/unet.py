"""Convert LDM's UNet to `UNet2DModel`, `FixedHeadsUNet2DModel` or, with cross-attention, `UNet2DConditionModel`.

Key names are from CompVis/latent-diffusion (ldm/modules/diffusionmodules/openaimodel.py, ldm/modules/attention.py).
diffusers' `convert_ldm_unet_checkpoint` is for cross-attention only: it has neither fused projections nor residual
blocks that resample, and ignores unknown keys. Hence our own rules.
"""

from __future__ import annotations

import re

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from looc_ldm.convert.checkpoint import ATTENTION_RULES, Rules, Tensors, load_renamed, numbered, shape_of
from looc_ldm.convert.settings import Settings, require
from looc_ldm.models.unet import FixedHeadsUNet2DModel
from looc_ldm.utils.errors import ModelError


def context_of(tensors: Tensors) -> int | None:
    """Return the channels of the context of cross-attention; None without cross-attention."""
    key = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    return shape_of(tensors, key, 2)[1] if key in tensors else None


def convert_unet(tensors: Tensors, settings: Settings, latent_size: int) -> UNet2DModel | UNet2DConditionModel:
    """Convert LDM's `UNetModel`, unconditional or with cross-attention on a context.

    Settings need `num_heads` or `num_head_channels`: the weights show neither. `latent_size` is the `sample_size`.
    """
    require(heads=settings.num_heads or settings.num_head_channels)
    outputs = numbered(tensors, "output_blocks")
    if outputs == 0:
        raise ModelError("the checkpoint is not complete: missing output_blocks.")
    # The last block of a level also upsamples: by a convolution, or by a second residual block (`resblock_updown`).
    by_convolution = [i for i in range(outputs) for j in (1, 2) if f"output_blocks.{i}.{j}.conv.weight" in tensors]
    by_block = [i for i in range(outputs) for j in (1, 2) if f"output_blocks.{i}.{j}.in_layers.0.weight" in tensors]
    ends = by_convolution or by_block
    per_level = ends[0] + 1 if ends else outputs
    # Input blocks: the first convolution, then per level `layers` blocks and one that halves the resolution.
    firsts = [f"input_blocks.{1 + level * per_level}" for level in range(outputs // per_level)]
    channels = tuple(shape_of(tensors, f"{first}.0.out_layers.3.weight")[0] for first in firsts)
    attention = [numbered(tensors, first) > 1 for first in firsts]
    scale_shift = shape_of(tensors, "input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * channels[0]
    context, layers = context_of(tensors), per_level - 1
    settings.check_architecture(
        model_channels=channels[0],
        channel_mult=tuple(width // channels[0] for width in channels),
        num_res_blocks=layers,
        **({"context_dim": context} if context else {}),
    )
    heads = [_heads(width, settings) for width in channels]
    config = {
        "sample_size": latent_size,
        "in_channels": shape_of(tensors, "input_blocks.0.0.weight")[1],
        "out_channels": shape_of(tensors, "out.2.weight")[0],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "norm_num_groups": 32,  # fixed in their normalization()
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
    }
    resample_in_blocks = bool(by_block and not by_convolution)
    if context and resample_in_blocks:
        raise ModelError("resblock_updown with cross-attention is not supported by UNet2DConditionModel.")
    attending = "CrossAttn{}Block2D" if context else "Attn{}Block2D"
    plain = "Resnet{}sampleBlock2D" if resample_in_blocks else "{}Block2D"
    config["down_block_types"] = [(attending if attends else plain).format("Down") for attends in attention]
    config["up_block_types"] = [(attending if attends else plain).format("Up") for attends in reversed(attention)]
    with torch.device("meta"):
        if context:
            model = UNet2DConditionModel(
                **config,
                cross_attention_dim=context,
                transformer_layers_per_block=numbered(tensors, "middle_block.1.transformer_blocks"),
                # Despite its name, the number of heads in this class (kept by diffusers for old configs).
                attention_head_dim=heads,
            )
        else:
            resample = "resnet" if resample_in_blocks else "conv"
            # Without its own groups, the middle attention has no norm with scale_shift.
            config |= {"downsample_type": resample, "upsample_type": resample, "attn_norm_num_groups": 32}
            if settings.num_heads:
                model = FixedHeadsUNet2DModel(**config, num_attention_heads=settings.num_heads)
            else:
                model = UNet2DModel(**config, attention_head_dim=settings.num_head_channels)
    rules = _rules(layers, attention)
    if not context:  # diffusers kept the names inside LDM's `SpatialTransformer`
        tensors, rules = _split_attention(tensors, settings), (*rules, *ATTENTION_RULES)
    load_renamed(model, tensors, rules)
    return model


def _heads(channels: int, settings: Settings) -> int:
    parts = settings.num_heads or settings.num_head_channels
    if channels % parts:
        name = "num_heads" if settings.num_heads else "num_head_channels"
        raise ModelError(f"{name}={parts} must divide the {channels} channels of a resolution of the UNet.")
    return settings.num_heads or channels // settings.num_head_channels


def _split_attention(tensors: Tensors, settings: Settings) -> Tensors:
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
            raise ModelError(f"mis-shaped: {key} is {shape} instead of three times {groups} heads.")
        parts = tensor.unflatten(0, (groups, 3, -1)).unbind(1)
        split |= {
            key.replace(".qkv.", f".{name}."): part.flatten(0, 1) for name, part in zip("qkv", parts, strict=True)
        }
    return split


def _rules(layers: int, attention: list[bool]) -> Rules:
    per_level = layers + 1

    def down(found: re.Match) -> str:
        level, j = divmod(int(found[1]) - 1, per_level)
        if j == layers:
            return f"down_blocks.{level}.downsamplers.0."
        return f"down_blocks.{level}.{'attentions' if found[2] == '1' else 'resnets'}.{j}."

    def up(found: re.Match) -> str:
        level, j = divmod(int(found[1]), per_level)  # in the order in which they run
        if found[2] == "0":
            return f"up_blocks.{level}.resnets.{j}."
        if found[2] == "1" and attention[len(attention) - 1 - level]:
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
    )
