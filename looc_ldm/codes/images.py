"""Encode images to codes and decode codes to images, at the images' own sizes.

`encode_image` and `decode_image` are for single images; docs/looc_format.md has examples.

An image whose sides are not multiples of the downsampling factor f is padded at its right and lower edge by repeating
its last pixels, and decoded images are cut back. With f = 8, the outermost four pixels of photographs gain 0.5 to 0.6
dB over mirrored padding, and 4 dB over black. (A model trained on images in black frames prefers black.)

On one machine, device and dtype, the same images in the same batches give the same codes. A different batch size,
device, dtype or version of PyTorch changes the last digits: if two codevectors are about equally near, the choice may
change (on a CPU, between batch sizes, for up to 4 in 100,000 codes). Decoded pixels are as reproducible.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from looc_ldm.codes.looc_file import FINGERPRINT_BYTES, CodesError, ImageCodes, index_dtype
from looc_ldm.images.pixels import MODES, as_shown, read_image, to_float, to_pil, to_uint8
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.fingerprint import model_fingerprint
from looc_ldm.models.small import LooCSmallVQModel
from looc_ldm.utils.errors import DataError


def short_fingerprint(model: LooCVQModel) -> str:
    """Return the half of `model_fingerprint` that codes carry. Call it before casting the model."""
    return model_fingerprint(model)[: 2 * FINGERPRINT_BYTES]


def encode_image(model: LooCVQModel, image: Image.Image, fingerprint: str | None = None) -> bytes:
    """Encode one PIL image of any size, in a mode that `pixels_of` takes.

    Args:
        model: In eval mode.
        image: The image.
        fingerprint: `short_fingerprint` of the model; if not given, it is computed, which reads all weights. Must be
            given for a model that was cast to a different dtype after loading.

    Returns:
        `bytes`: The content of a `.looc` file.
    """
    pixels = pixels_of(image, model.config.in_channels)
    indices = encode_pixels(model, pixels[None])[0]
    fingerprint = fingerprint or short_fingerprint(model)
    return ImageCodes(indices, *pixels.shape[:2], model.config.num_vq_embeddings, fingerprint).to_bytes()


def decode_image(model: LooCVQModel, content: bytes, fingerprint: str | None = None) -> Image.Image:
    """Decode the content of a `.looc` file to a grey or RGB image.

    Args:
        model: The model that encoded it, in eval mode.
        content: Bytes returned by `encode_image`.
        fingerprint: As in `encode_image`.

    Raises:
        CodesError: The content is damaged, or from a different model.
    """
    codes = ImageCodes.from_bytes(content)
    check_codes(codes, model, fingerprint or short_fingerprint(model))
    pixels = decode_pixels(model, codes.indices[None], codes.height, codes.width)[0]
    return image_of(pixels)


def check_codes(codes: ImageCodes, model: LooCVQModel, fingerprint: str, name: str = "the content") -> None:
    """Raise CodesError for codes that were not made by `model`, which has this `short_fingerprint`."""
    if codes.fingerprint != fingerprint:
        raise CodesError(f"{name} is from a different model, {codes.fingerprint}; this model is {fingerprint}.")
    f, channels = model.downsampling_factor, model.quantize.codes_per_position
    expected = (-(-codes.height // f), -(-codes.width // f), channels)
    if codes.indices.shape != expected or codes.num_codevectors != model.config.num_vq_embeddings:
        raise CodesError(
            f"{name} is impossible: {codes.indices.shape} codes of {codes.num_codevectors} codevectors; this model "
            f"has {expected} of {model.config.num_vq_embeddings} for {codes.width}x{codes.height} pixels."
        )


def set_tiling(model: LooCVQModel, pixels: int, budget: int) -> None:
    """Enable the model's tiling if `pixels` exceeds `budget`, else disable it. `LooCSmallVQModel` has no tiling."""
    if pixels <= budget or isinstance(model, LooCSmallVQModel):
        model.disable_tiling()
    else:
        model.enable_tiling()


def encode_pixels(model: LooCVQModel, pixels: np.ndarray) -> np.ndarray:
    """Return indices `(B, h, w, C)`, in the smallest unsigned dtype, of uint8 images `(B, H, W, channels)` of any size.

    h and w are H / f and W / f, rounded up.
    """
    f = model.downsampling_factor
    _, height, width, _ = pixels.shape
    padded = np.pad(pixels, ((0, 0), (0, -height % f), (0, -width % f), (0, 0)), mode="edge")
    x = to_float(torch.from_numpy(padded).to(model.device)).permute(0, 3, 1, 2)
    indices = model.encode_indices(x.to(model.dtype).contiguous())
    return indices.cpu().numpy().astype(index_dtype(model.config.num_vq_embeddings))


def decode_pixels(model: LooCVQModel, indices: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the images of indices `(B, h, w, C)`, uint8 `(B, height, width, channels)` without their padding."""
    sample = model.decode_indices(torch.from_numpy(indices.astype(np.int64)).to(model.device)).sample
    return to_uint8(sample[..., :height, :width]).permute(0, 2, 3, 1).cpu().numpy()


def image_of(pixels: np.ndarray) -> Image.Image:
    """Return uint8 pixels `(H, W, channels)` as a grey or RGB PIL image."""
    return to_pil(torch.from_numpy(pixels).permute(2, 0, 1))


def pixels_of(image: Image.Image, channels: int) -> np.ndarray:
    """Return a PIL image as a viewer shows it, uint8 `(H, W, channels)`; 1 channel is grey, 3 are RGB.

    Raises:
        DataError: 32-bit pixels, whose range is not known.
    """
    return _as_array(as_shown(image, MODES[channels]))


def read_pixels(content: bytes | str | Path | None, name: str, channels: int) -> np.ndarray:
    """Read an encoded image or image file as uint8 `(H, W, channels)`. Raises DataError that names `name`."""
    try:
        return _as_array(read_image(content, MODES[channels], name))
    except MemoryError:
        raise DataError(f"cannot read {name}: not enough memory.") from None


def _as_array(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]
