"""Stage 2: train a UNet on the latents of a `LooCVQModel`, unconditional or class-conditional.

    looc-ldm train diffusion --config fashion_mnist/diffusion
    looc-ldm train diffusion --config imagenette/diffusion --autoencoder runs/mine/model --data.path my_images
    accelerate launch -m looc_ldm.training.diffusion --config imagenet/diffusion --data.path /data/imagenet

The latents are encoded once, before training, and are those before quantization; the decoder quantizes. The same
command again goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import diffusers
import torch
import torch.nn as nn
from accelerate.utils import set_seed
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.utils import make_image_grid
from PIL import Image
from torch.utils.data import Subset
from tqdm.auto import tqdm

from looc_ldm.images.image_set import ImageSet, spread
from looc_ldm.images.pixels import to_float, to_pil
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.class_embedding import ClassEmbedding
from looc_ldm.models.loading import load_autoencoder
from looc_ldm.models.scaling import encode_latents
from looc_ldm.models.unet import FixedHeadsUNet2DModel
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.pipelines.sampling import sample_images
from looc_ldm.training.checks import check_config, check_evaluation
from looc_ldm.training.config import DiffusionConfig
from looc_ldm.training.config_parsing import construct, parse_command_line
from looc_ldm.training.data import (
    OnlineLatentStream,
    float_batches,
    load_image_sets,
    make_stream,
    stream_loader,
)
from looc_ldm.training.ema import EMA
from looc_ldm.training.init_from import denoiser_from
from looc_ldm.training.latent_encoding import cache_latents, latent_side
from looc_ldm.training.latent_fingerprint import run_fingerprint
from looc_ldm.training.latents import LatentStream
from looc_ldm.training.log import data_line, show_log_lines
from looc_ldm.training.moments import SCALING_IMAGES, Moments, measure_latents
from looc_ldm.training.objectives import Objective
from looc_ldm.training.optimization import adamw, clip_gradients, set_learning_rate
from looc_ldm.training.result import first_stage_figures, write_description
from looc_ldm.training.run import Run
from looc_ldm.training.validation import generation_figures
from looc_ldm.utils.distributed import gather_full_model, on_main, prepare_fsdp
from looc_ldm.utils.errors import ConfigError, one_line_errors, print_once
from looc_ldm.utils.files import replace_text

logger = logging.getLogger(__name__)

PROG = "looc-ldm train diffusion"
UNETS = {
    "UNet2DModel": UNet2DModel,
    "UNet2DConditionModel": UNet2DConditionModel,
    "FixedHeadsUNet2DModel": FixedHeadsUNet2DModel,
}
PREVIEW_IMAGES = 40


def train(config: DiffusionConfig) -> Path:
    """Train the diffusion model of a config, or go on with it; return the folder of the finished pipeline."""
    # 1. Data and models, before anything is written
    check_config(config)
    check_evaluation(config)
    set_seed(config.seed)
    if not config.autoencoder and not config.init_from:
        raise ConfigError("autoencoder: give the folder or hub id of a trained first stage.")
    vqvae = load_autoencoder(config.autoencoder or config.init_from).requires_grad_(False)
    first_stage = first_stage_figures(vqvae)
    images, validation = load_image_sets(config.data, vqvae.config.in_channels, config.class_conditional)
    classes = images.classes if config.class_conditional else []
    if config.class_conditional and not classes:
        raise ConfigError(f"class_conditional=true, but {config.data.path} has no classes.")
    if config.init_from:
        denoiser = denoiser_from(config, lambda settings: Denoiser.from_config(settings, vqvae, len(classes)), classes)
    else:
        denoiser = Denoiser.from_config(config, vqvae, len(classes))
    scheduler = make_scheduler(config.scheduler)
    if config.preview_steps > scheduler.config.num_train_timesteps:
        timesteps = scheduler.config.num_train_timesteps
        raise ConfigError(f"preview_steps must be in [1, {timesteps}], got {config.preview_steps}.")
    objective = Objective.from_config(config, scheduler)

    # 2. Devices, processes, precision; latents; the newest checkpoint
    run = Run(config, result="pipeline")
    if run.folder.finished:
        logger.info("%s is finished", run.folder.path)
        return run.folder.result
    accelerator = run.accelerator
    sharded = prepare_fsdp(accelerator)
    vqvae = vqvae.to(accelerator.device)
    if config.cache_latents:
        cache = cache_latents(vqvae, images, Path(config.latents or run.folder.path / "latents"), accelerator)
    if config.gradient_checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
    if config.channels_last and not sharded:  # FSDP cannot divide such weights
        denoiser = denoiser.to(memory_format=torch.channels_last)
    denoiser = denoiser.to(accelerator.device)
    ema = EMA(denoiser, config.ema_halflife_images)
    optimizer = adamw(denoiser, config.optimizer)
    denoiser, optimizer = accelerator.prepare(denoiser, optimizer)
    live = accelerator.unwrap_model(denoiser)
    ema.follow(live)
    if config.compile:
        live.compile()  # in place: the names of its weights stay
    run.resume(partial(run_fingerprint, images, vqvae), ema)
    logger.info(data_line(images, validation, classes, live))
    if config.latent_scaling == "channel" or vqvae.config.scaling_factor is None:
        known = validation if config.data.streaming else Subset(images, spread(len(images), SCALING_IMAGES))
        moments = cache.moments if config.cache_latents else measured_once(vqvae, known, run)  # a collective
        if config.latent_scaling == "channel":
            mean, std = moments.channel_mean, moments.channel_std
            vqvae.register_to_config(scaling_factor=1.0, latents_mean=mean, latents_std=std)
        else:
            vqvae.register_to_config(scaling_factor=1 / moments.standard_deviation)
    null_label = live.null_label
    batches = run.stream_batches()
    if config.cache_latents:
        stream = LatentStream(cache, vqvae, config.seed)
    else:
        stream = make_stream(images, config.seed, batches, config.data.num_workers, run.cursors)
        side = latent_side(vqvae, config.data)
        stream = OnlineLatentStream(stream, (vqvae.quantize.vq_embed_dim, side, side), config.seed)
    loader = stream_loader(stream, batches, config.data.num_workers, accelerator.device.type == "cuda")

    def pipeline() -> LooCLDMPipeline:
        """Return the averaged weights as a pipeline. Collective."""
        id2label = dict(enumerate(classes)) if classes else None
        averaged = ema.gathered()
        return LooCLDMPipeline(vqvae, averaged.unet, scheduler, averaged.class_embedding, id2label, null_label)

    def save(folder: Path, pipe: LooCLDMPipeline, live: Denoiser) -> None:
        """Save averaged weights under the plain name, live ones as the variant `non_ema`, and how they were made."""
        pipe.save_pretrained(folder)
        live.unet.save_pretrained(folder / "unet", variant="non_ema")
        if live.class_embedding is not None:
            live.class_embedding.save_pretrained(folder / "class_embedding", variant="non_ema")
        caption = f"Samples, {config.preview_steps} denoising steps"
        if null_label is not None:
            caption += f", guidance scale {config.preview_guidance_scale:g}"
        caption += "; one column per class." if classes else "."
        write_description(folder, config, run, caption, first_stage=first_stage)

    def preview_and_evaluate() -> None:
        """Write the image grid and the figures that are due after the last step. Collective."""
        if run.skipping:
            return
        with run.log.pause_timer():
            if run.due(config.preview_every_images):
                pipe = pipeline()  # a collective
                if accelerator.is_main_process:
                    run.log.write_preview(run.images_seen, preview(pipe, config))
            if run.due(config.evaluation.every_images):
                resembled = validation if config.data.streaming else images
                logger.info("drawing %d samples to measure", config.evaluation.images)
                figures = generation_figures(pipeline(), resembled, config, accelerator)  # a collective
                run.log.write_evaluation(run.images_seen, figures)

    # 3. Training
    denoiser.train()
    with run.training("diffusion"):
        if run.evaluation_pending:  # the run was stopped between a checkpoint and what was due with it
            preview_and_evaluate()
        for latents, labels, noise, time, dropout in run.batches(loader):
            if not config.cache_latents:
                latents = encode_latents(vqvae, to_float(latents))  # they were images
            with accelerator.accumulate(denoiser):
                noisy, timesteps, target, weight = objective.example(latents, noise, time)
                if null_label is not None:
                    labels = torch.where(dropout < config.class_dropout, null_label, labels)
                with accelerator.autocast():
                    prediction = denoiser(noisy, timesteps, labels if classes else None).float()
                loss = objective.loss(prediction, target, weight)
                run.record(loss=loss)
                accelerator.backward(loss)
                finite = True
                if accelerator.sync_gradients:
                    norm = clip_gradients(accelerator, denoiser, config.optimizer.max_grad_norm)  # waits for the device
                    run.record(grad_norm=norm)
                    finite = math.isfinite(norm)
                set_learning_rate(optimizer, run.learning_rate(config.optimizer))
                if finite:
                    optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue

            # After an optimizer step
            run.after_step(finite)
            if finite:
                ema.update(live, run.images_seen, config.batch_size)
            if run.due(config.log_every_images):
                run.write_log(learning_rate=run.learning_rate(config.optimizer))
            if run.due(config.checkpoint_every_images) and not run.skipping:
                run.save_checkpoint()
                if config.push_to_hub:
                    full = gather_full_model(denoiser, ema.model, accelerator)  # a collective
                    run.push(partial(save, pipe=pipeline(), live=full))
            preview_and_evaluate()  # a collective
            run.stop_if_asked()  # a collective
        run.save_checkpoint()

    # 4. The result
    pipe, live = pipeline(), gather_full_model(denoiser, ema.model, accelerator)  # collectives
    if accelerator.is_main_process:
        if not run.due(config.preview_every_images):
            run.log.write_preview(run.images_seen, preview(pipe, config))
        with run.folder.writing_result() as folder:
            save(folder, pipe, live)
    run.finish()  # a collective
    return run.folder.result


def measured_once(vqvae: LooCVQModel, images: ImageSet | Subset, run: Run) -> Moments:
    """Measure mean and deviation of the latents of some images when a run starts; keep them for when it goes on.

    On the main process only. Collective; after `run.resume`.
    """
    file = run.folder.path / "moments.json"

    def measure() -> Moments:
        if run.images_seen and file.is_file():
            return Moments(**json.loads(file.read_text()))
        batches = float_batches(images, num_workers=run.config.data.num_workers)
        with tqdm(batches, "measuring latents", disable=None) as bar:
            moments = measure_latents(vqvae, bar)
        replace_text(file, json.dumps(asdict(moments)))
        return moments

    return on_main(run.accelerator, measure)


class Denoiser(nn.Module):
    """A UNet and, if it attends to one, its class token: the network that stage 2 trains.

    Attributes:
        null_label (`int`, *optional*): The label of the null class; None without classes or without dropout.
    """

    def __init__(self, unet: nn.Module, class_embedding: ClassEmbedding | None, null_label: int | None):
        super().__init__()
        self.unet = unet
        self.class_embedding = class_embedding
        self.null_label = null_label
        # The parts that FSDP gathers one at a time (Accelerate's name for them): they hold nearly all weights.
        parts = {type(module).__name__ for module in unet.modules()}
        self._no_split_modules = sorted({"ResnetBlock2D", "BasicTransformerBlock"} & parts)

    @classmethod
    def from_config(cls, config: DiffusionConfig, vqvae: LooCVQModel, num_classes: int) -> Denoiser:
        """Build the networks for the latents of `vqvae` and the classes of the data (0: unconditional)."""
        arguments = dict(config.unet)
        kind = arguments.pop("type", "UNet2DModel")
        if kind not in UNETS:
            raise ConfigError(f"unet.type must be one of {', '.join(UNETS)}, got {kind!r}.")
        channels = vqvae.quantize.vq_embed_dim
        null_label = num_classes if num_classes and config.class_dropout else None
        num_class_embeds = num_classes + (null_label is not None)
        of_data = {
            "sample_size": latent_side(vqvae, config.data),
            "in_channels": channels,
            "out_channels": channels,
            "num_class_embeds": num_class_embeds if kind != "UNet2DConditionModel" and num_classes else None,
        }
        for name, value in of_data.items():
            if arguments.setdefault(name, value) != value:
                raise ConfigError(f"unet.{name} is {arguments[name]} in the config, but {value} by the data.")
        class_embedding = None
        if kind == "UNet2DConditionModel":
            if not num_classes or config.class_embedding_dim is None:
                raise ConfigError("unet.type=UNet2DConditionModel needs class_conditional and class_embedding_dim.")
            class_embedding = ClassEmbedding(num_class_embeds, config.class_embedding_dim)
            arguments["cross_attention_dim"] = config.class_embedding_dim
        return cls(construct(UNETS[kind], arguments, "unet"), class_embedding, null_label)

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Return the prediction `(B, c, h, w)` for noisy latents of that shape, timesteps `(B,)` and labels `(B,)`."""
        if self.class_embedding is not None:
            return self.unet(noisy, timesteps, encoder_hidden_states=self.class_embedding(labels)).sample
        if labels is not None:
            return self.unet(noisy, timesteps, class_labels=labels).sample
        return self.unet(noisy, timesteps).sample


def make_scheduler(settings: dict):
    """Return the scheduler of a config. Latents are not images: nothing is clipped unless the config says so."""
    arguments = dict(settings)
    kind = arguments.pop("type", "DDIMScheduler")
    scheduler_class = getattr(diffusers, str(kind), None)
    if scheduler_class is None or not kind.endswith("Scheduler"):
        raise ConfigError(f"scheduler.type must be the name of a diffusers scheduler, got {kind!r}.")
    if kind in ("DDIMScheduler", "DDPMScheduler"):
        arguments = {"clip_sample": False, **arguments}
    return construct(scheduler_class, arguments, "scheduler")


def preview(pipe: LooCLDMPipeline, config: DiffusionConfig) -> Image.Image:
    """Return a grid of samples from fixed noise: one column per class, or as many unconditional ones."""
    num_classes = len(pipe.config.id2label or {})
    columns = min(num_classes, 10) or 8
    rows = PREVIEW_IMAGES // columns
    labels = [column if num_classes else None for column in range(columns)] * rows
    guidance = config.preview_guidance_scale if pipe.config.null_class_label is not None else 1.0
    images = sample_images(
        pipe,
        labels,
        seed=config.seed,
        progress=False,
        num_inference_steps=config.preview_steps,
        guidance_scale=guidance,
    )
    return make_image_grid([to_pil(image) for image in images], rows, columns)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    show_log_lines()
    with one_line_errors():
        config = parse_command_line(DiffusionConfig, sys.argv[1:] if arguments is None else arguments, PROG)
        print_once(train(config))


if __name__ == "__main__":
    main()
