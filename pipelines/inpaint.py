"""`LooCLDMInpaintPipeline`: new content where a mask says so."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor

from looc_ldm.pipelines.base import LDMBase
from looc_ldm.pipelines.schedulers import noised


class LooCLDMInpaintPipeline(LDMBase):
    """Inpainting with a model that was not trained for it.

    After each step the latents outside of the mask are replaced by those of the image with as much noise as is left
    ("Blended Diffusion"); at the end the pixels there are the image's own.

    Components and arguments of the constructor are those of `LooCLDMPipeline`; a folder of the one loads as the other.

    Example:

    ```py
    >>> from PIL import Image
    >>> from looc_ldm import LooCLDMInpaintPipeline, LooCLDMPipeline
    >>> pipe = LooCLDMPipeline.from_pretrained("quickstart/diffusion/pipeline")
    >>> (shirt,) = pipe(class_labels="shirt", num_inference_steps=5).images
    >>> mask = Image.new("L", shirt.size)
    >>> mask.paste(255, (0, 0, 16, 32))  # white: the left half is drawn anew
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
        """Draw what a mask leaves open.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them): As in `LooCLDMImg2ImgPipeline`.
            mask_image (the same): White (1) where new content is wanted, black (0) where the image stays; one for all
                images, or one an image; resized to the nearest pixels. A latent position is drawn anew if any of its
                pixels is.
            strength (`float`, defaults to 1.0): As in `LooCLDMImg2ImgPipeline`; below 1 the new content keeps something
                of the old.
            The other arguments: See `LooCLDMImg2ImgPipeline.__call__`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple with them. The pixels outside of the mask are those of the
            image (as latents: those of its encoding).

        Raises:
            ValueError: Before the UNet runs, for inputs that do not fit the model or each other.
        """
        pixels = self.preprocess_image(image)
        batch_size = len(pixels)
        self.check_inputs(
            batch_size,
            class_labels,
            num_inference_steps,
            guidance_scale,
            eta,
            generator,
            guidance_interval,
            guidance_rescale,
            num_images_per_label,
            latents,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        labels = self.prepare_labels(class_labels, batch_size, num_images_per_label)
        count = batch_size * num_images_per_label if labels is None else len(labels)
        device = self._execution_device
        noise = self.prepare_noise(count, device, generator, latents)
        mask = self.prepare_mask(mask_image, count, num_images_per_label).to(device)  # (n, 1, H, W)
        open_latents = F.max_pool2d(mask, self.downsampling_factor)  # (n, 1, h, w)
        timesteps = self.prepare_timesteps(num_inference_steps, strength, device)
        known = self.prepare_image_latents(pixels, count)

        def keep_known(step: int, latents: torch.Tensor) -> torch.Tensor:
            last = step + 1 == len(timesteps)
            left = known if last else noised(self.scheduler, known, noise, timesteps[step + 1])
            return torch.where(open_latents > 0, latents, left)

        if strength == 1:
            start = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)  # nothing of what the mask covers is left
        else:
            start = noised(self.scheduler, known, noise, timesteps[0])
        latents = self.denoise(
            start,
            timesteps,
            None if labels is None else labels.to(device),
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            generator=generator,
            eta=eta,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            after_step=keep_known,
        )
        latents = torch.where(open_latents > 0, latents, known)  # also after an interrupt
        if output_type == "latent":
            return self.finish(latents, output_type, return_dict)
        pixels = pixels.to(device).repeat_interleave(count // len(pixels), dim=0)
        images = torch.where(mask > 0, self.decode_latents(latents), pixels)
        return self.finish_images(images, output_type, return_dict)

    def prepare_mask(self, mask_image, count: int, copies: int) -> torch.Tensor:
        """The mask as 0 and 1, `(count, 1, H, W)`."""
        _, height, width = self.latent_shape
        f = self.downsampling_factor
        processor = VaeImageProcessor(
            vae_scale_factor=f, do_normalize=False, do_binarize=True, do_convert_grayscale=True, resample="nearest"
        )
        if isinstance(mask_image, np.ndarray | torch.Tensor):
            mask_image = mask_image.astype(np.float32) if isinstance(mask_image, np.ndarray) else mask_image.float()
        mask = processor.preprocess(mask_image, height * f, width * f)
        if mask.shape[1] != 1:
            raise ValueError(f"mask_image must have one channel, got {mask.shape[1]}.")
        if len(mask) not in (1, count // copies):
            raise ValueError(f"{len(mask)} masks do not fit {count // copies} images; give one, or one an image.")
        return mask.repeat_interleave(count // len(mask), dim=0)
