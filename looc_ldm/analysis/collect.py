"""Collect, in one pass over the images, everything that `looc-ldm analyze` draws."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from looc_ldm.images.pixels import centre_crop, to_uint8
from looc_ldm.metrics import psnr
from looc_ldm.metrics.reconstruction import PSNR_CEILING, eval_mode
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.quantizer.statistics import CodebookStatistics, CodeCounter

MOST_SAMPLED = 500  # images in the sample
MOST_SAMPLED_VALUES = 2**26  # their pixel values, and their indices
MOST_VECTORS = 2000  # segments of feature vectors in the sample


@dataclass(frozen=True)
class Sample:
    """Images drawn at random, in the order of the data, with their results. On the CPU.

    `collect` stacks its results in the order of these fields.
    """

    originals: torch.Tensor  # uint8 (S, channels, H, W), with padding
    reconstructions: torch.Tensor  # the same
    indices: torch.Tensor  # int32 (S, h, w, C)
    psnr: torch.Tensor  # float64 (S,), in dB, without padding, at most 100
    vectors: torch.Tensor  # float32 (V, d): some segments before quantization


@dataclass(frozen=True)
class Findings:
    """Results of `collect`, over all images except for `sample`."""

    statistics: CodebookStatistics  # counts of codevectors by segment
    codebook: torch.Tensor  # (K, d)
    distance: str  # setting of the quantizer
    segment_layout: str  # setting of the quantizer
    downsampling_factor: int  # f: pixels along a side of a latent position
    images: int  # number of images
    psnr: float  # mean over images, in dB
    l1: float  # mean absolute error, in [0, 1]
    error_map: torch.Tensor  # float64 (height, width): mean absolute error at each pixel, over images and channels
    content_size: tuple[int, int]  # height and width without padding
    bits_per_pixel: float  # log2 K for every code, per pixel without padding
    sample: Sample  # some of the images

    @property
    def codes_per_image(self) -> int:
        return math.prod(self.sample.indices.shape[1:])

    @property
    def entropy(self) -> float:
        """Entropy of the codes, in bits per code: at most log2 K."""
        return math.log2(self.statistics.perplexity)

    @property
    def entropy_by_segment(self) -> float:
        """Entropy of the codes given their segment, in bits per code: at most `entropy`."""
        counts = self.statistics.counts.double()
        share = counts / counts.sum()
        return ((torch.special.entr(share).sum() - torch.special.entr(share.sum(1)).sum()) / math.log(2)).item()

    @property
    def bits_per_pixel_entropy(self) -> float:
        """Rate of an ideal entropy coder that knows how often each code is chosen in the data."""
        return self.codes_per_image * self.entropy / math.prod(self.content_size)

    def bits_per_pixel_each(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the bits per pixel `(S,)` of each image of indices `(S, h, w, C)` under that coder."""
        counts = self.statistics.counts.sum(0).double()
        lengths = -torch.log2(counts / counts.sum())  # bits of each codevector
        bits = torch.stack([lengths[image.long()].sum() for image in indices])
        return bits / math.prod(self.content_size)

    def content(self, images: torch.Tensor) -> torch.Tensor:
        """Crop the padding off images `(..., H, W)`."""
        return centre_crop(images, self.content_size)


@torch.no_grad()
def collect(
    model: LooCVQModel,
    batches: Iterable[torch.Tensor],
    images: int,
    content_size: tuple[int, int] | None = None,
    seed: int = 0,
) -> Findings:
    """Encode, quantize and decode images once, and collect the data of the figures.

    Memory does not grow with the number of images: counts are summed, and single images are a sample. The model runs
    in eval mode and gets its modes back.

    Args:
        model: The autoencoder.
        batches: Float images in [-1, 1], `(B, C, H, W)` each, all of one size.
        images: Number of images.
        content_size: Height and width inside the padding, where errors and bits per pixel are measured. Default: the
            whole image.
        seed: Seed of the sample.

    Raises:
        ValueError: There are no images, a different number or several sizes of them, or features are not finite.
    """
    if images < 1:
        raise ValueError("There are no images to analyze.")
    counter = CodeCounter(model.quantize)
    sampled: set[int] = set()
    kept: list[tuple[torch.Tensor, ...]] = []
    error_sum, psnr_sum, seen, size = 0.0, 0.0, 0, None
    random = np.random.default_rng(seed)
    with eval_mode(model):
        for batch in batches:
            if size not in (None, tuple(batch.shape[-2:])):
                raise ValueError(f"all images must have one size, got {size} and {tuple(batch.shape[-2:])}.")
            indices, segments = model.quantize.search(model.encode(batch.to(model.device, model.dtype)).latents)
            decoded = model.decode_indices(indices).sample.float()
            if size is None:
                size = tuple(batch.shape[-2:])
                sampled, vectors_each = _draw(images, batch[0].numel(), indices[0].numel(), random)
            counter.update(indices)
            original, reconstruction = (
                (centre_crop(x.to(model.device), content_size).clamp(-1, 1) + 1) / 2 for x in (batch, decoded)
            )
            error_sum = error_sum + (original - reconstruction).abs().mean(1).cpu().double().sum(0)
            psnr_each = psnr(original, reconstruction).clamp(max=PSNR_CEILING).cpu()
            psnr_sum += psnr_each.sum().item()
            for i in range(len(batch)):
                if seen + i in sampled:
                    flat = segments[i].flatten(0, -2)
                    chosen = torch.from_numpy(random.choice(len(flat), min(len(flat), vectors_each), replace=False))
                    image = (to_uint8(batch[i]), to_uint8(decoded[i]), indices[i].int())
                    kept.append(tuple(x.cpu() for x in (*image, psnr_each[i], flat[chosen.to(flat.device)])))
            seen += len(batch)
    if seen != images:
        raise ValueError(f"There should be {images} images, got {seen}.")
    *stacked, vectors = zip(*kept, strict=True)
    error_map = error_sum / images
    return Findings(
        statistics=counter.statistics(),
        codebook=model.quantize.codebook.float().cpu().clone(),
        distance=model.quantize.distance,
        segment_layout=model.quantize.segment_layout,
        downsampling_factor=model.downsampling_factor,
        images=images,
        psnr=psnr_sum / images,
        l1=error_map.mean().item(),
        error_map=error_map,
        content_size=content_size or size,
        bits_per_pixel=model.bits_per_image(*size) / math.prod(content_size or size),
        sample=Sample(*(torch.stack(parts) for parts in stacked), torch.cat(vectors)),
    )


def _draw(images: int, values: int, indices: int, random: np.random.Generator) -> tuple[set[int], int]:
    """Draw the images of the sample, and return them with the number of vectors to take from each."""
    count = max(1, min(images, MOST_SAMPLED, MOST_SAMPLED_VALUES // values, MOST_SAMPLED_VALUES // indices))
    return set(random.choice(images, count, replace=False).tolist()), -(-MOST_VECTORS // count)
