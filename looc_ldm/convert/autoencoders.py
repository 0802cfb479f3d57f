"""Convert first stages: the small VQ-VAE of LooC and CVQ-VAE, and taming's VQGAN, also LDM's first stage.

Key names are those of Visual-AI/LooC and lyndonzheng/CVQ-VAE (modules.py, quantise.py), CompVis/taming-transformers
(taming/models/vqgan.py, taming/modules/diffusionmodules/model.py) and CompVis/latent-diffusion
(ldm/models/autoencoder.py, ldm/modules/diffusionmodules/model.py).

diffusers' `convert_ldm_vae_checkpoint` ignores unknown keys and has no codebook; hence our own tables.
"""

from __future__ import annotations

import torch

from looc_ldm.convert.checkpoint import Sources, Tensors, load_renamed, need, numbered
from looc_ldm.convert.settings import Settings, require
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.small import LooCSmallVQModel
from looc_ldm.utils.errors import ModelError

# The discriminator and LPIPS, their averages, and the average's own state (LDM's VQModel with use_ema).
IGNORED = ("loss.", "model_ema.loss", "model_ema.decay", "model_ema.num_updates")
# Weights that show the sizes of latents and codevectors, with their numbers of dimensions.
_SMALL_LATENTS = {"_pre_vq_conv.weight": 4, "_vq_vae.embedding.weight": 2}


def small_kind(tensors: Tensors) -> str | None:
    """Return `"looc"` or `"cvq"` if the shapes of a small VQ-VAE's weights tell, else None.

    LooC's pre-quantization convolution always keeps the channels; CVQ-VAE's brings them to those of a codevector.
    """
    need(tensors, _SMALL_LATENTS)
    latent, hidden = tensors["_pre_vq_conv.weight"].shape[:2]
    if latent != hidden:
        return "cvq"
    return "looc" if tensors["_vq_vae.embedding.weight"].shape[-1] != latent else None


def convert_small(tensors: Tensors, kind: str, settings: Settings) -> LooCSmallVQModel:
    """Convert the small VQ-VAE of LooC (`kind` `"looc"`) or CVQ-VAE (`"cvq"`)."""
    first_layer = "_encoder._residual_stack._layers.0._block.1.weight"
    ends = ("_encoder._conv_1.weight", "_decoder._conv_trans_2.weight")
    need(tensors, {**_SMALL_LATENTS, **dict.fromkeys((*ends, first_layer), 4)})
    hidden, layers = tensors["_pre_vq_conv.weight"].shape[1], numbered(tensors, "_encoder._residual_stack._layers.#")
    residual = tensors[first_layer].shape[0]
    channels = tensors["_encoder._conv_1.weight"].shape[1]
    codebook = tensors["_vq_vae.embedding.weight"]
    settings.check_architecture(
        hidden_size=hidden, num_residual_hidden=residual, num_residual_layers=layers, num_embedding=len(codebook)
    )
    latent = tensors["_pre_vq_conv.weight"].shape[0]
    quantizer = _quantizer(codebook, latent, "_vq_vae.embed_prob" in tensors, kind, settings, anchor="closest")
    require(resolution=settings.resolution)
    config = dict(
        in_channels=channels,
        out_channels=tensors["_decoder._conv_trans_2.weight"].shape[1],
        hidden_channels=hidden,
        residual_channels=residual,
        layers_per_block=layers,
        sample_size=settings.resolution,
        **quantizer,
    )
    sources = {
        "encoder.conv_in": "_encoder._conv_1",
        "encoder.conv_down": "_encoder._conv_2",
        "encoder.conv_out": "_encoder._conv_3",
        "quant_conv": "_pre_vq_conv",
        "decoder.conv_in": "_decoder._conv_1",
        "decoder.conv_up": "_decoder._conv_trans_1",
        "decoder.conv_out": "_decoder._conv_trans_2",
        "quantize.embedding": "_vq_vae.embedding",
        "quantize.usage": "_vq_vae.embed_prob",
    }
    for part in ("encoder", "decoder"):
        for i in range(layers):
            block = f"_{part}._residual_stack._layers.{i}._block"
            sources[f"{part}.layers.{i}.conv_1"] = f"{block}.1"
            sources[f"{part}.layers.{i}.conv_2"] = f"{block}.3"
    with torch.device("meta"):
        model = LooCSmallVQModel(**config)
    load_renamed(model, _with_usage(tensors, "_vq_vae"), sources)
    return model


def vqgan_levels(tensors: Tensors) -> int:
    """Return the number of resolutions of taming's encoder; the downsampling factor is 2 ** (levels - 1)."""
    return numbered(tensors, "encoder.down.#")


def has_revival(tensors: Tensors) -> bool:
    """Whether the quantizer is CVQ-VAE's or LooC's, which store the use of codevectors; taming's does not."""
    return "quantize.embed_prob" in tensors


def check_vqgan(tensors: Tensors, prefix: str = "") -> None:
    """Raise ModelError for an autoencoder without a codebook, or with another kind of quantizer."""
    if "quantize.embed.weight" in tensors:
        raise ModelError("a VQGAN with a Gumbel quantizer (quantize.proj, quantize.embed) cannot be converted.")
    if "quantize.embedding.weight" not in tensors:
        raise ModelError(
            f"the first stage has no codebook (missing {prefix}quantize.embedding.weight): a KL autoencoder is no "
            "vector quantizer, and is not converted."
        )


def convert_vqgan(
    tensors: Tensors, settings: Settings, scaling_factor: float | None = None, prefix: str = ""
) -> LooCVQModel:
    """Convert taming's `VQModel`, with its own quantizer, CVQ-VAE's or LooC's.

    Args:
        tensors: Keys start with `encoder.`, `decoder.`, `quantize.`, `quant_conv.`, `post_quant_conv.`.
        settings (`Settings`): Needs `resolution`, and for a quantizer with revival `distance` and
            `interpolation_factor`.
        scaling_factor (`float`, *optional*): Factor of latents in the diffusion model around it.
        prefix (`str`): Prefix of the keys in the file, for errors.
    """
    check_vqgan(tensors, prefix)
    ends = ("quant_conv.weight", "encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.conv_out.weight")
    need(tensors, {**dict.fromkeys(ends, 4), "quantize.embedding.weight": 2}, prefix)
    levels, layers = vqgan_levels(tensors), numbered(tensors, "encoder.down.0.block.#")
    firsts = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(levels)]
    need(tensors, dict.fromkeys(firsts, 4), prefix)
    channels = tuple(tensors[first].shape[0] for first in firsts)
    latent, z_channels = tensors["quant_conv.weight"].shape[:2]
    codebook = tensors["quantize.embedding.weight"]
    width = tensors["encoder.conv_in.weight"].shape[0]
    settings.check_architecture(
        ch=width,
        ch_mult=tuple(channel // width for channel in channels),
        num_res_blocks=layers,
        z_channels=z_channels,
        embed_dim=latent,
        n_embed=len(codebook),
    )
    # The default of the class that replaces taming's quantizer.
    quantizer = _quantizer(codebook, latent, has_revival(tensors), "vqgan", settings, anchor="probrandom")
    require(resolution=settings.resolution)

    down_attention = [numbered(tensors, f"encoder.down.{i}.attn.#") > 0 for i in range(levels)]
    up_attention = [numbered(tensors, f"decoder.up.{i}.attn.#") > 0 for i in reversed(range(levels))]
    config = dict(
        in_channels=tensors["encoder.conv_in.weight"].shape[1],
        out_channels=tensors["decoder.conv_out.weight"].shape[0],
        down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in down_attention),
        up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in up_attention),
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=z_channels,
        sample_size=settings.resolution,
        norm_num_groups=32,  # fixed in their Normalize()
        mid_block_add_attention="encoder.mid.attn_1.q.weight" in tensors,  # not with attn_type "none"
        scaling_factor=scaling_factor,
        **quantizer,
    )
    with torch.device("meta"):
        model = LooCVQModel(**config)
    sources = _vqgan_sources(levels, layers)
    load_renamed(model, _with_usage(tensors, "quantize"), sources, IGNORED, prefix)
    return model


def _vqgan_sources(levels: int, layers: int) -> Sources:
    sources = {
        "quant_conv": "quant_conv",
        "post_quant_conv": "post_quant_conv",
        "quantize.embedding": "quantize.embedding",
        "quantize.usage": "quantize.embed_prob",
    }
    for part in ("encoder", "decoder"):
        sources[f"{part}.conv_in"] = f"{part}.conv_in"
        sources[f"{part}.conv_norm_out"] = f"{part}.norm_out"
        sources[f"{part}.conv_out"] = f"{part}.conv_out"
        for i in range(2):
            sources.update(_block(f"{part}.mid_block.resnets.{i}", f"{part}.mid.block_{i + 1}"))
        sources.update(_attention(f"{part}.mid_block.attentions.0", f"{part}.mid.attn_1"))
    for i in range(levels):
        # Theirs are numbered by resolution in both halves; ours in the order in which they run.
        ours = {"encoder.down": f"encoder.down_blocks.{i}", "decoder.up": f"decoder.up_blocks.{levels - 1 - i}"}
        for theirs, our in ours.items():
            for j in range(layers + 1):
                sources.update(_block(f"{our}.resnets.{j}", f"{theirs}.{i}.block.{j}"))
                sources.update(_attention(f"{our}.attentions.{j}", f"{theirs}.{i}.attn.{j}"))
        sources[f"{ours['encoder.down']}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        sources[f"{ours['decoder.up']}.upsamplers.0.conv"] = f"decoder.up.{i}.upsample.conv"
    return sources


def _block(ours: str, theirs: str) -> Sources:
    same = {f"{ours}.{name}": f"{theirs}.{name}" for name in ("norm1", "conv1", "norm2", "conv2")}
    return {**same, f"{ours}.conv_shortcut": f"{theirs}.nin_shortcut"}


def _attention(ours: str, theirs: str) -> Sources:
    names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    return {f"{ours}.{our}": f"{theirs}.{their}" for our, their in names.items()}


def _quantizer(
    codebook: torch.Tensor, latent: int, revived: bool, kind: str, settings: Settings, anchor: str
) -> dict[str, object]:
    """Return the quantizer's arguments. `revived`: it stores the use of codevectors, as CVQ-VAE's and LooC's do."""
    config: dict[str, object] = {
        "num_vq_embeddings": len(codebook),
        "vq_embed_dim": latent,
        "codevector_dim": codebook.shape[1],
        "codebook_update": "gradient",  # in all of these projects
        "gradient": "straight-through",
    }
    if not revived:
        if codebook.shape[1] != latent:
            raise ModelError(
                f"a codebook of {codebook.shape[1]} channels for latents of {latent} without usage (embed_prob) is "
                "neither taming's quantizer nor CVQ-VAE's nor LooC's."
            )
        return {**config, "interpolation_factor": 1, "distance": "euclidean", "anchor": "none"}
    # CVQ-VAE does not interpolate.
    factor = 1 if kind == "cvq" else settings.interpolation_factor
    require(distance=settings.distance, interpolation_factor=factor, resolution=settings.resolution)
    return {
        **config,
        "interpolation_factor": factor,
        "segment_layout": "patch" if factor > 1 else "channel",  # pixel_unshuffle in LooC's code; equal without
        "distance": settings.distance,
        "anchor": settings.anchor or anchor,
    }


def _with_usage(tensors: Tensors, module: str) -> Tensors:
    """Add an even use of codevectors if none was stored, so that none counts as unused."""
    codebook = tensors[f"{module}.embedding.weight"]
    return {f"{module}.embed_prob": torch.full((len(codebook),), 1 / len(codebook)), **tensors}
