"""`LooCLDMPipeline`: images from a latent diffusion model on a LooC first stage."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from numbers import Integral

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from looc_ldm.autoencoder import LooCVQModel
from looc_ldm.class_embedding import ClassEmbedding

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class LooCLDMPipeline(DiffusionPipeline):
    """Unconditional or class-conditional latent diffusion.

    Args:
        vqvae (`LooCVQModel`): First stage; its config holds the measured `scaling_factor`.
        unet (`UNet2DModel` or `UNet2DConditionModel`): Denoises scaled latents. Class-conditional if it has
            `num_class_embeds` or comes with a `class_embedding`.
        scheduler (`SchedulerMixin`): Any of `KarrasDiffusionSchedulers`.
        class_embedding (`ClassEmbedding`, *optional*): Class token of a `UNet2DConditionModel`.
        id2label (`dict[int, str]`, *optional*): Names of the classes; several names of one class with commas between.
        null_class_label (`int`, *optional*): The label that stands for no class, which guidance needs.

    Raises:
        ValueError: `null_class_label` is not a label of the model, or a `UNet2DConditionModel` without a class token.

    Example:

    ```py
    >>> from looc_ldm import LooCLDMPipeline
    >>> pipe = LooCLDMPipeline.from_pretrained("runs/fashion_mnist/diffusion/pipeline")
    >>> images = pipe(class_labels=["sandal", 9], guidance_scale=2.0).images
    ```
    """

    model_cpu_offload_seq = "class_embedding->unet->vqvae"
    _optional_components = ["class_embedding"]
    _callback_tensor_inputs = ["latents", "model_output"]

    def __init__(
        self,
        vqvae: LooCVQModel,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        class_embedding: ClassEmbedding | None = None,
        id2label: dict | None = None,
        null_class_label: int | None = None,
    ):
        super().__init__()
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler, class_embedding=class_embedding)
        if id2label is not None:
            id2label = {int(label): name for label, name in id2label.items()}  # JSON turns keys into strings
        self.register_to_config(id2label=id2label, null_class_label=null_class_label)
        if isinstance(unet, UNet2DConditionModel) and class_embedding is None:
            raise ValueError("a UNet2DConditionModel needs a class_embedding to attend to.")
        if null_class_label is not None and not 0 <= null_class_label < self.num_class_embeds:
            raise ValueError(
                f"null_class_label must be in [0, {self.num_class_embeds}), the labels of the UNet, "
                f"got {null_class_label}."
            )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def num_class_embeds(self) -> int:
        """Labels the model knows, the null class included; 0 if it is unconditional."""
        if self.class_embedding is not None:
            return self.class_embedding.config.num_class_embeds
        return self.unet.config.num_class_embeds or 0

    @property
    def labels(self) -> dict[str, list[int]]:
        """Class names, in small letters, and the labels that have them (ImageNet has two classes named crane)."""
        known = {}
        for label, names in (self.config.id2label or {}).items():
            for name in {name.strip().casefold() for name in (names, *names.split(","))}:
                known.setdefault(name, []).append(label)
        return known

    @property
    def guidance_scale(self) -> float:
        """Of the call under way; for callbacks."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the call under way; for callbacks."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to skip the steps that are left."""
        return self._interrupt

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
            generator (`torch.Generator` or list of them, *optional*): One for all images, or one an image.
            guidance_interval (`tuple[float, float]`, defaults to (0, 1)): Guide only while the timestep, as a share of
                the training timesteps, is inside.
            guidance_rescale (`float`, defaults to 0.0): phi of "Common Diffusion Noise Schedules and Sample Steps are
                Flawed", in [0, 1]: how far the guided output is brought back to the deviation of the unguided one.
            num_images_per_label (`int`, defaults to 1): Images of each label, next to each other.
            latents (`torch.Tensor` of shape `(n, c, h, w)`, *optional*): Initial noise of unit variance.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` `(n, H, W, C)` in [0, 1], `"pt"` `(n, C, H, W)` in
                [0, 1], or `"latent"`, the scaled latents `(n, c, h, w)`.
            return_dict (`bool`, defaults to True): False for a plain tuple.
            callback_on_step_end (`Callable`, *optional*): Called as `f(pipe, step, timestep, tensors)` after each step;
                returns a dict, whose `"latents"` replace those of the loop, or None.
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
            guidance_interval,
            guidance_rescale,
            num_images_per_label,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        labels = self.prepare_labels(class_labels, batch_size, num_images_per_label)
        count = batch_size * num_images_per_label if labels is None else len(labels)
        device, dtype = self._execution_device, self.unet.dtype
        if labels is not None:
            labels = labels.to(device)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = self.prepare_latents(count, dtype, device, generator, latents)  # their scale depends on the timesteps
        step_arguments = self.prepare_extra_step_kwargs(generator, eta)
        # Read here, once: in the loop it would wait for the device.
        shares = (self.scheduler.timesteps / self.scheduler.config.num_train_timesteps).tolist()
        self._guidance_scale = guidance_scale
        self._num_timesteps = len(self.scheduler.timesteps)
        self._interrupt = False
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(self.scheduler.timesteps):
                if self._interrupt:
                    continue
                inside = guidance_interval[0] <= shares[i] <= guidance_interval[1]
                model_output = self._denoise(latents, t, labels, guidance_scale if inside else 1.0, guidance_rescale)
                latents = self.scheduler.step(model_output, t, latents, **step_arguments, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {}
                    for name in callback_on_step_end_tensor_inputs:
                        tensors[name] = locals()[name]
                    changed = callback_on_step_end(self, i, t, tensors) or {}
                    latents = changed.get("latents", latents)
                progress_bar.update()

        if output_type == "latent":
            images = latents
        else:
            images = self.vqvae.decode((latents / self.vqvae.config.scaling_factor).to(self.vqvae.dtype)).sample
            images = self.image_processor.postprocess(images.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_inputs(
        self,
        batch_size,
        class_labels,
        num_inference_steps,
        guidance_scale,
        guidance_interval,
        guidance_rescale,
        num_images_per_label,
        output_type,
        callback_on_step_end_tensor_inputs,
    ) -> None:
        """Raise ValueError for what the model cannot do; see `__call__`."""
        for name, value in (
            ("batch_size", batch_size),
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_label", num_images_per_label),
        ):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be of {', '.join(self._callback_tensor_inputs)}, "
                f"got {', '.join(unknown)}."
            )
        low, high = guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval must be 0 <= low <= high <= 1, got {guidance_interval}.")
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be in [0, 1], got {guidance_rescale}.")
        conditional = self.num_class_embeds > 0
        if not conditional and (class_labels is not None or guidance_scale != 1):
            raise ValueError("this model is unconditional: it takes neither class_labels nor a guidance_scale.")
        if conditional and self.config.null_class_label is None and (class_labels is None or guidance_scale != 1):
            raise ValueError("this model has no null class: it needs class_labels, and guidance_scale=1.")
        if self.vqvae.config.scaling_factor is None:
            raise ValueError(
                "vqvae.config.scaling_factor is None: measure it on training images with "
                "looc_ldm.training.latents.measure_scaling_factor, and store it with "
                "vqvae.register_to_config(scaling_factor=...)."
            )

    def get_label_ids(self, labels: list[int | str | None]) -> list[int]:
        """Labels by index for labels by index or name; None is the null class.

        Raises:
            ValueError: An unknown name (with the nearest known ones), a name of two classes, an index out of range, or
                None without a null class.
        """
        known, ids = self.labels, []
        for label in labels:
            index = self.config.null_class_label if label is None else label
            if isinstance(label, str):
                name = label.strip().casefold()
                if name not in known:
                    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)[:20]
                    hint = f"did you mean {' or '.join(near)}?" if near else "the model has no class names."
                    raise ValueError(f"unknown class name {label!r}; {hint}")
                if len(known[name]) > 1:
                    raise ValueError(f"{label!r} names the classes {' and '.join(map(str, known[name]))}; give one.")
                index = known[name][0]
            if not isinstance(index, Integral) or not 0 <= index < self.num_class_embeds:
                null = self.config.null_class_label
                hint = "" if null is None else f" ({null} is the null class)"
                allowed = f"in [0, {self.num_class_embeds}) or a class name"
                raise ValueError(f"class label must be {allowed}, got {label!r}{hint}.")
            ids.append(int(index))
        return ids

    def prepare_labels(self, class_labels, batch_size: int, num_images_per_label: int) -> torch.Tensor | None:
        """int64 labels, one an image, or None for an unconditional model."""
        if self.num_class_embeds == 0:
            return None
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.tolist()
        if class_labels is None or isinstance(class_labels, Integral | str):
            class_labels = [class_labels] * batch_size
        if not len(class_labels) or batch_size not in (1, len(class_labels)):
            raise ValueError(f"batch_size={batch_size} does not fit {len(class_labels)} class_labels.")
        return torch.tensor(self.get_label_ids(class_labels)).repeat_interleave(num_images_per_label)

    def prepare_latents(self, count, dtype, device, generator, latents=None) -> torch.Tensor:
        """Initial noise `(count, c, h, w)`, scaled for the scheduler."""
        side = self.unet.config.sample_size or self.vqvae.config.sample_size // self.vqvae.downsampling_factor
        height, width = (side, side) if isinstance(side, int) else side
        shape = (count, self.unet.config.in_channels, height, width)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images; give one, or one an image.")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def prepare_extra_step_kwargs(self, generator, eta: float) -> dict:
        """What this scheduler's `step` takes beyond the usual: `eta` (DDIM), `generator` (stochastic ones)."""
        accepted = inspect.signature(self.scheduler.step).parameters
        offered = {"eta": eta, "generator": generator}
        return {name: value for name, value in offered.items() if name in accepted}

    def _denoise(self, latents, t, labels, guidance_scale: float, guidance_rescale: float) -> torch.Tensor:
        """The UNet's output for a batch, guided if the scale is not 1 (one pass over both halves)."""
        inputs = self.scheduler.scale_model_input(latents, t)
        if guidance_scale == 1:
            return self._unet_output(inputs, t, labels)
        null = torch.full_like(labels, self.config.null_class_label)
        both = self._unet_output(torch.cat([inputs, inputs]), t, torch.cat([labels, null]))
        conditional, unconditional = both.chunk(2)
        guided = unconditional + guidance_scale * (conditional - unconditional)
        if guidance_rescale:
            axes = list(range(1, guided.ndim))
            rescaled = guided * (conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
            guided = guidance_rescale * rescaled + (1 - guidance_rescale) * guided
        return guided

    def _unet_output(self, inputs, t, labels) -> torch.Tensor:
        if self.class_embedding is not None:
            return self.unet(inputs, t, encoder_hidden_states=self.class_embedding(labels), return_dict=False)[0]
        if labels is None:
            return self.unet(inputs, t, return_dict=False)[0]
        return self.unet(inputs, t, class_labels=labels, return_dict=False)[0]
