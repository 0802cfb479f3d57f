"""`looc-ldm evaluate reconstruction`: how well a first stage reconstructs, and at which rate.

Several processes (`accelerate launch -m looc_ldm.cli evaluate ...`) divide the images and get the same figures.
"""

from __future__ import annotations

from tqdm.auto import tqdm

from looc_ldm.codes.images import set_tiling
from looc_ldm.commands.image_sets import StoredImages
from looc_ldm.commands.many_files import batch_of_squares, pixel_budget
from looc_ldm.commands.measures import reconstruction_measures
from looc_ldm.commands.options import EvaluateReconstruction
from looc_ldm.commands.record import bias_note, machine, make_record, print_record, write_record
from looc_ldm.commands.shared import check_file, data_of, load_images, load_model
from looc_ldm.images.pixels import to_float
from looc_ldm.metrics.shares import share_of_batches
from looc_ldm.utils.distributed import start_processes

READ_BATCH = 32  # images that are read, and reconstructed, at a time


def evaluate_reconstruction(options: EvaluateReconstruction) -> None:
    """Measure, print and write figures, with their rate. Collective."""
    check_file(options.output)
    measures = reconstruction_measures(options)
    device, accelerator = start_processes(options.device)
    is_main = accelerator is None or accelerator.is_main_process
    model, fingerprint = load_model(options.model, device, options.dtype)
    images = load_images(options.data, options, options.model, model)
    side = images.config.resolution
    set_tiling(model, side**2, pixel_budget(device.type))
    chosen = StoredImages(images, options.images)
    shares = share_of_batches(len(chosen), batch_of_squares(device.type, side, READ_BATCH), accelerator)
    with tqdm(
        chosen.batches(shares), desc="reconstructing", unit="batch", total=len(shares), delay=1, disable=not is_main
    ) as bar:
        figures = measures.evaluate(model, map(to_float, bar), images.content_size, accelerator)
    if accelerator is not None:
        accelerator.end_training()
    if not is_main:
        return
    record = make_record(
        figures | data_of(images),
        options,
        options.model,
        weights=measures.weights,
        fingerprints={"vqvae": fingerprint},
        seeds=measures.seeds,
        machine=machine(device, accelerator),
    )
    notes = list(measures.not_measured)
    if measures.features is not None and "rfid" in measures.metrics:
        notes.append(bias_note(figures["images"], measures.features.dim, f"rfid@{measures.features.name}"))
    record["notes"] = [note for note in notes if note]
    write_record(record, options.output)
    print_record(record, record["notes"])
