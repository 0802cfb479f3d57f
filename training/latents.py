"""Training examples of stage 2, from cached latents or from images; and the command that caches the latents.

    looc-ldm cache-latents --config imagenet/diffusion --data /data/imagenet
    accelerate launch -m looc_ldm.training.latents --config imagenet/diffusion --data /data/imagenet

Several processes encode a share each; the folder must be one that all of them see. Interrupted, the same command goes
on, also with another number of processes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from looc_ldm.arguments import CacheLatents, parse_options
from looc_ldm.autoencoder import LooCVQModel
from looc_ldm.distributed import make_accelerator
from looc_ldm.errors import UserError, one_line_errors
from looc_ldm.files import check_folder
from looc_ldm.loading import load_autoencoder
from looc_ldm.scaling import scale_latents
from looc_ldm.training.config import DiffusionConfig
from looc_ldm.training.config_parsing import load_config
from looc_ldm.training.data import FLIP, NOISE, Report, Stream, load_image_sets, random_at
from looc_ldm.training.latent_cache import LatentCache, check_cache_folder
from looc_ldm.training.latent_encoding import cache_latents, check_cacheable
from looc_ldm.training.latent_encoding import latent_side as latent_side
from looc_ldm.training.moments import SCALING_IMAGES as SCALING_IMAGES
from looc_ldm.training.moments import measure_latents as measure_latents
from looc_ldm.training.moments import measure_scaling_factor as measure_scaling_factor


class LatentStream(Stream):
    """Training examples of stage 2.

    Item p is `(latents, label, noise, time, dropout, report)`: the scaled latents `(c, h, w)`, their class, noise of
    the same shape, two uniform numbers in [0, 1) that decide the timestep and whether the label is dropped, and an
    empty `Report`. All that is random belongs to the position p, so that no loop or process has randomness of its own.
    """

    def __init__(self, cache: LatentCache, model: LooCVQModel, seed: int):
        super().__init__(len(cache), seed)
        self.cache = cache
        # Scaling is affine: its values at 0 and 1 say all, and a loader's workers need not hold the model.
        ends = torch.arange(2.0).view(2, 1, 1, 1).expand(2, cache.shape[0], 1, 1)
        self.shift, one = scale_latents(model, ends).unbind()
        self.scale = one - self.shift  # (c, 1, 1)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int, torch.Tensor, np.float32, np.float32, Report]:
        flipped = self.cache.flipped and random_at(self.seed, FLIP, position).random() < 0.5
        latents, label = self.cache.read(self.index_at(position), flipped)
        latents = latents.float() * self.scale + self.shift
        return latents, label, *draws_at(self.seed, position, self.cache.shape), Report()


class OnlineLatentStream(Dataset):
    """Training examples of stage 2 that are encoded in the loop.

    Item p is `(image, label, noise, time, dropout, report)`: the image (uint8), label and report of another stream,
    and the numbers that `LatentStream` gives at that position.

    Args:
        stream (`Stream` or `StreamedImages`): Of items `(image, label, report)`.
        latent_shape (`tuple[int, int, int]`): c, h, w of the latents, which the noise has.
        seed (`int`): Of noise, time and dropout.
    """

    def __init__(self, stream: Dataset, latent_shape: tuple[int, int, int], seed: int):
        self.stream = stream
        self.latent_shape = tuple(latent_shape)
        self.seed = seed
        self.length = getattr(stream, "length", None)  # unknown where images are streamed

    def __getitems__(self, positions: list[int]) -> list[tuple]:
        """The items of one batch; what a loader's worker calls."""
        return [
            (image, label, *draws_at(self.seed, position, self.latent_shape), report)
            for position, (image, label, report) in zip(positions, self.stream.__getitems__(positions), strict=True)
        ]


def draws_at(seed: int, position: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, np.float32, np.float32]:
    """Noise of a shape, and two uniform numbers in [0, 1), that belong to one position of the stream."""
    random = random_at(seed, NOISE, position)
    time, dropout = random.random(2, dtype=np.float32)
    return torch.from_numpy(random.standard_normal(shape, dtype=np.float32)), time, dropout


def cache_data_set(options: CacheLatents) -> None:
    """Encode the data set of a config, as `looc-ldm cache-latents` and this module do. Collective."""
    overrides = {"autoencoder": options.autoencoder, "data__path": options.data, "latents": options.output}
    config = load_config(DiffusionConfig, options.config, **{k: v for k, v in overrides.items() if v is not None})
    if not config.autoencoder:
        raise UserError(f"the config {options.config!r} names no autoencoder: give --autoencoder.")
    folder = Path(config.latents or Path(config.output_dir) / "latents")
    check_cacheable(config.data)
    check_folder(folder)
    check_cache_folder(folder)
    accelerator = make_accelerator(options.device)
    model = load_autoencoder(config.autoencoder).to(accelerator.device)
    images, _ = load_image_sets(config.data, model.config.in_channels)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    cache = cache_latents(model, images, folder, accelerator, options.batch_size, dtype)
    if accelerator.is_main_process:
        print(
            f"{folder}: {len(cache)} images, standard deviation {cache.standard_deviation:.4g}, "
            f"{cache.unreadable} unreadable, {cache.size / 2**20:.1f} MiB, encoded in {cache.precision}"
        )
    accelerator.end_training()


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    with one_line_errors():
        arguments = sys.argv[1:] if arguments is None else arguments
        cache_data_set(parse_options(CacheLatents, arguments, "looc-ldm cache-latents"))


if __name__ == "__main__":
    main()
