"""`LooCVQModel`: diffusers' `VQModel` with a `LooCQuantizer` between encoder and decoder."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers import VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from looc_ldm.models.registration import RemoteCode
from looc_ldm.models.scaling import VQMODEL_DEFAULT_FACTOR, check_channel_values, check_factor, measured_factor
from looc_ldm.models.tiling import decode_in_tiles, encode_in_tiles
from looc_ldm.quantizer.loocq import LooCQuantizer
from looc_ldm.utils.errors import ModelError

# Arguments of earlier versions, which configs that are stored still hold.
WITHDRAWN = ("revive_first_batch_only", "contrastive_weight")

VQMODEL_SETTINGS = inspect.signature(VQModel.__init__).parameters.keys() - {"self"}
QUANTIZER_SETTINGS = (
    "interpolation_factor",
    "segment_layout",
    "distance",
    "commitment_weight",
    "anchor",
    "usage_decay",
    "codebook_update",
    "gradient",
)

# A plain VQModel has no usage. `from_pretrained` sets it; diffusers would advise to train the model.
logging.getLogger("diffusers.models.modeling_utils").addFilter(
    lambda record: "newly initialized: ['quantize.usage']" not in record.getMessage()
)


def refuse_wrapped(names: Iterable[str]) -> None:
    """Raise ModelError for names of weights with the prefix of a wrapper."""
    for prefix in ("module.", "_orig_mod."):
        if any(name.startswith(prefix) for name in names):
            raise ModelError(
                f"the names of the weights begin with {prefix!r}, which DDP or torch.compile added: save the model "
                "without its wrapper (accelerator.unwrap_model), or remove the prefix."
            )


@dataclass
class LooCDecoderOutput(BaseOutput):
    """Output of `LooCVQModel.decode` and `LooCVQModel.forward`.

    Args:
        sample (`torch.Tensor` of shape `(B, out_channels, H, W)`): The image, about [-1, 1].
        commit_loss (`torch.Tensor`): The quantizer's loss, both terms, a float32 scalar; 0 if not quantized.
        indices (`torch.Tensor` of shape `(B, h, w, C)`, int64): None if not quantized.
        perplexity (`torch.Tensor`): exp of the entropy of the indices, between 1 and K; None if not quantized.
    """

    sample: torch.Tensor
    commit_loss: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None


class LooCVQModel(RemoteCode, VQModel, AttentionMixin):
    """A VQ autoencoder whose latents are quantized by LooC: the first stage of a latent diffusion model.

    As in `VQModel`, `encode` returns the latents *before* quantization, which a diffusion model is trained on, and
    `decode` quantizes and decodes. Images are float tensors in [-1, 1].

    `from_pretrained` on the folder of a `VQModel`, and `from_config(vq.config)`, give a model that quantizes as it did.
    `LooCVQModel(**vq.config)` does not: it has the defaults below, or is refused if `vq` has the default
    `scaling_factor`.

    Args:
        in_channels (`int`, defaults to 3): Channels of the input image.
        out_channels (`int`, defaults to 3): Channels of the output image.
        down_block_types (`tuple[str]`): Encoder blocks, for instance `"AttnDownEncoderBlock2D"` at low resolution.
        up_block_types (`tuple[str]`): Decoder blocks.
        block_out_channels (`tuple[int]`): Channels of each block. The downsampling factor f is
            2 ** (number of blocks - 1).
        layers_per_block (`int`, defaults to 1): Residual layers per encoder block (one more in the decoder).
        act_fn (`str`, defaults to `"silu"`): Activation.
        latent_channels (`int`, defaults to 3): Channels that the encoder ends with and the decoder starts from, as in
            `VQModel`. *Not* the channels of the latents: those are `vq_embed_dim`.
        sample_size (`int`, defaults to 32): Side of the images in pixels; a hint for pipelines, not a limit.
        num_vq_embeddings (`int`, defaults to 256): K, codevectors in the codebook.
        norm_num_groups (`int`, defaults to 32): Groups of the group norms.
        vq_embed_dim (`int`, *optional*): n_q, channels of the latents; `latent_channels` if not given.
        scaling_factor (`float`, *optional*): 1 / standard deviation of the latents over the training set. None until it
            is measured (the trainer does it); a pipeline that needs it says so.
        norm_type (`str`, defaults to `"group"`): `"spatial"` gives MoVQ's modulated decoder, which needs `vq_embed_dim`
            equal to `latent_channels`.
        mid_block_add_attention (`bool`, defaults to True): Attention in the middle of encoder and decoder.
        lookup_from_codebook (`bool`, defaults to False): Not used, for configs of `VQModel`; use `decode_indices`.
        force_upcast (`bool`, defaults to False): Not used, for configs of `VQModel`.
        codevector_dim (`int`, *optional*): d, channels of a codevector; `vq_embed_dim` if not given (m = 1).
        interpolation_factor, segment_layout, distance, commitment_weight: See `LooCQuantizer`.
        anchor, usage_decay, codebook_update, gradient: See `LooCQuantizer`.
        latents_mean (`list[float]`, *optional*): Mean of each of the n_q channels of the latents over the training set.
        latents_std (`list[float]`, *optional*): Their standard deviations. A diffusion model then works on
            (latents - latents_mean) / latents_std * scaling_factor; see `looc_ldm.models.scaling`.

    Attributes:
        use_slicing (`bool`): Whether images of a batch pass encoder and decoder one at a time; see `enable_slicing`.
        use_tiling (`bool`): Whether large images pass them in tiles; see `enable_tiling`.
        tile_sample_min_size (`int`, 128): Side of a tile in pixels, even. Smaller images are not cut.

    Raises:
        ValueError: Sizes that do not fit together, see `LooCQuantizer`; `latents_mean` or `latents_std` that are not
            n_q finite numbers, or deviations that are not positive.

    Example:

    ```py
    >>> import torch
    >>> from looc_ldm import LooCVQModel
    >>> model = LooCVQModel(block_out_channels=(32,), vq_embed_dim=4, codevector_dim=4, num_vq_embeddings=256)
    >>> x = torch.rand(1, 3, 32, 32) * 2 - 1
    >>> latents = model.encode(x).latents
    >>> image = model.decode(latents).sample
    >>> model.decode_indices(model.encode_indices(x)).sample.shape
    torch.Size([1, 3, 32, 32])
    ```
    """

    _supports_gradient_checkpointing = True  # in encoder and decoder blocks, never of the quantizer
    _keep_in_fp32_modules = ["quantize"]
    _no_split_modules = ["ResnetBlock2D", "Attention", "LooCQuantizer"]
    _supports_group_offloading = True  # the codebook is called, not read, wherever it is used
    _group_offload_block_modules = ["encoder", "quant_conv", "quantize", "embedding", "post_quant_conv", "decoder"]

    use_slicing = False
    use_tiling = False
    tile_sample_min_size = 128

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float | None = None,
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
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
        vq_embed_dim = vq_embed_dim if vq_embed_dim is not None else latent_channels
        if not len(down_block_types) == len(up_block_types) == len(block_out_channels):
            raise ValueError(
                "down_block_types, up_block_types and block_out_channels must have one length, got "
                f"{len(down_block_types)}, {len(up_block_types)} and {len(block_out_channels)}."
            )
        if norm_type == "spatial" and vq_embed_dim != latent_channels:
            raise ValueError(
                f'norm_type="spatial" needs vq_embed_dim={vq_embed_dim} to equal latent_channels={latent_channels}.'
            )
        if not isinstance(num_vq_embeddings, int) or num_vq_embeddings < 2:  # by 0, VQModel would divide
            raise ValueError(f"num_vq_embeddings must be a whole number of at least 2, got {num_vq_embeddings!r}.")
        # Arguments are read from the config, where `register_to_config` has put them.
        theirs = {name: self.config[name] for name in VQMODEL_SETTINGS if name in self.config}
        super().__init__(**theirs | {"vq_embed_dim": vq_embed_dim})
        self._make_quantizer(vq_embed_dim)

    def _make_quantizer(self, vq_embed_dim: int) -> None:
        for name in ("latents_mean", "latents_std"):
            if self.config[name] is not None:
                check_channel_values(name, self.config[name], vq_embed_dim)
        factor = self.config.scaling_factor
        if factor is not None:
            check_factor(factor)
        if factor == VQMODEL_DEFAULT_FACTOR:
            raise ValueError(
                f"scaling_factor={VQMODEL_DEFAULT_FACTOR} is the default of VQModel, not measured: give None, or call "
                "from_config(vq.config) for the config of a VQModel."
            )
        d = self.config.codevector_dim
        settings = {name: self.config[name] for name in QUANTIZER_SETTINGS}
        self.quantize = LooCQuantizer(
            vq_embed_dim, self.config.num_vq_embeddings, vq_embed_dim if d is None else d, **settings
        )

    @functools.wraps(VQModel.save_pretrained, assigned=())  # pipelines look at its arguments
    def save_pretrained(self, *args, **kwargs):
        """As `ModelMixin.save_pretrained`.

        Raises:
            ValueError: A different kind of quantizer was assigned. The config does not describe it, so loading would
                put its weights into a `LooCQuantizer`.
        """
        if not isinstance(self.quantize, LooCQuantizer):
            raise ValueError(
                f"this model has a {type(self.quantize).__name__}, but a saved {type(self).__name__} always loads with "
                "a LooCQuantizer. Save its state_dict() instead. To load it, build the model, assign the quantizer and "
                "call load_state_dict()."
            )
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """Load a model, as `ModelMixin.from_pretrained` does, but never from pickles, which can run any code.

        Weights that are not safetensors raise an OSError; `use_safetensors=False` allows them.
        The folder of a plain `VQModel` loads as what it is: s = 1, Euclidean distance, one code per position.

        Raises:
            ModelError: The names of the weights have a prefix that `torch.compile` or DDP added.
        """
        kwargs.setdefault("use_safetensors", True)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        refuse_wrapped(info["unexpected_keys"])
        if "quantize.usage" in info["missing_keys"]:
            # The codevectors of a VQModel must not count as unused.
            model.quantize.usage.fill_(1 / model.quantize.num_codevectors)
        return (model, info) if output_loading_info else model

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As `ConfigMixin.extract_init_dict`, for configs of earlier versions and of diffusers' `VQModel`, too."""
        # In memory a config does not name its class. A VQModel's has all arguments of VQModel, and none of ours.
        ours = inspect.signature(cls.__init__).parameters.keys() - VQMODEL_SETTINGS - {"self"}
        unnamed = config_dict.keys() >= VQMODEL_SETTINGS and not ours & config_dict.keys()
        plain = config_dict.get("_class_name") == "VQModel" or unnamed
        # Withdrawn arguments only made a difference to training.
        config_dict = {name: value for name, value in config_dict.items() if name not in WITHDRAWN}
        if plain:
            as_it_is = {"interpolation_factor": 1, "distance": "euclidean"}
            config_dict |= as_it_is | {"scaling_factor": measured_factor(config_dict)}
        return super().extract_init_dict(config_dict, **kwargs)

    @property
    def downsampling_factor(self) -> int:
        """f, the ratio of the image's side to the latents' side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def enable_tiling(self, tile_sample_min_size: int | None = None) -> None:
        """Encode and decode images larger than a tile in tiles, for inference in little memory.

        Not an approximation: results with and without tiles differ by rounding only (`looc_ldm.models.tiling`).
        Attention, at latent resolution, still sees the whole image, and a model with f = 1 gains nothing. Tiled results
        carry no gradient.

        Args:
            tile_sample_min_size (`int`, *optional*): Side of a tile in pixels, even; unchanged if not given.

        Raises:
            NotImplementedError: Encoder and decoder are other networks than diffusers'.
            ValueError: `tile_sample_min_size` is not a positive even number.
        """
        if not isinstance(self.decoder, Decoder):
            raise NotImplementedError(f"Tiling is not implemented for {type(self).__name__}.")
        if tile_sample_min_size is not None:
            if tile_sample_min_size < 2 or tile_sample_min_size % 2:
                raise ValueError(f"tile_sample_min_size must be a positive even number, got {tile_sample_min_size!r}.")
            self.tile_sample_min_size = tile_sample_min_size
        super().enable_tiling()

    def set_default_attn_processor(self) -> None:
        """Compute attention by plain matrix products, as `AutoencoderKL` does after this call."""
        self.set_attn_processor(AttnProcessor())

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[torch.Tensor]:
        """Encode images to latents, *before* quantization.

        Args:
            x (`torch.Tensor` of shape `(B, in_channels, H, W)`): Images in [-1, 1]; f must divide H and W.
            return_dict (`bool`, defaults to True): False for a plain tuple.

        Returns:
            `VQEncoderOutput`: `latents` of shape `(B, n_q, H / f, W / f)`.
        """
        f = self.downsampling_factor
        if x.ndim != 4 or x.shape[1] != self.config.in_channels or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(
                f"images must have the shape (batch, {self.config.in_channels}, height, width) with height and width "
                f"divisible by {f}, got {tuple(x.shape)}."
            )
        slices = x.split(1) if self.use_slicing else [x]
        latents = torch.cat([self._encode(images) for images in slices])
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self, h: torch.Tensor, force_not_quantize: bool = False, return_dict: bool = True, shape=None
    ) -> LooCDecoderOutput | tuple[torch.Tensor, ...]:
        """Quantize latents and decode them.

        Args:
            h (`torch.Tensor` of shape `(B, n_q, h, w)`): Latents, as `encode` returns them (not scaled).
            force_not_quantize (`bool`, defaults to False): Decode `h` itself.
            return_dict (`bool`, defaults to True): False for `(sample, commit_loss)`, as `VQModel` returns.
            shape: Not used; part of `VQModel`'s signature.

        Returns:
            `LooCDecoderOutput`: sample, commit_loss, indices, perplexity.
        """
        if force_not_quantize:
            quantized, loss, perplexity, indices = h, torch.zeros((), device=h.device), None, None
        else:
            quantized, loss, (perplexity, _, indices) = self.quantize(h)
        sample = self._decode_quantized(quantized)
        if not return_dict:
            return sample, loss
        return LooCDecoderOutput(sample=sample, commit_loss=loss, indices=indices, perplexity=perplexity)

    @apply_forward_hook
    @torch.no_grad()
    def encode_indices(self, x: torch.Tensor) -> torch.Tensor:
        """Return the indices of images `(B, in_channels, H, W)` in [-1, 1], int64 `(B, H / f, W / f, C)`."""
        return self.quantize.encode_indices(self.encode(x).latents)

    @apply_forward_hook
    @torch.no_grad()
    def decode_indices(self, indices: torch.Tensor) -> LooCDecoderOutput:
        """Decode indices `(B, h, w, C)`. Raises ValueError for a wrong shape or indices out of range."""
        quantized = self.quantize.decode_indices(indices).to(self.dtype)
        return LooCDecoderOutput(sample=self._decode_quantized(quantized), indices=indices)

    def bits_per_image(self, height: int, width: int) -> float:
        """Return the rate in bits, h * w * C * log2(K), of an image of `height` x `width` pixels."""
        f = self.downsampling_factor
        if height % f or width % f:
            raise ValueError(f"height and width must be divisible by {f}, got {height}x{width}.")
        return (height // f) * (width // f) * self.quantize.bits_per_position

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> LooCDecoderOutput | tuple[torch.Tensor, ...]:
        """Encode, quantize and decode images `(B, in_channels, H, W)` in [-1, 1]; returns what `decode` returns."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        if self._needs_tiles(*x.shape[2:]):
            return self.quant_conv(encode_in_tiles(self.encoder, x, self.tile_sample_min_size))
        return self.quant_conv(self.encoder(x))

    def _decode_quantized(self, quantized: torch.Tensor) -> torch.Tensor:
        slices = quantized.split(1) if self.use_slicing else [quantized]
        return torch.cat([self._decode(latents) for latents in slices])

    def _decode(self, quantized: torch.Tensor) -> torch.Tensor:
        spatial = quantized if self.config.norm_type == "spatial" else None
        sample = self.post_quant_conv(quantized)
        f = self.downsampling_factor
        if self._needs_tiles(sample.shape[2] * f, sample.shape[3] * f):
            return decode_in_tiles(self.decoder, sample, spatial, self.tile_sample_min_size)
        return self.decoder(sample, spatial)

    def _needs_tiles(self, height: int, width: int) -> bool:
        if not self.use_tiling or max(height, width) <= self.tile_sample_min_size:
            return False
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("Tiled results carry no gradient: train with disable_tiling(), or call eval().")
        if torch.jit.is_tracing():
            raise RuntimeError("Tiles depend on the size of the image, which a trace does not know: disable_tiling().")
        return True
