"""Convert weights of the authors' LooC and CVQ-VAE, taming's VQGAN and CompVis LDM (docs/convert.md).

tensors = read_checkpoint(Path("last.ckpt"))
settings = settings_of(read_original_config(Path("model.yaml")), kind_of(tensors))
model, updates = convert_autoencoder(tensors, "vqgan", settings)
"""

from __future__ import annotations

from looc_ldm.convert.autoencoders import convert_small, convert_vqgan, small_kind
from looc_ldm.convert.checkpoint import Tensors, under, with_ema, without_ema
from looc_ldm.convert.checkpoint import read_checkpoint as read_checkpoint
from looc_ldm.convert.ldm import FIRST_STAGE, UNET
from looc_ldm.convert.ldm import convert_ldm as convert_ldm
from looc_ldm.convert.settings import Settings
from looc_ldm.convert.settings import read_original_config as read_original_config
from looc_ldm.convert.settings import settings_of as settings_of
from looc_ldm.convert.unet import convert_unet as convert_unet
from looc_ldm.models.autoencoder import LooCVQModel, refuse_wrapped
from looc_ldm.utils.errors import ModelError

# Parts of taming's Net2NetTransformer around a VQGAN (taming/models/cond_transformer.py).
TRANSFORMER = ("transformer.", "cond_stage_model.", "permuter.")


def kind_of(tensors: Tensors) -> str:
    """Return `"looc"`, `"cvq"`, `"vqgan"` or `"ldm"` by the keys. Raise ModelError if none or two fit."""
    if any(key.startswith(UNET) for key in tensors):
        return "ldm"
    if "_pre_vq_conv.weight" in tensors and "_vq_vae.embedding.weight" in tensors:
        kind = small_kind(tensors)
        if kind is None:
            raise ModelError(
                "the weights fit both LooC's small VQ-VAE and CVQ-VAE's small model: choose --kind looc or --kind cvq."
            )
        return kind
    if any(key.startswith(("encoder.down.0.", f"{FIRST_STAGE}encoder.down.0.")) for key in tensors):
        return "vqgan"
    refuse_wrapped(tensors)
    raise ModelError(
        "not a checkpoint of LooC, CVQ-VAE, taming's VQGAN or LDM: its first weight is "
        f"{next(iter(tensors), 'missing')!r}."
    )


def convert_autoencoder(
    tensors: Tensors, kind: str, settings: Settings, use_ema: bool = True
) -> tuple[LooCVQModel, int | None]:
    """Convert the autoencoder of a checkpoint of the kind `"looc"`, `"cvq"` or `"vqgan"`.

    Returns:
        The model, and the number of updates of its averaged weights: -1 if unknown, None for live weights.
    """
    if kind != "vqgan":
        if "_pre_vq_conv.weight" not in tensors or "_vq_vae.embedding.weight" not in tensors:
            raise ModelError(f"not a small VQ-VAE, as --kind {kind} says: no _pre_vq_conv and _vq_vae.embedding.")
        return convert_small(tensors, kind, settings), None
    if "encoder.conv_in.weight" not in tensors:
        surplus = [key for key in tensors if not key.startswith((FIRST_STAGE, *TRANSFORMER))]
        if surplus:
            raise ModelError(f"not a VQGAN: unexpected {surplus[0]} and {len(surplus) - 1} more.")
        tensors = under(tensors, FIRST_STAGE)
    tensors, updates = with_ema(tensors) if use_ema else (without_ema(tensors), None)
    return convert_vqgan(tensors, settings), updates
