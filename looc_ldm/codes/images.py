"""Codes of images, and images of codes, at the images' own sizes.

`encode_image` and `decode_image` are for single images; `docs/looc_format.md` shows them at work.

An image whose sides are no multiple of the downsampling factor f is padded at its right and lower edge by repeating its
last pixels, and decoded images are cut back. Of repeated, mirrored, grey and black padding, repeated pixels kept the
edges of photographs best: a model with f = 8 gave the outermost four pixels (of sides of 121 and 124) 0.5 to 0.6 dB
more than with mirrored ones, and 4 dB more than with black. (A model trained on images in black frames prefers black.)

On one machine, device and dtype, the same images in the same batches give the same codes. Another batch size, device,
dtype or version of PyTorch rounds otherwise in the last digits: where two codevectors are about equally near, the other
one may be chosen (on a CPU, between batch sizes, none to 4 in 100,000 codes). Decoding follows its codes as closely.
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
    """The half of `model_fingerprint` that codes carry. Take it before the model is cast to another dtype."""
    return model_fingerprint(model)[: 2 * FINGERPRINT_BYTES]


def encode_image(model: LooCVQModel, image: Image.Image, fingerprint: str | None = None) -> bytes:
    """Encode one PIL image, of any size and mode that `pixels_of` takes.

    Args:
        model: In eval mode.
        image: The image.
        fingerprint: `short_fingerprint` of the model; if not given, it is computed, which reads all weights. Must be
            given for a model that was cast to another dtype after loading.

    Returns:
        `bytes`: The content of a `.looc` file.
    """
    pixels = pixels_of(image, model.config.in_channels)
    indices = encode_pixels(model, pixels[None])[0]
    fingerprint = fingerprint or short_fingerprint(model)
    return ImageCodes(indices, *pixels.shape[:2], model.config.num_vq_embeddings, fingerprint).to_bytes()


def decode_image(model: LooCVQModel, content: bytes, fingerprint: str | None = None) -> Image.Image:
    """The image, grey or RGB, in the content of a `.looc` file.

    Args:
        model: The model that encoded it, in eval mode.
        content: What `encode_image` returned.
        fingerprint: As in `encode_image`.

    Raises:
        CodesError: The content is damaged, or of another model.
    """
    codes = ImageCodes.from_bytes(content)
    check_codes(codes, model, fingerprint or short_fingerprint(model))
    pixels = decode_pixels(model, codes.indices[None], codes.height, codes.width)[0]
    return image_of(pixels)


def check_codes(codes: ImageCodes, model: LooCVQModel, fingerprint: str) -> None:
    """Raise CodesError for codes that `model`, with this `short_fingerprint`, has not made."""
    if codes.fingerprint != fingerprint:
        raise CodesError(f"of another model: its fingerprint is {codes.fingerprint}, this model's is {fingerprint}.")
    f, channels = model.downsampling_factor, model.quantize.codes_per_position
    expected = (-(-codes.height // f), -(-codes.width // f), channels)
    if codes.indices.shape != expected or codes.num_codevectors != model.config.num_vq_embeddings:
        raise CodesError(
            f"impossible: {codes.indices.shape} codes of {codes.num_codevectors} codevectors, where this model has "
            f"{expected} of {model.config.num_vq_embeddings} for {codes.width}x{codes.height} pixels."
        )


def set_tiling(model: LooCVQModel, pixels: int, budget: int) -> None:
    """Have the model take images of so many pixels in tiles if they are more than `budget`, and else in one piece.

    The small model has no tiling, and takes all images in one piece.
    """
    if pixels <= budget or isinstance(model, LooCSmallVQModel):
        model.disable_tiling()
    else:
        model.enable_tiling()


def encode_pixels(model: LooCVQModel, pixels: np.ndarray) -> np.ndarray:
    """Codes `(B, h, w, C)`, of the smallest unsigned integers that hold them, of uint8 images `(B, H, W, channels)`.

    H and W may be any; h and w are H / f and W / f, rounded up.
    """
    f = model.downsampling_factor
    _, height, width, _ = pixels.shape
    padded = np.pad(pixels, ((0, 0), (0, -height % f), (0, -width % f), (0, 0)), mode="edge")
    x = to_float(torch.from_numpy(padded).to(model.device)).permute(0, 3, 1, 2)
    indices = model.encode_indices(x.to(model.dtype).contiguous())
    return indices.cpu().numpy().astype(index_dtype(model.config.num_vq_embeddings))


def decode_pixels(model: LooCVQModel, indices: np.ndarray, height: int, width: int) -> np.ndarray:
    """Images of codes `(B, h, w, C)`, as uint8 `(B, height, width, channels)`, without their padding."""
    sample = model.decode_indices(torch.from_numpy(indices.astype(np.int64)).to(model.device)).sample
    return to_uint8(sample[..., :height, :width]).permute(0, 2, 3, 1).cpu().numpy()


def image_of(pixels: np.ndarray) -> Image.Image:
    """uint8 pixels `(H, W, channels)` as a grey or RGB PIL image."""
    return to_pil(torch.from_numpy(pixels).permute(2, 0, 1))


def pixels_of(image: Image.Image, channels: int) -> np.ndarray:
    """A PIL image as a viewer shows it (`as_shown`), as uint8 `(H, W, channels)`; 1 channel is grey, 3 are RGB.

    Raises:
        DataError: 32-bit pixels, whose range is not known.
    """
    return _as_array(as_shown(image, MODES[channels]))


def read_pixels(content: bytes | str | Path | None, name: str, channels: int) -> np.ndarray:
    """Read an encoded image or image file as uint8 `(H, W, channels)`. Raises DataError, with `name` in it."""
    try:
        return _as_array(read_image(content, MODES[channels], name))
    except MemoryError:
        raise DataError(f"cannot read {name}: not enough memory.") from None


def _as_array(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]
