"""`looc-ldm sample`: draw images, and a grid of them."""

from __future__ import annotations

from diffusers.utils import make_image_grid

from looc_ldm.commands.class_labels import class_folder
from looc_ldm.commands.options import Sample
from looc_ldm.commands.shared import DTYPES, check_file
from looc_ldm.images.pixels import to_pil
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.pipelines.loading import load_pipeline
from looc_ldm.pipelines.sampling import sample_images
from looc_ldm.utils.devices import choose_device
from looc_ldm.utils.errors import UserError
from looc_ldm.utils.files import check_folder, write_image

GRID_COLUMNS, GRID_ROWS = 16, 100  # of the grid, at most


def sample(options: Sample) -> None:
    """Write one PNG per image, in one folder per class, and a grid with one row per class."""
    grid_file = options.output.with_name(f"{options.output.resolve().name}.png")  # not among what it shows
    check_folder(options.output)
    check_file(grid_file)
    device = choose_device(options.device)
    pipe = load_pipeline(options.model, DTYPES[options.dtype]).to(device)
    classes = options.labels or sorted(pipe.config.id2label or {}) or [None]
    labels = [_as_label(label, pipe) for label in classes for _ in range(options.images)]
    columns, rows = min(options.images, GRID_COLUMNS), min(len(classes), GRID_ROWS)
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
        folder = options.output / class_folder(labels[i], pipe)
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
        print(f"warning: {options.output} held images before: {replaced} replaced, {others} still there")


def _as_label(label: int | str | None, pipe: LooCLDMPipeline) -> int | str | None:
    """Return a label as typed: an index, unless it is a name. The null class is refused: what it draws is a mixture."""
    is_index = isinstance(label, str) and label.isdecimal() and label not in pipe.labels
    if is_index and int(label) == pipe.config.null_class_label:
        raise UserError(
            f"--labels: {label} stands for no class; classes are the other numbers in [0, {pipe.num_class_embeds}), "
            "or their names."
        )
    return int(label) if is_index else label
