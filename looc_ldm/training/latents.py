"""Training examples of stage 2 from cached latents, and the command that caches them.

    looc-ldm cache-latents --config imagenet/diffusion --data /data/imagenet
    accelerate launch -m looc_ldm.training.latents --config imagenet/diffusion --data /data/imagenet

Each process encodes a part. All processes must see the same folder. To resume after an interruption, run the same
command again; the number of processes may differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from looc_ldm.images.image_set import FLIP, Report, random_at
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.loading import load_autoencoder
from looc_ldm.models.scaling import scale_latents
from looc_ldm.training.checks import check_cacheable
from looc_ldm.training.config import DiffusionConfig
from looc_ldm.training.config_parsing import load_config
from looc_ldm.training.data import Stream, draws_at, load_image_sets, with_stage_1_images
from looc_ldm.training.latent_cache import LatentCache
from looc_ldm.training.latent_encoding import cache_latents
from looc_ldm.training.moments import measure_scaling_factor as measure_scaling_factor  # documented to be here
from looc_ldm.utils.arguments import CacheLatents, parse_options
from looc_ldm.utils.distributed import make_accelerator
from looc_ldm.utils.errors import UserError, one_line_errors
from looc_ldm.utils.files import check_folder


class LatentStream(Stream):
    """Training examples of stage 2 from cached latents.

    Item p is `(latents, label, noise, time, dropout, report)`: the scaled latents `(c, h, w)`, their class, noise of
    the same shape, two uniform numbers in [0, 1) that decide the timestep and whether the label is dropped, and an
    empty `Report`. All random numbers belong to the position p.
    """

    def __init__(self, cache: LatentCache, model: LooCVQModel, seed: int):
        super().__init__(len(cache), seed)
        self.cache = cache
        # Scaling is affine: its values at 0 and 1 determine it, and a loader's workers need not hold the model.
        ends = torch.arange(2.0).view(2, 1, 1, 1).expand(2, cache.shape[0], 1, 1)
        self.shift, one = scale_latents(model, ends).unbind()
        self.scale = one - self.shift  # (c, 1, 1)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int, torch.Tensor, np.float32, np.float32, Report]:
        flipped = self.cache.flipped and random_at(self.seed, FLIP, position).random() < 0.5
        latents, label = self.cache.read(self.index_at(position), flipped)
        latents = latents.float() * self.scale + self.shift
        return latents, label, *draws_at(self.seed, position, self.cache.shape), Report()


def cache_data_set(options: CacheLatents) -> None:
    """Encode the data set of a config, as `looc-ldm cache-latents` and this module do. Collective."""
    overrides = {"autoencoder": options.autoencoder, "data__path": options.data, "latents": options.output}
    config = load_config(DiffusionConfig, options.config, **{k: v for k, v in overrides.items() if v is not None})
    if not config.autoencoder:
        raise UserError(f"the config {options.config!r} names no autoencoder: give --autoencoder.")
    folder = Path(config.latents or Path(config.output_dir) / "latents")
    check_cacheable(config.data)
    check_folder(folder)
    accelerator = make_accelerator(options.device)
    model = load_autoencoder(config.autoencoder).to(accelerator.device)
    config = with_stage_1_images(config, model)
    images, _ = load_image_sets(config.data, model.config.in_channels, config.class_conditional)
    cache = cache_latents(model, images, folder, accelerator, options.batch_size)
    if accelerator.is_main_process:
        print(
            f"{folder}: {len(cache)} images, standard deviation {cache.moments.standard_deviation:.4g}, "
            f"{cache.unreadable} unreadable, {cache.size / 2**20:.1f} MiB"
        )
    accelerator.end_training()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line of `looc-ldm cache-latents`."""
    with one_line_errors():
        arguments = sys.argv[1:] if arguments is None else arguments
        cache_data_set(parse_options(CacheLatents, arguments, "looc-ldm cache-latents"))


if __name__ == "__main__":
    main()
