"""`looc-ldm sample`: draw images, and arrange them in a grid."""

from __future__ import annotations

import torch
from diffusers.utils import make_image_grid

from looc_ldm.commands.class_labels import class_folders
from looc_ldm.commands.options import Sample
from looc_ldm.commands.shared import check_file, use_fastest_threads_to_sample
from looc_ldm.images.pixels import to_pil
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.pipelines.loading import load_pipeline
from looc_ldm.pipelines.sampling import sample_images
from looc_ldm.utils.devices import choose_device
from looc_ldm.utils.errors import UserError
from looc_ldm.utils.files import check_folder, write_image

GRID_COLUMNS, GRID_ROWS = 16, 100  # at most


def sample(options: Sample) -> None:
    """Write one PNG per image, in one folder per class, and a grid with one row per class."""
    grid_file = options.output.with_name(f"{options.output.resolve().name}.png")  # not among the images that it shows
    check_folder(options.output)
    check_file(grid_file)
    device = choose_device(options.device)
    pipe = load_pipeline(options.model, getattr(torch, options.dtype)).to(device)
    if options.labels and not pipe.num_class_embeds:
        raise UserError("--labels: this model is unconditional.")
    names = pipe.config.id2label or {}
    classes = [_label_id(label, pipe) for label in options.labels or ()] or pipe.class_ids or [None]
    folders = class_folders({label: names.get(label, str(label)) for label in range(pipe.num_class_embeds)})
    labels = [label for label in classes for _ in range(options.images)]
    columns, rows = min(options.images, GRID_COLUMNS), min(len(classes), GRID_ROWS)
    use_fastest_threads_to_sample(pipe, min(len(labels), options.batch_size))
    images = sample_images(
        pipe,
        labels,
        seed=options.seed,
        batch_size=options.batch_size,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
    )
    grid, replaced = [], 0
    for i, drawn in enumerate(images):
        folder = options.output / folders.get(labels[i], "")
        folder.mkdir(parents=True, exist_ok=True)
        image, file = to_pil(drawn), folder / f"{i:05d}.png"
        replaced += file.exists()
        write_image(image, file)
        if i // options.images < rows and i % options.images < columns:
            grid.append(image)
    write_image(make_image_grid(grid, rows, columns), grid_file)
    print(f"{len(labels)} images in {options.output}, and {grid_file}, one row per class")
    others = sum(1 for _ in options.output.rglob("*.png")) - len(labels)
    if others or replaced:
        print(f"warning: {options.output} had images before: {replaced} were replaced, {others} are still there")


def _label_id(label: str, pipe: LooCLDMPipeline) -> int:
    """Return the index of a class given by name or, if no class has that name, by index. Refuse the null class."""
    is_index = label.isdecimal() and label not in pipe.labels
    (index,) = pipe.get_label_ids([int(label) if is_index else label])
    if index == pipe.config.null_class_label:
        raise UserError(
            f"--labels: {label} stands for no class: give a different number below {pipe.num_class_embeds}, or a name."
        )
    return index
