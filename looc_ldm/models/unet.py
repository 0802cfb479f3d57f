"""`FixedHeadsUNet2DModel`: diffusers' `UNet2DModel` with the same number of attention heads at every level."""

from __future__ import annotations

import inspect

from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention

from looc_ldm.models.registration import RemoteCode


def _as_unet(init):
    """Give `init` the signature of `UNet2DModel`, by which diffusers reads configs, with `num_attention_heads`."""
    parameters = dict(inspect.signature(UNet2DModel.__init__).parameters)
    parameters["attention_head_dim"] = parameters["attention_head_dim"].replace(default=None)
    heads = inspect.Parameter("num_attention_heads", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=8)
    init.__signature__ = inspect.Signature([*parameters.values(), heads])
    return init


class FixedHeadsUNet2DModel(RemoteCode, UNet2DModel):
    """`UNet2DModel` whose attentions all have `num_attention_heads` heads, independent of their width.

    `UNet2DModel` fixes the channels of a head instead (`attention_head_dim`). LDM's LSUN-churches model has 8 heads of
    24, 48 and 96 channels. The number of heads changes no weight: keys and sizes are as in `UNet2DModel`.

    Args:
        num_attention_heads (`int`, defaults to 8): Heads of every attention; must divide its channels.
        attention_head_dim: Not used; part of `UNet2DModel`'s signature.
        **kwargs: The other arguments, as in `UNet2DModel`.

    Raises:
        ValueError: `num_attention_heads` does not divide the channels of an attention.
    """

    @register_to_config
    @_as_unet
    def __init__(self, *args, num_attention_heads: int = 8, **kwargs):
        # One head as wide as its level, split below.
        super().__init__(*args, **{**kwargs, "attention_head_dim": None})
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
