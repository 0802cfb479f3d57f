"""Many images from a pipeline, in batches, each with its own generator."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from tqdm.auto import tqdm

from looc_ldm.images.pixels import to_uint8
from looc_ldm.pipelines.ldm import LooCLDMPipeline


def sample_images(
    pipe: LooCLDMPipeline,
    labels: list[int | str | None],
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
    indices: Sequence[int] | None = None,
    **arguments,
) -> Iterator[torch.Tensor]:
    """Draw images and yield them one by one, uint8 `(C, H, W)`, on the CPU.

    Image i is drawn with a generator seeded by (seed, i), so that the set does not depend on `batch_size`.

    Args:
        labels (`list`): The class of each image; None for the null class, or for unconditional models.
        seed (`int`): Seed of the whole set, in [0, 2**32).
        batch_size (`int`): Images drawn at a time.
        progress (`bool`): Show a progress bar over images.
        indices (`Sequence[int]`, *optional*): The images of the set to draw, for instance the share of one of several
            processes; all if not given.
        **arguments: Arguments of the pipeline's call (`num_inference_steps`, `guidance_scale`, ...).

    Raises:
        ValueError: Before the first image, if the pipeline refuses its arguments.
    """
    pipe = copy.copy(pipe)  # with the same models, so that the caller's pipeline keeps its progress bar
    pipe.set_progress_bar_config(disable=True)
    indices = range(len(labels)) if indices is None else indices
    with tqdm(total=len(indices), desc="sampling", unit="img", delay=1, disable=not progress) as bar:
        for start in range(0, len(indices), batch_size):
            drawn = indices[start : start + batch_size]
            chunk = [labels[i] for i in drawn]
            generators = [torch.Generator().manual_seed(_seed_of(seed, i)) for i in drawn]
            images = pipe(
                batch_size=len(chunk),
                class_labels=None if set(chunk) == {None} else chunk,
                generator=generators,
                output_type="pt",
                **arguments,
            ).images
            yield from to_uint8(images * 2 - 1).cpu()
            bar.update(len(chunk))


def _seed_of(seed: int, image: int) -> int:
    """Return a seed of the 32 bits that torch's CPU generator takes; sets of neighbouring seeds share no images."""
    return (seed * 0x9E3779B1 + image) % 2**32  # 2**32 divided by the golden ratio
