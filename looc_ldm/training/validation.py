"""Measure during training: reconstructions (stage 1), samples (stage 2), and the use of the codebook.

Nothing here leaves a trace in the training: random number generators and the modes of models are put back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.utils import make_image_grid
from PIL import Image
from torch.utils.data import Subset

from looc_ldm.images.image_set import ImageSet, spread
from looc_ldm.images.pixels import to_float, to_pil, to_uint8
from looc_ldm.metrics.collect import Features
from looc_ldm.metrics.generation import Network, collect_features
from looc_ldm.metrics.generation import generation_figures as generation_figures_of
from looc_ldm.metrics.reconstruction import eval_mode, evaluate_reconstruction
from looc_ldm.metrics.reference import ReferenceCache
from looc_ldm.metrics.shares import share_of_batches
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.pipelines.sampling import sample_images
from looc_ldm.quantizer.loocq import LooCQuantizer
from looc_ldm.training.checks import features_of_config
from looc_ldm.training.config import DiffusionConfig, EvaluationConfig
from looc_ldm.training.data import float_batches
from looc_ldm.utils.distributed import on_main

logger = logging.getLogger(__name__)

FEATURE_BATCH = 32  # images that a loader's worker reads, or the Inception network sees, at a time
SAMPLE_BATCH = 64  # images drawn at a time, if the training batch is not smaller; the same for any number of processes
LOGGED = ("images", "psnr", "ssim", "l1", "lpips", "codebook_use", "perplexity", "bits_per_pixel")


# The codebook ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def codebook_use(quantizer: LooCQuantizer) -> dict[str, float]:
    """Measure how the codebook was used lately, by the moving averages in `usage`. Waits for the device.

    Returns:
        `dict`: `dead_codes`: the number of codevectors that revival would move more than half way to their anchor,
        alpha_k > 1/2 (see `LooCQuantizer.revive`). Their share of the indices is below about
        log(2) / 10 * (1 - gamma) / K, at gamma=0.99 a 1,400th of the average share. `codebook_use`: the part of the
        codebook that is not dead, in [0, 1]. `codebook_perplexity`: exp of the entropy of the average shares, in
        [1, K].
    """
    usage, codes = quantizer.usage.double().cpu(), quantizer.num_codevectors
    moved = torch.exp(-10 * codes * usage / (1 - quantizer.usage_decay) - 1e-3)  # alpha of `revive`
    dead = int((moved > 0.5).sum())
    shares = usage / usage.sum().clamp_min(torch.finfo(usage.dtype).tiny)
    return {
        "codebook_use": 1 - dead / codes,
        "codebook_perplexity": torch.special.entr(shares).sum().exp().item(),
        "dead_codes": dead,
    }


# Stage 1 --------------------------------------------------------------------------------------------------------------


def reconstruction_figures(
    model: LooCVQModel,
    images: ImageSet,
    evaluation: EvaluationConfig,
    batch_size: int,
    num_workers: int,
    lpips: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, float | int]:
    """Measure reconstructions of `evaluation.images` images of a set, at even distances.

    On one process: not a collective.

    Returns:
        `dict` of the figures of `evaluate_reconstruction` that are worth a curve: `images` (their number), `psnr`,
        `ssim`, `l1`, `lpips` if it is given, `codebook_use` (the share of codevectors that these images used),
        `perplexity`, `bits_per_pixel`, and with `evaluation.fid` for instance `rfid@2048`.
    """
    features = features_of_config(evaluation) if evaluation.fid else None
    chosen = spread(len(images), evaluation.images)
    with _random_state_kept(model.device):
        batches = float_batches(Subset(images, chosen), batch_size, num_workers)
        named = {} if lpips is None else {"lpips": lpips}
        report = evaluate_reconstruction(model, batches, images.content_size, features, named)
    return {name: value for name, value in report.items() if name in LOGGED or name.startswith("rfid@")}


@torch.no_grad()
def reconstruction_grid(models: Sequence[LooCVQModel], images: ImageSet, count: int) -> Image.Image:
    """Return a row of `count` images of a set, at even distances, above one row of reconstructions per model."""
    originals = torch.stack([images[int(index)][0] for index in spread(len(images), count)])
    cells = list(originals)
    for model in models:
        with eval_mode(model):
            pixels = to_float(originals).to(model.device, model.dtype)
            cells.extend(to_uint8(model.decode(model.encode(pixels).latents).sample).cpu())
    return make_image_grid([to_pil(cell) for cell in cells], rows=1 + len(models), cols=len(originals))


# Stage 2 --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generation_figures(
    pipe: LooCLDMPipeline, images: ImageSet, config: DiffusionConfig, accelerator: Accelerator
) -> dict[str, float | int]:
    """Measure FID and KID between `evaluation.images` samples and as many images. Collective; all get the figures.

    The samples have the same seed and labels at every call and for any number of processes. The numbers of samples
    per class differ by at most one. Steps and guidance scale are the same as in the sample
    grids.

    The images are taken at even distances in the set. Their features are computed once and kept in the run's folder
    `reference`.

    Use the figures for curves. FID falls with the number of images, and published values compare 50,000 samples with
    all training images. KID has no such bias.

    Args:
        images (`ImageSet`): The training images; if these are streamed, the validation images.
        config (`DiffusionConfig`): Its `evaluation`, `preview_steps`, `preview_guidance_scale` and `seed`.

    Returns:
        `dict`: for instance `fid@2048` and `kid@2048` (2048 features), and `samples`, `reference_images`, `steps` and
        `guidance_scale`.
    """
    count = config.evaluation.images
    guidance = config.preview_guidance_scale if pipe.config.null_class_label is not None else 1.0
    features = features_of_config(config.evaluation)
    classes = pipe.class_ids
    labels = [classes[i * len(classes) // count] if classes else None for i in range(count)]

    def draw(indices: list[int]) -> Iterator[torch.Tensor]:
        return sample_images(
            pipe,
            labels,
            seed=config.seed,
            batch_size=min(SAMPLE_BATCH, config.batch_size),
            progress=accelerator.is_main_process,
            indices=indices,
            num_inference_steps=config.preview_steps,
            guidance_scale=guidance,
        )

    with _random_state_kept(accelerator.device):
        network = features.load(accelerator.device)
        reference = _reference_features(network, images, config, accelerator)
        drawn = features_of_share(network, draw, count, accelerator)

    def measure() -> dict[str, float | int]:
        sides = {"inception": drawn}, {"inception": reference}
        figures = generation_figures_of(("fid", "kid"), *sides, {"inception": features.name})
        return {name: value for name, value in figures.items() if not name.startswith("kid_std")} | {
            "samples": drawn.moments.count,
            "reference_images": reference.moments.count,
            "steps": config.preview_steps,
            "guidance_scale": guidance,
        }

    return on_main(accelerator, measure)


def _reference_features(
    network: Network, images: ImageSet, config: DiffusionConfig, accelerator: Accelerator
) -> Features | None:
    """Return the features of the images compared with, on the main process. Collective."""
    cache, key = ReferenceCache(Path(config.output_dir) / "reference"), _reference_key(images, config)
    stored = cache.load(key) if accelerator.is_main_process else None
    if broadcast_object_list([stored is not None])[0]:
        return stored
    chosen = spread(len(images), config.evaluation.images)

    def read(places: list[int]) -> Iterator[torch.Tensor]:
        for batch in float_batches(Subset(images, chosen[places]), FEATURE_BATCH, config.data.num_workers):
            yield from to_uint8(batch)

    features = features_of_share(network, read, len(chosen), accelerator)
    if accelerator.is_main_process:
        cache.save(key, features)
    return features


def features_of_share(
    network: Network,
    images_at: Callable[[list[int]], Iterable[torch.Tensor]],
    count: int,
    accelerator: Accelerator,
) -> Features:
    """Compute features of `count` images, a part on each process. Collective; complete on the main process.

    `images_at` returns the images at some of the `count` places, uint8 `(C, H, W)`, in their order.
    """
    shares = share_of_batches(count, FEATURE_BATCH, accelerator)
    images = iter(images_at([place for share in shares for place in share]))
    batches = (torch.stack(list(islice(images, len(share)))) for share in shares)
    networks = {"inception": network}
    return collect_features(batches, networks, {"inception"}, accelerator, device=accelerator.device)["inception"]


def _reference_key(images: ImageSet, config: DiffusionConfig) -> dict:
    """Return all that decides the reference features: the images, their transform, their number, and the network."""
    data = {k: v for k, v in asdict(config.data).items() if k not in ("num_workers", "max_unreadable_share")}
    network = features_of_config(config.evaluation).identity()
    del network["weights"]  # their path does not matter
    return {"data": data, "length": len(images), "images": config.evaluation.images, "network": network}


def _random_state_kept(device: torch.device) -> AbstractContextManager:
    """Keep the random numbers of training as they would be without a measurement, so that resuming is exact."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
