"""`LooCLDMImg2ImgPipeline`: variations of an image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import PIL.Image
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, PNDMScheduler
from diffusers.image_processor import VaeImageProcessor
from torchvision.transforms.functional import rgb_to_grayscale

from looc_ldm.images.pixels import as_shown
from looc_ldm.models.scaling import encode_latents
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.pipelines.schedulers import NOT_MIDWAY
from looc_ldm.utils.errors import DataError


class LooCLDMImg2ImgPipeline(LooCLDMPipeline):
    """Image to image (SDEdit): noise is added to an image, then removed.

    It has the components and constructor arguments of `LooCLDMPipeline`. The saved folder of either loads as the other.
    The scheduler must be able to start midway: KDPM2 schedulers, DPMSolverSDEScheduler and LMSDiscreteScheduler cannot.

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
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them): One image, or one per label.
                Arrays `(n, H, W, C)` and tensors `(n, C, H, W)` are floats in [0, 1]. PIL images are read as viewers
                show them: turned as EXIF says, transparency on white. Other sizes are resized to the model's.
            strength (`float`, defaults to 0.8): Share of the denoising steps that are taken, in (0, 1]: how far the
                result may be from the image.
            class_labels: As in `LooCLDMPipeline`; one for all images, or one per image.
            num_images_per_label (`int`, defaults to 1): Variations of each image, next to each other.
            latents (`torch.Tensor` of shape `(n, c, h, w)`, *optional*): The noise that is added, of unit variance.
            The other arguments: See `LooCLDMPipeline.__call__`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple with them.

        Raises:
            ValueError: Before the UNet runs, for inputs that do not fit the model, or so few steps that `strength`
                leaves none.
        """
        call = {name: value for name, value in locals().items() if name not in ("self", "image")}
        pixels = self.preprocess_image(image)
        self.check_inputs(batch_size=len(pixels), **call)
        labels, count = self.prepare_labels(class_labels, len(pixels), num_images_per_label)
        noise = self.prepare_noise(count, generator, latents)
        timesteps = self.set_last_timesteps(num_inference_steps, strength)
        known = self.prepare_image_latents(pixels, count)
        latents = self.denoise(self.add_noise(known, noise, timesteps[0]), timesteps, labels, **call)
        images = latents if output_type == "latent" else self.decode_latents(latents)
        return self.finish(images, output_type, return_dict)

    def check_inputs(self, *, strength, **call) -> None:
        """Raise ValueError for arguments of `__call__` that do not fit the model."""
        super().check_inputs(**call)
        steps = call["num_inference_steps"]
        if strength > 1 or int(steps * strength) < 1:
            raise ValueError(f"strength must be at most 1 and leave one of {steps} steps, got {strength!r}.")
        if isinstance(self.scheduler, NOT_MIDWAY):
            raise ValueError(
                f"{type(self.scheduler).__name__} cannot start from an image: use DDIMScheduler, "
                "DPMSolverMultistepScheduler or EulerDiscreteScheduler."
            )
        if isinstance(self.scheduler, PNDMScheduler) and strength < 1 and not self.scheduler.config.skip_prk_steps:
            raise ValueError("PNDMScheduler needs skip_prk_steps=True to start from an image.")

    def preprocess_image(self, image) -> torch.Tensor:
        """Return images as float32 `(n, C, H, W)` in [-1, 1], of the model's size and channels."""
        channels = self.vqvae.config.in_channels
        batches = []
        for one in image if isinstance(image, list | tuple) else [image]:
            if isinstance(one, np.ndarray | torch.Tensor):
                if "float" not in str(one.dtype):
                    raise ValueError(f"image arrays must be floats in [0, 1], got {one.dtype}; PIL images need not.")
                if -0.01 < one.min() < 0:
                    one = one.clip(0)  # rounding: the processor would take the whole array for one in [-1, 1]
                if one.ndim == 3 and one.shape[-1 if isinstance(one, np.ndarray) else 0] in (3, 4):
                    one = one[None]  # one colour image: for grey models the processor would take it for a batch
            batch = self.resized(one, "image", self.image_processor, "L" if channels == 1 else "RGB").float()
            batches.append(rgb_to_grayscale(batch) if channels == 1 and batch.shape[1] == 3 else batch)
        if not batches:
            raise ValueError("image must not be an empty list.")
        pixels = torch.cat(batches)
        if pixels.shape[1] != channels:
            raise ValueError(f"image must have {channels} channels, got {pixels.shape[1]}.")
        if pixels.max() > 1.01:
            raise ValueError(f"image arrays must be in [0, 1], got values up to {(pixels.max().item() + 1) / 2:.4g}.")
        return pixels

    def resized(self, image, name: str, processor: VaeImageProcessor, mode: str, background="white") -> torch.Tensor:
        """Return one image, or an array or tensor of several, as `(n, C, H, W)` of the model's size."""
        if isinstance(image, PIL.Image.Image):
            try:
                image = as_shown(image, mode, background)
            except DataError as error:
                raise DataError(f"{name}: {error}") from None
        _, height, width = self.latent_shape
        return processor.preprocess(image, height * self.downsampling_factor, width * self.downsampling_factor)

    def prepare_image_latents(self, pixels: torch.Tensor, count: int) -> torch.Tensor:
        """Return scaled float32 latents `(count, c, h, w)` of images in [-1, 1].

        If `count` is larger than the number of images, copies of an image are adjacent (`repeat_interleave`).
        """
        latents = encode_latents(self.vqvae, pixels.to(self._execution_device))
        return latents.repeat_interleave(count // len(latents), dim=0)

    def set_last_timesteps(self, num_inference_steps: int, strength: float) -> torch.Tensor:
        """Return the last `strength` fraction of the scheduler's timesteps, and start it there (SDEdit)."""
        timesteps = self.set_timesteps(num_inference_steps)
        first = (num_inference_steps - int(num_inference_steps * strength)) * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return timesteps[first:]

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return latents with the noise of a timestep of the scheduler, in the scheduler's own scale."""
        timesteps = timestep.expand(len(latents))
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            return self.scheduler.scale_noise(latents, timesteps, noise)
        return self.scheduler.add_noise(latents, noise, timesteps)
