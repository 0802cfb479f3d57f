"""Convert first stages: the small VQ-VAE of LooC and CVQ-VAE, and taming's VQGAN, also LDM's first stage.

Key names are from Visual-AI/LooC and lyndonzheng/CVQ-VAE (modules.py, quantise.py), CompVis/taming-transformers
(taming/models/vqgan.py, taming/modules/diffusionmodules/model.py) and CompVis/latent-diffusion
(ldm/models/autoencoder.py, ldm/modules/diffusionmodules/model.py).

diffusers' `convert_ldm_vae_checkpoint` ignores unknown keys and has no codebook; hence our own rules.
"""

from __future__ import annotations

import torch

from looc_ldm.convert.checkpoint import ATTENTION_RULES, Rules, Tensors, load_renamed, numbered, shape_of
from looc_ldm.convert.settings import Settings, require
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.small import LooCSmallVQModel
from looc_ldm.utils.errors import ModelError

# The discriminator and LPIPS, their averages, and the average's own state (LDM's VQModel with use_ema).
IGNORED = ("loss.", "model_ema.loss", "model_ema.decay", "model_ema.num_updates")

SMALL_RULES: Rules = (
    (r"^_encoder\._conv_1\.", "encoder.conv_in."),
    (r"^_encoder\._conv_2\.", "encoder.conv_down."),
    (r"^_encoder\._conv_3\.", "encoder.conv_out."),
    (r"^_pre_vq_conv\.", "quant_conv."),
    (r"^_vq_vae\.", "quantize."),
    (r"^_decoder\._conv_1\.", "decoder.conv_in."),
    (r"^_decoder\._conv_trans_1\.", "decoder.conv_up."),
    (r"^_decoder\._conv_trans_2\.", "decoder.conv_out."),
    (r"^_(encoder|decoder)\._residual_stack\._layers\.(\d+)\._block\.1\.", r"\1.layers.\2.conv_1."),
    (r"^_(encoder|decoder)\._residual_stack\._layers\.(\d+)\._block\.3\.", r"\1.layers.\2.conv_2."),
    (r"^quantize\.embed_prob$", "quantize.usage"),
)


def small_kind(tensors: Tensors) -> str | None:
    """Return `"looc"` or `"cvq"` if the shapes of a small VQ-VAE's weights tell, else None.

    LooC's pre-quantization convolution keeps the number of channels; CVQ-VAE's changes it to a codevector's.
    """
    latent, hidden, *_ = shape_of(tensors, "_pre_vq_conv.weight")
    if latent != hidden:
        return "cvq"
    return "looc" if shape_of(tensors, "_vq_vae.embedding.weight", 2)[1] != latent else None


def convert_small(tensors: Tensors, kind: str, settings: Settings) -> LooCSmallVQModel:
    """Convert the small VQ-VAE of LooC (`kind` `"looc"`) or CVQ-VAE (`"cvq"`)."""
    latent, hidden, *_ = shape_of(tensors, "_pre_vq_conv.weight")
    residual = shape_of(tensors, "_encoder._residual_stack._layers.0._block.1.weight")[0]
    layers = numbered(tensors, "_encoder._residual_stack._layers")
    tensors, quantizer = _quantizer(tensors, "_vq_vae", latent, kind, settings, anchor="closest")
    settings.check_architecture(
        hidden_size=hidden,
        num_residual_hidden=residual,
        num_residual_layers=layers,
        num_embedding=quantizer["num_vq_embeddings"],
    )
    in_channels, out_channels = (
        shape_of(tensors, f"{layer}.weight")[1] for layer in ("_encoder._conv_1", "_decoder._conv_trans_2")
    )
    with torch.device("meta"):
        model = LooCSmallVQModel(
            in_channels=in_channels,
            out_channels=out_channels,
            hidden_channels=hidden,
            residual_channels=residual,
            layers_per_block=layers,
            sample_size=settings.resolution,
            **quantizer,
        )
    load_renamed(model, tensors, SMALL_RULES)
    return model


def check_vqgan(tensors: Tensors) -> None:
    """Raise ModelError for an autoencoder without a codebook, or with a Gumbel quantizer."""
    if "quantize.embed.weight" in tensors:
        raise ModelError("a VQGAN with a Gumbel quantizer (quantize.proj, quantize.embed) cannot be converted.")
    if "quantize.embedding.weight" not in tensors:
        raise ModelError(
            "the first stage has no codebook (missing quantize.embedding.weight): it may be a KL autoencoder, "
            "which cannot be converted."
        )


def convert_vqgan(tensors: Tensors, settings: Settings, scaling_factor: float | None = None) -> LooCVQModel:
    """Convert taming's `VQModel`, with its own quantizer, CVQ-VAE's or LooC's.

    Settings need `resolution`, and for a quantizer with revival `distance` and `interpolation_factor`.
    """
    check_vqgan(tensors)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(IGNORED)}

    def shape(layer: str) -> tuple[int, ...]:
        return shape_of(tensors, f"{layer}.weight")

    levels, layers = numbered(tensors, "encoder.down"), numbered(tensors, "encoder.down.0.block")
    width, in_channels, *_ = shape("encoder.conv_in")
    channels = tuple(shape(f"encoder.down.{level}.block.0.conv1")[0] for level in range(levels))
    latent, z_channels, *_ = shape("quant_conv")
    # The anchor is the default of the class that replaces taming's quantizer.
    tensors, quantizer = _quantizer(tensors, "quantize", latent, "vqgan", settings, "probrandom")
    settings.check_architecture(
        ch=width,
        ch_mult=tuple(channel // width for channel in channels),
        num_res_blocks=layers,
        z_channels=z_channels,
        embed_dim=latent,
        n_embed=quantizer["num_vq_embeddings"],
    )
    down = ["Attn" * (numbered(tensors, f"encoder.down.{level}.attn") > 0) for level in range(levels)]
    up = ["Attn" * (numbered(tensors, f"decoder.up.{level}.attn") > 0) for level in reversed(range(levels))]
    with torch.device("meta"):
        model = LooCVQModel(
            in_channels=in_channels,
            out_channels=shape("decoder.conv_out")[0],
            down_block_types=tuple(f"{attention}DownEncoderBlock2D" for attention in down),
            up_block_types=tuple(f"{attention}UpDecoderBlock2D" for attention in up),
            block_out_channels=channels,
            layers_per_block=layers,
            latent_channels=z_channels,
            sample_size=settings.resolution,
            norm_num_groups=32,  # fixed in their Normalize()
            mid_block_add_attention="encoder.mid.attn_1.q.weight" in tensors,  # not with attn_type "none"
            scaling_factor=scaling_factor,
            **quantizer,
        )
    rules = (
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"^encoder\.down\.", "encoder.down_blocks."),
        # Theirs are numbered by resolution, ours in the order in which they run.
        (r"^decoder\.up\.(\d+)\.", lambda found: f"decoder.up_blocks.{levels - 1 - int(found[1])}."),
        (r"\.block\.", ".resnets."),
        (r"\.attn\.", ".attentions."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.downsample\.", ".downsamplers.0."),
        (r"\.upsample\.", ".upsamplers.0."),
        (r"\.norm_out\.", ".conv_norm_out."),
        (r"^quantize\.embed_prob$", "quantize.usage"),
        *ATTENTION_RULES,
    )
    load_renamed(model, tensors, rules)
    return model


def _quantizer(
    tensors: Tensors, module: str, latent: int, kind: str, settings: Settings, anchor: str
) -> tuple[Tensors, dict[str, object]]:
    """Return the tensors with a use of codevectors, and the quantizer's arguments.

    If no use was stored, it is even, so that no codevector counts as unused.
    """
    size, width = shape_of(tensors, f"{module}.embedding.weight", 2)
    config: dict[str, object] = {
        "num_vq_embeddings": size,
        "vq_embed_dim": latent,
        "codevector_dim": width,
        "codebook_update": "gradient",  # in all of these projects
        "gradient": "straight-through",
    }
    if f"{module}.embed_prob" not in tensors:  # taming's; CVQ-VAE and LooC store the use of codevectors
        if width != latent:
            raise ModelError(
                f"the codebook has {width} channels and the latents have {latent}, but without {module}.embed_prob "
                "(the use of the codevectors) both must be equal, as in taming's VQGAN."
            )
        require(resolution=settings.resolution)
        tensors = {**tensors, f"{module}.embed_prob": torch.full((size,), 1 / size)}
        return tensors, {**config, "interpolation_factor": 1, "distance": "euclidean", "anchor": "none"}
    factor = 1 if kind == "cvq" else settings.interpolation_factor  # CVQ-VAE does not interpolate
    require(distance=settings.distance, interpolation_factor=factor, resolution=settings.resolution)
    return tensors, {
        **config,
        "interpolation_factor": factor,
        "segment_layout": "patch" if factor > 1 else "channel",  # pixel_unshuffle in LooC's code; equal without
        "distance": settings.distance,
        "anchor": settings.anchor or anchor,
    }
