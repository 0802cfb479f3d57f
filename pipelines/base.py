"""What all latent diffusion pipelines share: components, class labels, checks of input, and the denoising loop."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from numbers import Integral, Real

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    ImagePipelineOutput,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from looc_ldm.autoencoder import LooCVQModel
from looc_ldm.class_embedding import ClassEmbedding
from looc_ldm.hub import HubMixin
from looc_ldm.pipelines.schedulers import (
    PREDICTION_TYPES,
    check_scheduler,
    noise_schedule_of,
    order_of_step,
    prediction_type_of,
    seed_scheduler,
)
from looc_ldm.scaling import check_scaling, scale_latents, unscale_latents
from looc_ldm.unet import FixedHeadsUNet2DModel

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class LDMBase(HubMixin, DiffusionPipeline):
    """Components and loop of `LooCLDMPipeline`, `LooCLDMImg2ImgPipeline` and `LooCLDMInpaintPipeline`.

    Latents and scheduler are float32 whatever the dtype of the UNet: the same seed is the same noise in every dtype,
    and the many small steps are not rounded.
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
        channels = vqvae.config.vq_embed_dim or vqvae.config.latent_channels
        if unet.config.in_channels != channels:
            raise ValueError(
                f"the UNet denoises latents of {unet.config.in_channels} channels, those of the first stage have "
                f"{channels}."
            )
        if isinstance(unet, UNet2DConditionModel) != (class_embedding is not None):
            raise ValueError("a UNet2DConditionModel, and no other UNet, needs a class_embedding to attend to.")
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

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        """A pipeline of this class on the components of another one, which both then share.

        Args:
            pipeline (`DiffusionPipeline`): One of these pipelines, or diffusers' `LDMPipeline`. Its offloading ends.
            **kwargs: Components and settings that replace the pipeline's; `dtype` to cast them (both pipelines).
        """
        if not kwargs.keys().isdisjoint(("dtype", "torch_dtype")):
            return super().from_pipe(pipeline, **kwargs)
        # Not diffusers' own, which without a dtype casts everything to float32, also under the other pipeline.
        pipeline.remove_all_hooks()
        given = {**pipeline.config, **pipeline.components, **kwargs}
        names = inspect.signature(cls.__init__).parameters.keys() - {"self"}
        unknown = sorted(kwargs.keys() - names)
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no argument of {cls.__name__}; it has {', '.join(sorted(names))}.")
        return cls(**{name: given[name] for name in names & given.keys()})

    @property
    def downsampling_factor(self) -> int:
        """f, the ratio of the image's side to the latents' side."""
        of_model = getattr(self.vqvae, "downsampling_factor", None)
        return of_model or 2 ** (len(self.vqvae.config.block_out_channels) - 1)

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
    def labels(self) -> dict[str, list[int]]:
        """Class names, in small letters, and the labels that have them (ImageNet has two classes named crane)."""
        known = {}
        for label, names in (self.config.id2label or {}).items():
            for name in {name.strip().casefold() for name in (names, *names.split(","))}:
                known.setdefault(name, []).append(label)
        return known

    @property
    def guidance_scale(self) -> float:
        """Of the call under way; for callbacks, which may set `pipe._guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the call under way; for callbacks."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to skip the steps that are left."""
        return self._interrupt

    # Input --------------------------------------------------------------------------------------------------------

    def check_inputs(
        self,
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
    ) -> None:
        """Raise ValueError for what the model cannot do; see `__call__`."""
        for name, value in (
            ("batch_size", batch_size),
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_label", num_images_per_label),
        ):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}.")
        for name, value in (("eta", eta), ("guidance_rescale", guidance_rescale)):
            if not isinstance(value, Real) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value!r}.")
        if not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a number, got {guidance_scale!r}.")
        if (
            not isinstance(guidance_interval, tuple | list)
            or len(guidance_interval) != 2
            or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1
        ):
            raise ValueError(f"guidance_interval must be 0 <= low <= high <= 1, got {guidance_interval!r}.")
        generators = generator if isinstance(generator, tuple | list) else [generator]
        if not all(isinstance(one, torch.Generator) or generator is None for one in generators):
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {generator!r}.")
        if latents is not None and not isinstance(latents, torch.Tensor):
            raise ValueError(f"latents must be a tensor, got {type(latents).__name__}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        names = self._tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be of {', '.join(self._callback_tensor_inputs)}, "
                f"got {', '.join(unknown)}."
            )
        conditional = self.num_class_embeds > 0
        if not conditional and (class_labels is not None or guidance_scale != 1):
            raise ValueError("this model is unconditional: it takes neither class_labels nor a guidance_scale.")
        if conditional and self.config.null_class_label is None and (class_labels is None or guidance_scale != 1):
            raise ValueError("this model has no null class: it needs class_labels, and guidance_scale=1.")
        check_scaling(self.vqvae)
        check_scheduler(self.scheduler, self.config.prediction_type, self.config.noise_schedule)

    def _tensor_inputs(self, callback, names) -> list[str]:
        """What a callback gets: diffusers' own say it themselves."""
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            names = callback.tensor_inputs
        return list(names or ())

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
            if not isinstance(index, Integral) or isinstance(index, bool) or not 0 <= index < self.num_class_embeds:
                null = self.config.null_class_label
                hint = "" if null is None else f" ({null} is the null class)"
                allowed = f"in [0, {self.num_class_embeds}) or a class name"
                names = f"; the names are {', '.join(list(known)[:20])}" if known else ""
                raise ValueError(f"class label must be {allowed}, got {label!r}{hint}{names}.")
            ids.append(int(index))
        return ids

    def prepare_labels(self, class_labels, batch_size: int, num_images_per_label: int) -> torch.Tensor | None:
        """int64 labels, one an image, or None for an unconditional model."""
        if self.num_class_embeds == 0:
            return None
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, np.ndarray):
            class_labels = class_labels.tolist()
        if not isinstance(class_labels, list | tuple):
            class_labels = [class_labels] * batch_size
        if not class_labels or batch_size not in (1, len(class_labels)):
            raise ValueError(f"{len(class_labels)} class_labels do not fit {batch_size} images.")
        return torch.tensor(self.get_label_ids(class_labels)).repeat_interleave(num_images_per_label)

    def prepare_noise(self, count: int, device: torch.device, generator, noise=None) -> torch.Tensor:
        """Float32 noise of unit variance, `(count, c, h, w)`: the one given, or drawn."""
        shape = (count, *self.latent_shape)
        if isinstance(generator, tuple | list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images; give one, or one an image.")
        if noise is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(noise.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(noise.shape)}.")
        return noise.to(device, torch.float32)

    def prepare_extra_step_kwargs(self, generator, eta: float) -> dict:
        """What this scheduler's `step` takes beyond the usual: `eta` (DDIM), `generator` (stochastic ones)."""
        accepted = inspect.signature(self.scheduler.step).parameters
        offered = {"eta": eta, "generator": generator}
        return {name: value for name, value in offered.items() if name in accepted}

    def set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        """The scheduler's `set_timesteps`; raises ValueError for a number of steps it has no timesteps for."""
        trained = self.scheduler.config.num_train_timesteps
        few = 4 if isinstance(self.scheduler, PNDMScheduler) and not self.scheduler.config.skip_prk_steps else 1
        if few <= num_inference_steps <= trained:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            flow = self.config.prediction_type == "flow_prediction"
            if flow or self.scheduler.timesteps.max() <= trained - 1:
                return
            trained -= 1  # with steps_offset=1
        raise ValueError(
            f"num_inference_steps must be in [{few}, {trained}] for {type(self.scheduler).__name__}, "
            f"got {num_inference_steps}."
        )

    def preprocess_image(self, image) -> torch.Tensor:
        """Images as float32 `(n, C, H, W)` in [-1, 1], of the model's size and channels."""
        _, height, width = self.latent_shape
        f = self.downsampling_factor
        for one in image if isinstance(image, list | tuple) else [image]:
            if isinstance(one, np.ndarray | torch.Tensor) and "float" not in str(one.dtype):
                raise ValueError(f"image arrays must be floats in [0, 1], got {one.dtype}; PIL images need not.")
        if isinstance(image, list | tuple) and not image:
            raise ValueError("image must not be an empty list.")
        pixels = self.image_processor.preprocess(image, height * f, width * f).to(torch.float32)
        if pixels.shape[1] != self.vqvae.config.in_channels:
            raise ValueError(f"image must have {self.vqvae.config.in_channels} channels, got {pixels.shape[1]}.")
        if pixels.max() > 1.01:
            raise ValueError(f"image arrays must be in [0, 1], got values up to {(pixels.max().item() + 1) / 2:.4g}.")
        return pixels

    def prepare_image_latents(self, pixels: torch.Tensor, count: int) -> torch.Tensor:
        """Scaled float32 latents `(count, c, h, w)` of images `(n, C, H, W)` in [-1, 1], each repeated in place."""
        pixels = pixels.to(self._execution_device, self.vqvae.dtype)
        latents = scale_latents(self.vqvae, self.vqvae.encode(pixels).latents.float())
        return latents.repeat_interleave(count // len(latents), dim=0)

    def prepare_timesteps(self, num_inference_steps: int, strength: float, device: torch.device) -> torch.Tensor:
        """The last `strength` share of the scheduler's timesteps (SDEdit)."""
        if not isinstance(strength, Real) or not 1 <= int(num_inference_steps * strength) <= num_inference_steps:
            raise ValueError(
                f"strength must be at most 1 and leave one of {num_inference_steps} steps, got {strength!r}."
            )
        if isinstance(self.scheduler, PNDMScheduler) and strength < 1 and not self.scheduler.config.skip_prk_steps:
            raise ValueError("PNDMScheduler needs skip_prk_steps=True to start from an image.")
        self.set_timesteps(num_inference_steps, device)
        first = (num_inference_steps - int(num_inference_steps * strength)) * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return self.scheduler.timesteps[first:]

    # The loop -----------------------------------------------------------------------------------------------------

    def denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor | None,
        *,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        guidance_rescale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        eta: float,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...],
        after_step: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Denoise scaled latents `(n, c, h, w)`, float32, through the scheduler's `timesteps`.

        Args:
            labels (`torch.Tensor` of shape `(n,)`, *optional*): The class of each image.
            after_step: Called as `f(step, latents)` after each step; returns the latents to go on with.
            The others: See `LooCLDMPipeline.__call__`.
        """
        names = self._tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        generator = list(generator) if isinstance(generator, tuple) else generator
        seed_scheduler(self.scheduler, generator, len(latents))
        step_arguments = self.prepare_extra_step_kwargs(generator, eta)
        conditions = self.prepare_conditions(labels)
        # Read here, once: in the loop it would wait for the device.
        shares = (timesteps / self.scheduler.config.num_train_timesteps).tolist()
        self._guidance_scale = guidance_scale
        self._num_timesteps = len(timesteps)
        self._interrupt = False
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    continue
                inside = guidance_interval[0] <= shares[i] <= guidance_interval[1]
                scale = self._guidance_scale if inside else 1.0
                model_output = self._model_output(latents, t, conditions, scale, guidance_rescale)
                step_arguments |= order_of_step(self.scheduler)
                latents = self.scheduler.step(model_output, t, latents, **step_arguments, return_dict=False)[0]
                if after_step is not None:
                    latents = after_step(i, latents)
                if callback_on_step_end is not None:
                    tensors = {}
                    for name in names:
                        tensors[name] = locals()[name]
                    changed = callback_on_step_end(self, i, t, tensors) or {}
                    latents = changed.get("latents", latents)
                progress_bar.update()
        return latents

    def prepare_conditions(self, labels: torch.Tensor | None) -> tuple[dict, dict | None]:
        """What the UNet is called with beside latents and timestep: for the labels, and for labels and null class.

        The latter, for guidance, is None where there is no null class.
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
        """The UNet's output for a batch, float32, guided if the scale is not 1 (one pass over both halves)."""
        scaled = hasattr(self.scheduler, "scale_model_input")  # not those of flow matching
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

    # Output -------------------------------------------------------------------------------------------------------

    def finish(self, latents: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """Decode scaled latents, as `output_type` says, and let offloaded models go."""
        if output_type == "latent":
            return self.finish_images(latents.to(self.unet.dtype), output_type, return_dict)
        return self.finish_images(self.decode_latents(latents), output_type, return_dict)

    def finish_images(self, images: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """Images `(n, C, H, W)` in [-1, 1] (or latents) as `output_type` says; lets offloaded models go."""
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Float32 images `(n, C, H, W)`, about [-1, 1], of scaled latents `(n, c, h, w)`."""
        return self.vqvae.decode(unscale_latents(self.vqvae, latents).to(self.vqvae.dtype)).sample.float()
