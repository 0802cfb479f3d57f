"""`looc-ldm evaluate reconstruction`: measure how well a first stage reconstructs, and at which rate.

Several processes (`accelerate launch -m looc_ldm.cli evaluate ...`) divide the images and get the same figures.
"""

from __future__ import annotations

from tqdm.auto import tqdm

from looc_ldm.codes.images import set_tiling
from looc_ldm.commands.image_sets import StoredImages
from looc_ldm.commands.many_files import batch_of_squares, pixel_budget
from looc_ldm.commands.measures import reconstruction_measures
from looc_ldm.commands.options import EvaluateReconstruction
from looc_ldm.commands.record import machine, make_record, write_and_print
from looc_ldm.commands.shared import (
    check_file,
    data_of,
    load_images,
    load_model,
    use_fastest_threads_to_reconstruct,
    warn_of_training_images,
)
from looc_ldm.images.pixels import to_float
from looc_ldm.metrics.shares import share_of_batches
from looc_ldm.utils.distributed import make_accelerator

READ_BATCH = 32  # images that are read, and reconstructed, at a time


def evaluate(options: EvaluateReconstruction) -> None:
    """Measure, print and write figures, with their rate. Collective."""
    check_file(options.output)
    measures = reconstruction_measures(options)
    accelerator = make_accelerator(options.device)
    device, is_main = accelerator.device, accelerator.is_main_process
    model, fingerprint = load_model(options.model, device, options.dtype)
    use_fastest_threads_to_reconstruct(model)
    images = load_images(options.data, options, model)
    if is_main:
        warn_of_training_images(images, model)
    side = images.config.resolution
    set_tiling(model, side**2, pixel_budget(device.type))
    chosen = StoredImages(images, options.images)
    shares = share_of_batches(len(chosen), batch_of_squares(device.type, side, READ_BATCH), accelerator)
    with tqdm(
        chosen.batches(shares), desc="reconstructing", unit="batch", total=len(shares), delay=1, disable=not is_main
    ) as bar:
        figures = measures.evaluate(model, map(to_float, bar), images.content_size, accelerator)
    accelerator.end_training()
    if is_main:
        record = make_record(
            figures | data_of(images),
            options,
            options.model,
            weights=measures.weights,
            fingerprints={"vqvae": fingerprint},
            seeds=measures.seeds,
            machine=machine(accelerator),
            notes=measures.notes(figures["images"]),
        )
        write_and_print(record, options.output)
