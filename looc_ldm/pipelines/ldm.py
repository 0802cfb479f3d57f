"""`LooCLDMPipeline`: images from a latent diffusion model on a LooC first stage. The call and its loop are here."""

from __future__ import annotations

import difflib
import inspect
import logging
import math
from collections.abc import Callable
from numbers import Integral

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    PNDMScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor

from looc_ldm.hub.upload import HubMixin
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.class_embedding import ClassEmbedding
from looc_ldm.models.scaling import check_scaling, unscale_latents
from looc_ldm.models.unet import FixedHeadsUNet2DModel
from looc_ldm.pipelines.schedulers import (
    PREDICTION_TYPES,
    check_scheduler,
    noise_schedule_of,
    prediction_type_of,
    seed_scheduler,
)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

logger = logging.getLogger(__name__)


class LooCLDMPipeline(HubMixin, DiffusionPipeline):
    """Unconditional or class-conditional latent diffusion.

    Latents and scheduler are always float32, for a UNet of any dtype. So a seed gives the same noise for every dtype,
    and the many small steps are not rounded.

    A pipeline runs one call at a time. Give each thread its own pipeline, which shares the models:
    `LooCLDMPipeline.from_pipe(pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))`.

    Args:
        vqvae (`LooCVQModel`, `LooCSmallVQModel` or `VQModel`): First stage. Its config must hold the measured
            `scaling_factor`.
        unet (`UNet2DModel` or `UNet2DConditionModel`): Denoises scaled latents. Class-conditional if it has
            `num_class_embeds` or comes with a `class_embedding`. It may be compiled, or wrapped by peft.
        scheduler (`SchedulerMixin`): Any of `KarrasDiffusionSchedulers` but EDMEulerScheduler (DPMSolverSDEScheduler
            needs torchsde), LCM, TCD or SASolver, or, for models trained by flow matching,
            FlowMatchEulerDiscreteScheduler.
        class_embedding (`ClassEmbedding`, *optional*): Class token of a `UNet2DConditionModel`.
        id2label (`dict[int, str]`, *optional*): Name of each class, or several names separated by commas.
        null_class_label (`int`, *optional*): The label that stands for no class, which guidance needs.
        prediction_type (`str`, *optional*): The UNet's target in training, `"epsilon"`, `"v_prediction"`, `"sample"` or
            `"flow_prediction"`; defaults to the scheduler's. Saved with the pipeline, which refuses a scheduler with a
            different one.
        noise_schedule (`dict`, *optional*): The settings of the noise in training (`num_train_timesteps`,
            `beta_start`, ...); defaults to the scheduler's. Saved with the pipeline, which warns if a scheduler has
            different ones.

    Raises:
        ValueError: `null_class_label` or a key of `id2label` is not a label of the model, components do not fit
            together, or the scheduler is for a different kind of model.

    Example:

    ```py
    >>> from looc_ldm import LooCLDMPipeline
    >>> pipe = LooCLDMPipeline.from_pretrained("quickstart/diffusion/pipeline")
    >>> images = pipe(class_labels=["sandal", 9], guidance_scale=2.0, num_inference_steps=25).images
    >>> images[0].size
    (32, 32)
    ```
    """

    model_cpu_offload_seq = "class_embedding->unet->vqvae"
    _optional_components = ["class_embedding"]
    _callback_tensor_inputs = ["latents", "model_output"]

    def __init__(
        self,
        # Every class is named: `from_pipe` hands over components of exactly these types.
        vqvae: LooCVQModel | VQModel,
        unet: UNet2DModel | UNet2DConditionModel | FixedHeadsUNet2DModel,
        scheduler: KarrasDiffusionSchedulers,
        class_embedding: ClassEmbedding | None = None,
        id2label: dict | None = None,
        null_class_label: int | None = None,
        prediction_type: str | None = None,
        noise_schedule: dict | None = None,
    ):
        super().__init__()
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler, class_embedding=class_embedding)
        if id2label is not None:
            id2label = {int(label): name for label, name in id2label.items()}  # JSON turns keys into strings
        if prediction_type is None:
            prediction_type = prediction_type_of(scheduler)
        elif prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}.")
        self.register_to_config(
            id2label=id2label,
            null_class_label=null_class_label,
            prediction_type=prediction_type,
            noise_schedule=noise_schedule or noise_schedule_of(scheduler),
        )
        if "vq_embed_dim" not in getattr(vqvae, "config", {}):
            raise ValueError(
                f"vqvae must be a LooCVQModel, a LooCSmallVQModel or a VQModel, got {type(vqvae).__name__}."
            )
        channels = vqvae.config.vq_embed_dim or vqvae.config.latent_channels
        if unet.config.in_channels != channels:
            raise ValueError(
                f"the UNet denoises latents of {unet.config.in_channels} channels, but the first stage has {channels}."
            )
        # Tested by the config, because the type of a compiled or wrapped UNet differs.
        if ("cross_attention_dim" in unet.config) != (class_embedding is not None):
            raise ValueError("class_embedding must be given with a UNet2DConditionModel, and with no other UNet.")
        for label, name in (id2label or {}).items():
            if not isinstance(name, str) or not 0 <= label < self.num_class_embeds:
                raise ValueError(
                    f"id2label must give names to labels in [0, {self.num_class_embeds}), got {label}: {name!r}."
                )
        if null_class_label is not None and not 0 <= null_class_label < self.num_class_embeds:
            raise ValueError(
                f"null_class_label must be in [0, {self.num_class_embeds}), the labels of the UNet, "
                f"got {null_class_label}."
            )
        grey = vqvae.config.in_channels == 1
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.downsampling_factor, do_convert_grayscale=grey, do_convert_rgb=not grey
        )

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
            batch_size (`int`, defaults to 1): Number of images. With a list of labels, leave it at 1 or give the
                length of the list.
            class_labels (`int`, `str` or list of them, *optional*): The class of each image, by index or by name
                (upper or lower case). A single label applies to all images. None, also in a list, is the null class of
                a conditional model.
            num_inference_steps (`int`, defaults to 50): Denoising steps.
            guidance_scale (`float`, defaults to 1.0): w of classifier-free guidance, n + w (c - n) with the outputs c
                for the class and n for the null class; 1 is no guidance. An unconditional model ignores it with a
                warning.
            eta (`float`, defaults to 0.0): DDIM's eta; 0 is deterministic. Other schedulers ignore it.
            generator (`torch.Generator` or list of them, *optional*): One for all images, or one per image, so
                that an image does not depend on the rest of its batch.
            guidance_interval (`tuple[float, float]`, defaults to (0, 1)): Guide only at timesteps inside this interval,
                given as fractions of the training timesteps.
            guidance_rescale (`float`, defaults to 0.0): phi of "Common Diffusion Noise Schedules and Sample Steps are
                Flawed", in [0, 1]. It brings the standard deviation of the guided output back to that of the
                class-conditional output: not at 0, fully at 1.
            num_images_per_label (`int`, defaults to 1): Images of each label, next to each other.
            latents (`torch.Tensor` of shape `(n, c, h, w)`, *optional*): Initial noise of unit variance; drawn if not
                given.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` `(n, H, W, C)` in [0, 1], `"pt"` `(n, C, H, W)` in
                [0, 1], or `"latent"`, the scaled latents `(n, c, h, w)`.
            return_dict (`bool`, defaults to True): False for a plain tuple.
            callback_on_step_end (`Callable` or `PipelineCallback`, *optional*): Called as
                `f(pipe, step, timestep, tensors)` after each step; returns None, or a dict whose `"latents"` the next
                step uses.
            callback_on_step_end_tensor_inputs (`list[str]`): Tensors for the callback: `"latents"`, `"model_output"`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple with them.

        Raises:
            ValueError: The inputs do not fit the model. Raised before the UNet runs.
        """
        call = {name: value for name, value in locals().items() if name != "self"}
        self.check_inputs(**call)
        labels, count = self.prepare_labels(class_labels, batch_size, num_images_per_label)
        noise = self.prepare_noise(count, generator, latents)
        timesteps = self.set_timesteps(num_inference_steps)
        latents = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow matching has none: 1
        latents = self.denoise(latents, timesteps, labels, **call)
        images = latents if output_type == "latent" else self.decode_latents(latents)
        return self.finish(images, output_type, return_dict)

    def check_inputs(self, **call) -> None:
        """Raise ValueError for arguments of `__call__` that do not fit the model."""
        for name in ("batch_size", "num_inference_steps", "num_images_per_label"):
            if not isinstance(call[name], Integral) or call[name] < 1:
                raise ValueError(f"{name} must be a positive whole number, got {call[name]!r}.")
        for name in ("eta", "guidance_rescale"):
            if not 0 <= call[name] <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {call[name]!r}.")
        scale, (low, high) = call["guidance_scale"], call["guidance_interval"]
        if not math.isfinite(scale):
            raise ValueError(f"guidance_scale must be a number, got {scale!r}.")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval must be 0 <= low <= high <= 1, got {(low, high)}.")
        if call["output_type"] not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {call['output_type']!r}.")
        names = _tensor_inputs(call["callback_on_step_end"], call["callback_on_step_end_tensor_inputs"])
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be of {', '.join(self._callback_tensor_inputs)}, "
                f"got {', '.join(unknown)}."
            )
        conditional, labels = self.num_class_embeds > 0, call["class_labels"]
        if not conditional and labels is not None:
            raise ValueError("this model is unconditional: it takes no class_labels.")
        if not conditional and scale != 1:  # not an error: diffusers' own tests of pipelines do it
            logger.warning("guidance_scale=%s has no effect: this model is unconditional", scale)
        if conditional and self.config.null_class_label is None and (labels is None or scale != 1):
            raise ValueError("this model has no null class: it needs class_labels, and guidance_scale=1.")
        check_scaling(self.vqvae)
        check_scheduler(self.scheduler, self.config.prediction_type, self.config.noise_schedule)

    def prepare_labels(
        self, class_labels, batch_size: int, num_images_per_label: int
    ) -> tuple[torch.Tensor | None, int]:
        """Return int64 labels, one per image (None for an unconditional model), and the number of images."""
        if self.num_class_embeds == 0:
            return None, batch_size * num_images_per_label
        if isinstance(class_labels, torch.Tensor | np.ndarray):
            class_labels = class_labels.tolist()
        if not isinstance(class_labels, list | tuple):
            class_labels = [class_labels] * batch_size
        if not class_labels or batch_size not in (1, len(class_labels)):
            raise ValueError(f"{len(class_labels)} class_labels do not fit {batch_size} images.")
        labels = torch.tensor(self.get_label_ids(class_labels), device=self._execution_device)
        return labels.repeat_interleave(num_images_per_label), len(labels) * num_images_per_label

    def get_label_ids(self, labels: list[int | str | None]) -> list[int]:
        """Return the indices of labels given by index or name; None is the null class.

        Raises:
            ValueError: A name is unknown (the message suggests similar names) or belongs to two classes, an index is
                out of range, or a label is None in a model without a null class.
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
                raise ValueError(f"class label must be in [0, {self.num_class_embeds}) or a class name, got {label!r}.")
            ids.append(int(index))
        return ids

    def prepare_noise(self, count: int, generator, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return float32 noise of unit variance `(count, c, h, w)`: `noise` if given, else drawn."""
        shape, device = (count, *self.latent_shape), self._execution_device
        if isinstance(generator, tuple | list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images; give one, or one per image.")
        if noise is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(noise.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(noise.shape)}.")
        return noise.to(device, torch.float32)

    def set_timesteps(self, num_inference_steps: int) -> torch.Tensor:
        """Set and return the scheduler's timesteps; raise ValueError for more or fewer steps than it has."""
        name, config = type(self.scheduler).__name__, self.scheduler.config
        few = 4 if isinstance(self.scheduler, PNDMScheduler) and not config.skip_prk_steps else 1
        many = config.num_train_timesteps
        if few <= num_inference_steps <= many:
            self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
            flow = self.config.prediction_type == "flow_prediction"
            if flow or self.scheduler.timesteps.max() <= many - 1:
                return self.scheduler.timesteps
            name, many = f"{name} with steps_offset={config.get('steps_offset')}", many - 1
        raise ValueError(f"num_inference_steps must be in [{few}, {many}] for {name}, got {num_inference_steps}.")

    def denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor | None,
        after_step: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
        /,
        *,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        guidance_rescale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        eta: float,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...],
        **_,
    ) -> torch.Tensor:
        """Denoise scaled latents `(n, c, h, w)`, float32, through the scheduler's `timesteps`.

        Args:
            labels (`torch.Tensor` of shape `(n,)`, *optional*): The class of each image.
            after_step: Called as `f(step, latents)` after each step; returns the latents for the next step.
            Other arguments: See `__call__`. Arguments of `__call__` that are not listed are accepted and ignored.
        """
        names = _tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        generator = list(generator) if isinstance(generator, tuple) else generator
        seed_scheduler(self.scheduler, generator, len(latents))
        step_arguments = self.prepare_extra_step_kwargs(generator, eta)
        conditions = self.prepare_conditions(labels)
        # Read once: inside the loop it would wait for the device.
        fractions = (timesteps / self.scheduler.config.num_train_timesteps).tolist()
        self._guidance_scale = guidance_scale
        self._num_timesteps = len(timesteps)
        self._interrupt = False
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    continue
                inside = guidance_interval[0] <= fractions[i] <= guidance_interval[1]
                scale = self._guidance_scale if inside else 1.0
                model_output = self._model_output(latents, t, conditions, scale, guidance_rescale)
                latents = self.scheduler.step(model_output, t, latents, **step_arguments, return_dict=False)[0]
                if after_step is not None:
                    latents = after_step(i, latents)
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "model_output": model_output}
                    tensors = {name: tensors[name] for name in names}
                    changed = callback_on_step_end(self, i, t, tensors) or {}
                    latents = changed.get("latents", latents)
                progress_bar.update()
        return latents

    def prepare_extra_step_kwargs(self, generator, eta: float) -> dict:
        """Return the extra arguments of this scheduler's `step`: `eta` (DDIM), `generator` (stochastic schedulers)."""
        accepted = inspect.signature(self.scheduler.step).parameters
        offered = {"eta": eta, "generator": generator}
        return {name: value for name, value in offered.items() if name in accepted}

    def prepare_conditions(self, labels: torch.Tensor | None) -> tuple[dict, dict | None]:
        """Return two sets of extra UNet arguments: for the labels alone, and for guidance (labels and null class).

        The second is None if there is no null class.
        """
        if labels is None:
            return {}, None
        both = None
        if self.config.null_class_label is not None:
            both = torch.cat([labels, torch.full_like(labels, self.config.null_class_label)])
        if self.class_embedding is None:
            return {"class_labels": labels}, None if both is None else {"class_labels": both}
        tokens = self.class_embedding(labels if both is None else both).to(self.unet.dtype)
        conditional = {"encoder_hidden_states": tokens[: len(labels)]}
        return conditional, None if both is None else {"encoder_hidden_states": tokens}

    def _model_output(self, latents, t, conditions, guidance_scale: float, guidance_rescale: float) -> torch.Tensor:
        """Return the UNet's output, float32, guided if the scale is not 1 (one pass over both halves)."""
        scaled = hasattr(self.scheduler, "scale_model_input")  # flow matching has none
        inputs = (self.scheduler.scale_model_input(latents, t) if scaled else latents).to(self.unet.dtype)
        conditional, both = conditions
        if guidance_scale == 1 or both is None:
            return self.unet(inputs, t, **conditional, return_dict=False)[0].float()
        outputs = self.unet(torch.cat([inputs, inputs]), t, **both, return_dict=False)[0].float()
        conditional, unconditional = outputs.chunk(2)
        guided = unconditional + guidance_scale * (conditional - unconditional)
        if guidance_rescale:
            axes = list(range(1, guided.ndim))
            rescaled = guided * (conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
            guided = guidance_rescale * rescaled + (1 - guidance_rescale) * guided
        return guided

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents `(n, c, h, w)` to float32 images `(n, C, H, W)`, about [-1, 1]."""
        return self.vqvae.decode(unscale_latents(self.vqvae, latents).to(self.vqvae.dtype)).sample.float()

    def finish(self, images: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """Convert images `(n, C, H, W)` in [-1, 1], or latents, to `output_type`; release offloaded models."""
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # Components and settings ------------------------------------------------------------------------------------------

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        """Return a pipeline of this class that shares the components of `pipeline`.

        Args:
            pipeline (`DiffusionPipeline`): A pipeline of looc_ldm, or diffusers' `LDMPipeline`. Its offloading ends.
            **kwargs: Components and settings that replace the pipeline's. `dtype` casts the shared models, so it also
                affects `pipeline`.
        """
        if not kwargs.keys().isdisjoint(("dtype", "torch_dtype")):
            return super().from_pipe(pipeline, **kwargs)
        # Not diffusers' `from_pipe`: without a dtype it casts the shared components to float32, also for `pipeline`.
        pipeline.remove_all_hooks()
        given = {**pipeline.config, **pipeline.components, **kwargs}
        names = inspect.signature(cls.__init__).parameters.keys() - {"self"}
        unknown = sorted(kwargs.keys() - names)
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no argument of {cls.__name__}; it has {', '.join(sorted(names))}.")
        return cls(**{name: given[name] for name in names & given.keys()})

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Save the pipeline to a folder that looc_ldm and diffusers can load; see `HubMixin.save_pretrained`.

        Raises:
            ValueError: diffusers would leave out a component, or save adapter layers that cannot be loaded again.
        """
        for name, component in self.components.items():
            model = component._orig_mod if is_compiled_module(component) else component
            adapted = isinstance(model, torch.nn.Module) and any(".base_layer." in key for key in model.state_dict())
            if adapted or not isinstance(model, ModelMixin | SchedulerMixin | None):
                raise ValueError(
                    f"the pipeline's {name} cannot be saved as a {type(model).__name__} with adapters or in a wrapper; "
                    f"merge a peft model first: pipe.{name} = {name}.merge_and_unload()."
                )
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def downsampling_factor(self) -> int:
        """f, the ratio of the image's side to the latents' side."""
        if hasattr(self.vqvae, "downsampling_factor"):
            return self.vqvae.downsampling_factor
        return 2 ** (len(self.vqvae.config.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the latents the UNet was trained on."""
        side = self.unet.config.sample_size or self.vqvae.config.sample_size // self.downsampling_factor
        height, width = (side, side) if isinstance(side, int) else side
        return self.unet.config.in_channels, height, width

    @property
    def num_class_embeds(self) -> int:
        """Labels the model knows, the null class included; 0 if it is unconditional."""
        if self.class_embedding is not None:
            return self.class_embedding.config.num_class_embeds
        return self.unet.config.num_class_embeds or 0

    @property
    def class_ids(self) -> list[int]:
        """Labels that stand for a class: all but the null class; empty if the model is unconditional."""
        return [label for label in range(self.num_class_embeds) if label != self.config.null_class_label]

    @property
    def labels(self) -> dict[str, list[int]]:
        """Class names in lower case, each with the labels that have it (ImageNet has two classes named crane)."""
        known = {}
        for label, names in (self.config.id2label or {}).items():
            for name in {name.strip().casefold() for name in (names, *names.split(","))}:
                known.setdefault(name, []).append(label)
        return known

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call; for callbacks, which may set `pipe._guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the running call; for callbacks."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are skipped; a callback may set `pipe._interrupt = True`."""
        return self._interrupt


def _tensor_inputs(callback, names) -> list[str]:
    """Return the names of the tensors for a callback. diffusers' callback objects have their own list."""
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        names = callback.tensor_inputs
    return list(names or ())
