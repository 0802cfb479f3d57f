"""`looc-ldm reconstruct`: show originals beside reconstructions."""

from __future__ import annotations

from looc_ldm.commands.options import Reconstruct
from looc_ldm.commands.shared import check_file, load_images, rate_of
from looc_ldm.models.loading import load_autoencoder
from looc_ldm.training.validation import reconstruction_grid
from looc_ldm.utils.devices import choose_device
from looc_ldm.utils.errors import UserError
from looc_ldm.utils.files import make_folder, write_image


def reconstruct(options: Reconstruct) -> None:
    """Write a PNG with originals above reconstructions, and print the rate."""
    check_file(options.output)
    if options.output.suffix.lower() != ".png":
        raise UserError(f"--output must be a .png file, got {str(options.output)!r}.")
    model = load_autoencoder(options.model).to(choose_device(options.device))
    images = load_images(options.data, options, model)
    make_folder(options.output.parent)
    write_image(reconstruction_grid([model], images, options.images), options.output)
    bits, pixels = rate_of(model, images)
    print(
        f"{options.output}: originals above, reconstructions below, {bits:.0f} bits per image, "
        f"{bits / pixels:.4g} bits per pixel"
    )
