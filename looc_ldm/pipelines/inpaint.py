"""`LooCLDMInpaintPipeline`: new content in the region of a mask."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor

from looc_ldm.pipelines.img2img import LooCLDMImg2ImgPipeline


class LooCLDMInpaintPipeline(LooCLDMImg2ImgPipeline):
    """Inpainting with a model that was not trained for it.

    After each step the latents outside of the mask are replaced by the image's latents with as much noise as is left
    ("Blended Diffusion"); at the end the pixels there are the image's own.

    It has the components, restrictions and constructor arguments of `LooCLDMImg2ImgPipeline`. A folder of
    `LooCLDMPipeline` loads as this class.

    Example:

    ```py
    >>> from PIL import Image
    >>> from looc_ldm import LooCLDMInpaintPipeline, LooCLDMPipeline
    >>> pipe = LooCLDMPipeline.from_pretrained("quickstart/diffusion/pipeline")
    >>> (shirt,) = pipe(class_labels="shirt", num_inference_steps=5).images
    >>> mask = Image.new("L", shirt.size)
    >>> mask.paste(255, (0, 0, 16, 32))  # white: new content in the left half
    >>> pipe = LooCLDMInpaintPipeline.from_pipe(pipe)
    >>> (image,) = pipe(shirt, mask, class_labels="shirt", num_inference_steps=10).images
    ```
    """

    @torch.no_grad()
    def __call__(
        self,
        image,
        mask_image,
        strength: float = 1.0,
        class_labels: int | str | list[int | str | None] | torch.Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        num_images_per_label: int = 1,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[LooCLDMInpaintPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draw the region that a mask selects.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them): As in `LooCLDMImg2ImgPipeline`.
            mask_image (the same): White for new content, black or transparent to keep the image; one for all images,
                or one per image; resized to the nearest pixels. White is 1 in arrays, of any type, 255 in 8-bit and
                65535 in 16-bit images; half of it is enough. A latent position is new if any of its pixels is.
            strength (`float`, defaults to 1.0): As in `LooCLDMImg2ImgPipeline`; below 1 the new content keeps something
                of the old.
            The other arguments: See `LooCLDMImg2ImgPipeline.__call__`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple with them. Outside of the mask they have the pixels
            of the image (as latents: its encoding).

        Raises:
            ValueError: Before the UNet runs, for inputs that do not fit the model or each other, or a mask that is not
                black, but has no value of half of white.
        """
        call = {name: value for name, value in locals().items() if name not in ("self", "image", "mask_image")}
        pixels = self.preprocess_image(image)
        self.check_inputs(batch_size=len(pixels), **call)
        labels, count = self.prepare_labels(class_labels, len(pixels), num_images_per_label)
        noise = self.prepare_noise(count, generator, latents)
        mask = self.prepare_mask(mask_image, count, num_images_per_label).to(noise.device)  # (n, 1, H, W)
        open_latents = F.max_pool2d(mask, self.downsampling_factor)  # (n, 1, h, w)
        timesteps = self.set_last_timesteps(num_inference_steps, strength)
        known = self.prepare_image_latents(pixels, count)

        def keep_known(step: int, latents: torch.Tensor) -> torch.Tensor:
            last = step + 1 == len(timesteps)
            left = known if last else self.add_noise(known, noise, timesteps[step + 1])
            return torch.where(open_latents > 0, latents, left)

        if strength == 1:
            start = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)  # nothing of the masked region is left
        else:
            start = self.add_noise(known, noise, timesteps[0])
        latents = self.denoise(start, timesteps, labels, keep_known, **call)
        images = torch.where(open_latents > 0, latents, known)  # also after an interrupt
        if output_type != "latent":
            pixels = pixels.to(noise.device).repeat_interleave(count // len(pixels), dim=0)
            images = torch.where(mask > 0, self.decode_latents(images), pixels)
        return self.finish(images, output_type, return_dict)

    def prepare_mask(self, mask_image, count: int, copies: int) -> torch.Tensor:
        """Return the mask as 0 and 1, `(count, 1, H, W)`."""
        processor = VaeImageProcessor(
            vae_scale_factor=1, do_normalize=False, do_convert_grayscale=True, resample="nearest"
        )
        masks = []
        for one in mask_image if isinstance(mask_image, list | tuple) else [mask_image]:
            if isinstance(one, np.ndarray | torch.Tensor):
                one = one.astype(np.float32) if isinstance(one, np.ndarray) else one.float()
            mask = self.resized(one, "mask_image", processor, "L", background="black")
            largest = mask.max().item()
            if isinstance(one, PIL.Image.Image) and one.mode.startswith("I;16"):
                largest = one.getextrema()[1] / 65535  # the mask has 8 bits instead of 16
            if not mask.isfinite().all() or 0 < largest < 0.5:
                raise ValueError(
                    "mask_image must be white where new content is wanted: 1 in arrays, 255 in 8-bit and 65535 in "
                    f"16-bit images; its values, as shares of white, are up to {largest:.3g}."
                )
            masks.append((mask >= 0.5).float())
        if not masks:
            raise ValueError("mask_image must not be an empty list.")
        mask = torch.cat(masks)
        if mask.shape[1] != 1:
            raise ValueError(f"mask_image must have one channel, got {mask.shape[1]}.")
        if len(mask) not in (1, count // copies):
            raise ValueError(f"{len(mask)} masks do not fit {count // copies} images; give one, or one per image.")
        return mask.repeat_interleave(count // len(mask), dim=0)
