"""`FixedHeadsUNet2DModel`: diffusers' `UNet2DModel` with the same number of attention heads at every level."""

from __future__ import annotations

from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention

from looc_ldm.models.registration import RemoteCode


class FixedHeadsUNet2DModel(RemoteCode, UNet2DModel):
    """`UNet2DModel` whose attentions all have `num_attention_heads` heads, whatever their width.

    `UNet2DModel` fixes the channels of a head instead (`attention_head_dim`). LDM's LSUN-churches model has 8 heads of
    24, 48 and 96 channels. The number of heads changes no weight: keys and sizes are those of `UNet2DModel`.

    Args:
        num_attention_heads (`int`, defaults to 8): Heads of every attention; must divide its channels.
        attention_head_dim: Not used; part of `UNet2DModel`'s signature.
        The other arguments are those of `UNet2DModel`.

    Raises:
        ValueError: `num_attention_heads` does not divide the channels of an attention.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = None,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        num_attention_heads: int = 8,
    ):
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            center_input_sample=center_input_sample,
            time_embedding_type=time_embedding_type,
            time_embedding_dim=time_embedding_dim,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            down_block_types=down_block_types,
            mid_block_type=mid_block_type,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            mid_block_scale_factor=mid_block_scale_factor,
            downsample_padding=downsample_padding,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            dropout=dropout,
            act_fn=act_fn,
            attention_head_dim=None,  # one head as wide as its level, split below
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=attn_norm_num_groups,
            norm_eps=norm_eps,
            resnet_time_scale_shift=resnet_time_scale_shift,
            add_attention=add_attention,
            class_embed_type=class_embed_type,
            num_class_embeds=num_class_embeds,
            num_train_timesteps=num_train_timesteps,
        )
        for attention in self.modules():
            if isinstance(attention, Attention):
                _split_into_heads(attention, num_attention_heads)


def _split_into_heads(attention: Attention, heads: int) -> None:
    """Set what diffusers' attention processors read: the number of heads, and the scale of a head's scores."""
    channels = attention.inner_dim
    if heads < 1 or channels % heads:
        raise ValueError(f"num_attention_heads={heads} must divide the {channels} channels of every attention.")
    attention.heads = attention.sliceable_head_dim = heads
    attention.scale = (channels // heads) ** -0.5
