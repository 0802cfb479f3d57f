"""Draw images of every class with a trained model, and save them as one grid.

python examples/sample.py                                  the model of flowers that comes with the package
python examples/sample.py runs/mine/diffusion/pipeline     a model of your own, or a hub id
"""

import argparse

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils import make_image_grid

from looc_ldm import LooCLDMPipeline, starter_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a pipeline, or hub id (default: the bundled flowers)")
    parser.add_argument("--output", default="grid.png", help="picture to write (default: grid.png)")
    parser.add_argument("--columns", type=int, default=8, help="images per class (default: 8)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    options = parser.parse_args()

    pipe = LooCLDMPipeline.from_pretrained(options.model or starter_model())
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    conditional = pipe.config.id2label is not None
    images = pipe(
        class_labels=list(pipe.config.id2label) if conditional else None,
        num_images_per_label=options.columns,
        num_inference_steps=options.steps,
        guidance_scale=2.0 if conditional else 1.0,
        generator=torch.Generator().manual_seed(0),
    ).images
    make_image_grid(images, rows=len(images) // options.columns, cols=options.columns).save(options.output)
    print(f"{len(images)} images in {options.output}")


if __name__ == "__main__":
    main()
