"""`LooCLDMImg2ImgPipeline`: variations of an image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import ImagePipelineOutput

from looc_ldm.pipelines.base import LDMBase
from looc_ldm.pipelines.schedulers import noised


class LooCLDMImg2ImgPipeline(LDMBase):
    """Image to image (SDEdit): noise is added to an image and taken away again.

    Components and arguments of the constructor are those of `LooCLDMPipeline`; a folder of the one loads as the other.

    Example:

    ```py
    >>> from looc_ldm import LooCLDMImg2ImgPipeline, LooCLDMPipeline
    >>> pipe = LooCLDMPipeline.from_pretrained("quickstart/diffusion/pipeline")
    >>> (shirt,) = pipe(class_labels="shirt", num_inference_steps=5).images
    >>> pipe = LooCLDMImg2ImgPipeline.from_pipe(pipe)
    >>> (coat,) = pipe(shirt, strength=0.6, class_labels="coat", num_inference_steps=10).images
    ```
    """

    @torch.no_grad()
    def __call__(
        self,
        image,
        strength: float = 0.8,
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
        callback_on_step_end: Callable[[LooCLDMImg2ImgPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draw variations of images.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them): One image, or one a label. Arrays
                `(n, H, W, C)` and tensors `(n, C, H, W)` are in [0, 1]. Other sizes are resized to the model's.
            strength (`float`, defaults to 0.8): Share of the denoising steps that are taken, in (0, 1]: how far the
                result may be from the image.
            class_labels: As in `LooCLDMPipeline`; one for all images, or one an image.
            num_images_per_label (`int`, defaults to 1): Variations of each image, next to each other.
            latents (`torch.Tensor` of shape `(n, c, h, w)`, *optional*): The noise that is added, of unit variance.
            The other arguments: See `LooCLDMPipeline.__call__`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple with them.

        Raises:
            ValueError: Before the UNet runs, for inputs that do not fit the model, or so few steps that `strength`
                leaves none.
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
        timesteps = self.prepare_timesteps(num_inference_steps, strength, device)
        latents = self.prepare_image_latents(pixels, count)

        latents = self.denoise(
            noised(self.scheduler, latents, noise, timesteps[0]),
            timesteps,
            None if labels is None else labels.to(device),
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            generator=generator,
            eta=eta,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        return self.finish(latents, output_type, return_dict)
