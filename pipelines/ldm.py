"""`LooCLDMPipeline`: images from a latent diffusion model on a LooC first stage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import ImagePipelineOutput

from looc_ldm.pipelines.base import LDMBase


class LooCLDMPipeline(LDMBase):
    """Unconditional or class-conditional latent diffusion.

    Args:
        vqvae (`LooCVQModel` or `VQModel`): First stage; its config holds the measured `scaling_factor`.
        unet (`UNet2DModel` or `UNet2DConditionModel`): Denoises scaled latents. Class-conditional if it has
            `num_class_embeds` or comes with a `class_embedding`.
        scheduler (`SchedulerMixin`): Any of `KarrasDiffusionSchedulers` but EDMEulerScheduler, LCM, TCD or SASolver,
            or, for models trained by flow matching, FlowMatchEulerDiscreteScheduler.
        class_embedding (`ClassEmbedding`, *optional*): Class token of a `UNet2DConditionModel`.
        id2label (`dict[int, str]`, *optional*): Names of the classes; several names of one class with commas between.
        null_class_label (`int`, *optional*): The label that stands for no class, which guidance needs.
        prediction_type (`str`, *optional*): What the UNet was trained to predict, `"epsilon"`, `"v_prediction"`,
            `"sample"` or `"flow_prediction"`; if not given, what the scheduler says. Saved with the pipeline: a
            scheduler that takes the output for something else is refused.
        noise_schedule (`dict`, *optional*): The settings that say how noisy the UNet's training timesteps were
            (`num_train_timesteps`, `beta_start`, ...); if not given, those of the scheduler. Saved with the pipeline,
            which warns of a scheduler with others.

    Raises:
        ValueError: `null_class_label` or `id2label` hold what is not a label of the model, components that do not fit
            each other, or a scheduler for another kind of model.

    Example:

    ```py
    >>> from looc_ldm import LooCLDMPipeline
    >>> pipe = LooCLDMPipeline.from_pretrained("quickstart/diffusion/pipeline")
    >>> images = pipe(class_labels=["sandal", 9], guidance_scale=2.0, num_inference_steps=25).images
    >>> images[0].size
    (32, 32)
    ```
    """

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
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
        callback_on_step_end: Callable[[LooCLDMPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            batch_size (`int`, defaults to 1): Number of images; with a list of labels, their number counts.
            class_labels (`int`, `str` or list of them, *optional*): The class of each image, by index or by name
                (in any case). One label is for all images. None, also in a list, is the null class of a conditional
                model.
            num_inference_steps (`int`, defaults to 50): Denoising steps.
            guidance_scale (`float`, defaults to 1.0): w of classifier-free guidance, n + w (c - n) with the outputs c
                for the class and n for the null class; 1 is no guidance.
            eta (`float`, defaults to 0.0): DDIM's eta; 0 is deterministic. Other schedulers ignore it.
            generator (`torch.Generator` or list of them, *optional*): One for all images, or one an image: then an
                image does not depend on those drawn with it.
            guidance_interval (`tuple[float, float]`, defaults to (0, 1)): Guide only while the timestep, as a share of
                the training timesteps, is inside.
            guidance_rescale (`float`, defaults to 0.0): phi of "Common Diffusion Noise Schedules and Sample Steps are
                Flawed", in [0, 1]: how far the guided output is brought back to the deviation of the unguided one.
            num_images_per_label (`int`, defaults to 1): Images of each label, next to each other.
            latents (`torch.Tensor` of shape `(n, c, h, w)`, *optional*): Initial noise of unit variance.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` `(n, H, W, C)` in [0, 1], `"pt"` `(n, C, H, W)` in
                [0, 1], or `"latent"`, the scaled latents `(n, c, h, w)`.
            return_dict (`bool`, defaults to True): False for a plain tuple.
            callback_on_step_end (`Callable` or `PipelineCallback`, *optional*): Called as
                `f(pipe, step, timestep, tensors)` after each step; returns a dict, whose `"latents"` replace those of
                the loop, or None.
            callback_on_step_end_tensor_inputs (`list[str]`): What it gets: `"latents"`, `"model_output"`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple with them.

        Raises:
            ValueError: Before the UNet runs, for inputs that do not fit the model.
        """
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

        self.set_timesteps(num_inference_steps, device)
        latents = self.denoise(
            noise * getattr(self.scheduler, "init_noise_sigma", 1.0),  # 1 for those of flow matching
            self.scheduler.timesteps,
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
