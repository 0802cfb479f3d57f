"""Measure how well an autoencoder reconstructs images, and at which rate: quality, rFID, codebook use, bits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from accelerate.utils import gather_object

from looc_ldm.images.pixels import centre_crop
from looc_ldm.metrics.collect import FeatureCollector, Features
from looc_ldm.metrics.extractors import InceptionFeatures
from looc_ldm.metrics.fidelity import kid
from looc_ldm.metrics.frechet import frechet_distance
from looc_ldm.metrics.protocols import get_protocol
from looc_ldm.metrics.quality import l1, psnr, ssim
from looc_ldm.metrics.shares import at_a_time, places
from looc_ldm.utils.distributed import on_main

if TYPE_CHECKING:
    from accelerate import Accelerator

    from looc_ldm.models.autoencoder import LooCVQModel

PIXEL_METRICS = ("psnr", "ssim", "l1")
FEATURE_METRICS = ("rfid", "kid")
PSNR_CEILING = 100.0  # dB: one wrong bit in one 8-bit value of a 256x256 RGB image is 101 dB


@torch.no_grad()
def evaluate_reconstruction(
    model: LooCVQModel,
    batches: Iterable[torch.Tensor],
    measured_size: tuple[int, int] | None = None,
    features: InceptionFeatures | None = None,
    lpips: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] | None = None,
    protocol: str = "clean",
    metrics: Collection[str] | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, float | int | str]:
    """Encode, quantize and decode images, and measure the reconstructions and the rate.

    The model runs in eval mode and gets its own modes back. Batches are moved to its device and dtype and are not kept;
    KID keeps features.

    Args:
        model (`LooCVQModel`): The autoencoder. Its `quantize` may be any quantizer with `bits_per_position`,
            `codebook_scalars` and `code_counts`, such as the classes of `looc_ldm.baselines`.
        batches: Float images in [-1, 1], `(B, C, H, W)` each, all of one height and width. Process r of R gives the
            batches r, r + R, ... of all (`looc_ldm.metrics.shares`).
        measured_size (`tuple[int, int]`, *optional*): Height and width of the centre that is measured, without padding
            (28x28 in Fashion-MNIST's 32x32), which is easy to reconstruct. Default: the whole image.
        features (`InceptionFeatures`, *optional*): The network of rFID and KID. The "paper" protocol uses
            `pil_resize=229`.
        lpips (`Mapping`, *optional*): Distances of two batches of RGB images in [-1, 1], such as
            `looc_ldm.metrics.lpips.load_lpips` gives, by the name of their figure (`lpips_vgg`, `lpips_alex`).
        protocol (`str`, defaults to `"clean"`): `"clean"` or `"paper"` (`looc_ldm.metrics.protocols`).
        metrics (*optional*): Which of psnr, ssim, l1, rfid and kid to measure. If not given, psnr, ssim, l1, and with
            `features` rfid.
        accelerator (`Accelerator`, *optional*): The processes that share the images. The call is collective then, and
            all of them get the figures, which do not depend on the number of processes.

    Returns:
        `dict`, ready for JSON:

        - `protocol`; `images`: their number; `height`, `width`: the measured size in pixels.
        - `psnr` in dB, `ssim` in [-1, 1], `l1` (mean absolute error in [0, 1]): means over images. An image's PSNR
          counts as at most 100 dB, so that one exact reconstruction does not make the mean infinite.
        - The figures of `lpips`, on images with their padding, since the networks need a minimum size.
        - `rfid@<layer>`: FID of the reconstructions against the originals; `kid@<layer>`, `kid_std@<layer>`.
        - `codebook_use`: share of the codevectors of all codebooks that were used at least once, in [0, 1];
          `dead_codes`: number of the others. `perplexity`: exp of the entropy of the codes of all images, in [1, K];
          `code_entropy`: that entropy in bits per code, in [0, log2 K], the mean over codebooks.
        - `bits_per_image`: rate of the image with its padding at log2(K) bits per code. `bits_per_pixel`: the same per
          *measured* pixel. `bits_per_pixel_entropy`: the same at `code_entropy` bits per code, the rate of an ideal
          entropy coder that knows how often each code is used.
        - `parameters` of the whole model, `codebook_scalars` = K d, `num_codevectors` = K, and `codevector_dim` = d if
          the quantizer has it.

    Raises:
        ValueError: No images, a batch of a different type or range, sizes that differ or do not fit, reconstructions
            that are not finite, weights that cannot be loaded, an unknown protocol or metric.
    """
    rules = get_protocol(protocol)
    chosen = _chosen(metrics, features)
    measures = {
        "psnr": lambda x, y: psnr(x, y).clamp(max=PSNR_CEILING),
        "ssim": lambda x, y: ssim(x, y, rules.ssim_window),
        "l1": l1,
    }
    collectors = []
    if features is not None:
        network = features.load(model.device)
        collectors = [FeatureCollector(keep_vectors="kid" in chosen) for _ in ("originals", "reconstructions")]
    totals = _Totals()

    with eval_mode(model):
        for number, batch in enumerate(batches):
            _check_batch(batch, totals.size)
            totals.size = tuple(batch.shape[-2:])
            output = model.decode(model.encode(batch.to(model.device, model.dtype)).latents)
            if not output.sample.isfinite().all():
                raise ValueError("reconstructions must be finite, got nan or infinite values.")
            whole = [x.to(model.device, torch.float32) for x in (batch, output.sample)]
            measured = [rules.view(centre_crop(x, measured_size)) for x in whole]
            totals.add_codes(model.quantize.code_counts(output.indices), len(batch))
            figures = {name: measure(*measured) for name, measure in measures.items() if name in chosen}
            if lpips:
                pair = [rules.view(x).expand(-1, 3, -1, -1) * 2 - 1 for x in whole]  # grey ones as RGB
                figures |= {name: distance(*pair) for name, distance in lpips.items()}
            for name, values in figures.items():
                totals.sums[name] += values.cpu().double().sum().item()
            where, size = places(number, len(batch), accelerator), at_a_time(model.device)
            for collector, images in zip(collectors, measured, strict=False):  # there may be none
                for part, place in zip(rules.as_uint8(images).split(size), where.split(size), strict=True):
                    collector.update(network(part), place)
    totals = totals.reduce(accelerator)
    if not totals.images:
        raise ValueError("There are no images to reconstruct: batches is empty.")

    report = _report(model, totals, measured_size, protocol)
    if features is not None:
        sides = [collector.collect(accelerator) for collector in collectors]
        report |= on_main(accelerator, lambda: _distances(*sides, chosen, features.name))
    return report


@dataclass
class _Totals:
    """Sums over images, and how often each code was used, on one process or on all."""

    sums: Counter[str, float] = field(default_factory=Counter)
    images: int = 0
    size: tuple[int, int] | None = None  # images as the network sees them
    code_counts: list[torch.Tensor] = field(default_factory=list)  # (K,) int64 of each codebook; none before images

    def add_codes(self, counts: list[torch.Tensor], images: int) -> None:
        self.images += images
        if counts:
            before = self.code_counts or [0] * len(counts)
            self.code_counts = [old + new for old, new in zip(before, counts, strict=True)]

    def reduce(self, accelerator: Accelerator | None) -> _Totals:
        """Return the totals of all processes. Collective."""
        if accelerator is None or accelerator.num_processes == 1:
            return self
        together = _Totals()
        for totals in gather_object([self]):
            if together.size is not None and totals.size not in (None, together.size):
                raise ValueError(f"all images must have one size, got {together.size} and {totals.size}.")
            together.size = totals.size or together.size
            together.add_codes(totals.code_counts, totals.images)
            together.sums.update(totals.sums)
        return together


def _chosen(metrics: Collection[str] | None, features: InceptionFeatures | None) -> list[str]:
    if metrics is None:
        return [*PIXEL_METRICS, *(["rfid"] if features is not None else [])]
    for name in metrics:
        if name not in (*PIXEL_METRICS, *FEATURE_METRICS):
            raise ValueError(f"metrics must be some of {', '.join((*PIXEL_METRICS, *FEATURE_METRICS))}, got {name!r}.")
        if name in FEATURE_METRICS and features is None:
            raise ValueError(f"{name} needs features.")
    return list(metrics)


def _report(model: LooCVQModel, totals: _Totals, measured_size: tuple[int, int] | None, protocol: str) -> dict:
    height, width = measured_size if measured_size is not None else totals.size
    bits = model.bits_per_image(*totals.size)
    codes = sum(int(counts.sum()) for counts in totals.code_counts)
    shares = ((counts.double() / counts.sum(), counts.sum()) for counts in totals.code_counts)
    nats = sum((torch.special.entr(share).sum() * count).item() for share, count in shares)
    entropy, codes_per_image = nats / codes, codes / totals.images
    num_codevectors = sum(len(counts) for counts in totals.code_counts)
    used = sum(int((counts > 0).sum()) for counts in totals.code_counts)
    return {
        "protocol": protocol,
        "images": totals.images,
        "height": height,
        "width": width,
        **{name: total / totals.images for name, total in totals.sums.items()},
        "codebook_use": used / num_codevectors,
        "dead_codes": num_codevectors - used,
        "perplexity": math.exp(entropy),
        "code_entropy": entropy / math.log(2),
        "bits_per_image": bits,
        "bits_per_pixel": bits / (height * width),
        "bits_per_pixel_entropy": codes_per_image * entropy / math.log(2) / (height * width),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "codebook_scalars": model.quantize.codebook_scalars,
        "num_codevectors": num_codevectors,
        **({"codevector_dim": model.quantize.codevector_dim} if hasattr(model.quantize, "codevector_dim") else {}),
    }


def _distances(originals: Features, reconstructions: Features, names: Collection[str], suffix: str) -> dict[str, float]:
    figures = {}
    if "rfid" in names:
        figures[f"rfid@{suffix}"] = frechet_distance(reconstructions.moments, originals.moments)
    if "kid" in names:
        mean, deviation = kid(reconstructions.vectors, originals.vectors)
        figures |= {f"kid@{suffix}": mean, f"kid_std@{suffix}": deviation}
    return figures


def _check_batch(batch: torch.Tensor, size: tuple[int, int] | None) -> None:
    if not batch.is_floating_point() or batch.ndim != 4 or not batch.numel() or not batch.abs().max() <= 1:
        raise ValueError(
            "batches must hold float images (batch, channels, height, width) in [-1, 1], "
            f"got {batch.dtype} of shape {tuple(batch.shape)}"
            + (f" from {batch.min().item():g} to {batch.max().item():g}." if batch.numel() else ".")
        )
    if size is not None and size != tuple(batch.shape[-2:]):
        raise ValueError(f"all images must have one size, got {size} and {tuple(batch.shape[-2:])}.")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode, and give every module its own mode back: some may be frozen in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
