"""Stage 2: train a UNet on the latents of a `LooCVQModel`, unconditional or class-conditional.

    looc-ldm train diffusion --config fashion_mnist/diffusion
    looc-ldm train diffusion --config imagenette/diffusion --autoencoder runs/mine/model --data.path my_images
    accelerate launch -m looc_ldm.training.diffusion --config imagenet/diffusion --data.path /data/imagenet

The latents are encoded once, before training. They are not quantized yet: the decoder quantizes them. To resume an
interrupted run, run the same command again.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import send_to_device, set_seed
from diffusers.utils import make_image_grid
from PIL import Image
from torch.utils.data import Subset

from looc_ldm.images.image_set import ImageSet, spread
from looc_ldm.images.pixels import to_float, to_pil
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.models.loading import load_autoencoder
from looc_ldm.models.scaling import encode_latents
from looc_ldm.pipelines.ldm import LooCLDMPipeline
from looc_ldm.pipelines.sampling import sample_images
from looc_ldm.training.checks import check_config, check_evaluation, latent_side
from looc_ldm.training.config import DiffusionConfig
from looc_ldm.training.config_parsing import parse_command_line
from looc_ldm.training.data import (
    OnlineLatentStream,
    float_batches,
    load_image_sets,
    make_stream,
    stream_loader,
    with_stage_1_images,
)
from looc_ldm.training.denoiser import Denoiser, make_scheduler
from looc_ldm.training.ema import EMA
from looc_ldm.training.init_from import denoiser_from, newest_weights
from looc_ldm.training.latent_encoding import cache_latents
from looc_ldm.training.latent_fingerprint import run_fingerprint
from looc_ldm.training.latents import LatentStream
from looc_ldm.training.log import data_line, progress, show_log_lines
from looc_ldm.training.moments import SCALING_IMAGES, Moments, measure_latents
from looc_ldm.training.objectives import Objective
from looc_ldm.training.optimization import adamw, clip_gradients, set_learning_rate
from looc_ldm.training.result import first_stage_figures, show_result, write_description
from looc_ldm.training.run import Run
from looc_ldm.training.validation import generation_figures
from looc_ldm.utils.distributed import gather_full_model, on_main, prepare_fsdp
from looc_ldm.utils.errors import ConfigError, one_line_errors
from looc_ldm.utils.files import replace_text

logger = logging.getLogger(__name__)

PROG = "looc-ldm train diffusion"
PREVIEW_IMAGES = 40


def train(config: DiffusionConfig) -> Path:
    """Train the diffusion model of a config, or resume its run; return the folder of the finished pipeline."""
    # 1. Data and models, before anything is written
    check_config(config)
    check_evaluation(config)
    set_seed(config.seed)
    if not config.autoencoder and not config.init_from:
        raise ConfigError("autoencoder: give the folder or hub id of a trained first stage.")
    start = newest_weights(config)
    first = config.autoencoder or (config.init_from if start is None else start.settings.autoencoder)
    vqvae = load_autoencoder(first).requires_grad_(False)
    config = with_stage_1_images(config, vqvae)
    first_stage = first_stage_figures(vqvae)
    images, validation = load_image_sets(config.data, vqvae.config.in_channels, config.class_conditional)
    classes = images.classes if config.class_conditional else []
    if config.class_conditional and not classes:
        raise ConfigError(f"class_conditional=true, but {config.data.path} has no classes.")
    if config.init_from:
        denoiser = denoiser_from(config, vqvae, classes, start)
    else:
        denoiser = Denoiser.from_config(config, vqvae, len(classes))
    scheduler = make_scheduler(config.scheduler)
    objective = Objective.from_config(config, scheduler)
    if config.preview_steps > objective.num_timesteps:
        raise ConfigError(f"preview_steps must be in [1, {objective.num_timesteps}], got {config.preview_steps}.")

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
    if run.channels_last and not sharded:  # FSDP cannot shard channels_last weights
        denoiser = denoiser.to(memory_format=torch.channels_last)
    denoiser = denoiser.to(accelerator.device)
    ema = EMA(denoiser, config.ema_halflife_images)
    optimizer = adamw(denoiser, config.optimizer)
    denoiser, optimizer = accelerator.prepare(denoiser, optimizer)
    live = accelerator.unwrap_model(denoiser)
    ema.shard_like(live)
    if start is not None:
        ema.go_on_from(start.averaged, start.images)
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
        """Save averaged weights under the plain name, live ones as the variant `non_ema`, and `training.json`."""
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
                    run.log.write_preview(run.images_seen, *preview(pipe, config))
            if run.due(config.evaluation.every_images):
                resembled = validation if config.data.streaming else images
                logger.info("drawing %d samples to measure", config.evaluation.images)
                figures = generation_figures(pipeline(), resembled, config, accelerator)  # a collective
                run.log.write_evaluation(run.images_seen, figures)

    def trial() -> None:
        """Compute one forward and backward pass on dummy data, to time it, and drop its gradients."""
        n, side = batches.per_forward, live.unet.config.sample_size
        zeros = torch.zeros(n, dtype=torch.int64)
        with accelerator.autocast():
            prediction = denoiser(
                torch.randn(n, vqvae.quantize.vq_embed_dim, side, side), zeros, zeros if classes else None
            )
        accelerator.backward(prediction.float().square().mean())
        optimizer.zero_grad()

    # 3. Training
    denoiser.train()
    run.use_fastest_threads(trial)
    with run.training("diffusion"):
        for batch in run.watch(loader):
            latents, labels, noise, time, dropout = send_to_device(batch, accelerator.device, non_blocking=True)
            if not config.cache_latents:
                latents = encode_latents(vqvae, to_float(latents))  # the loader gave images
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
            preview_and_evaluate()  # a collective
            if run.due(config.checkpoint_every_images) and not run.skipping:
                run.save_checkpoint()
                if config.push_to_hub:
                    full = gather_full_model(denoiser, ema.model, accelerator)  # a collective
                    run.push(partial(save, pipe=pipeline(), live=full))
            run.stop_if_asked()  # a collective
            run.keep_speed()
        run.save_checkpoint()

    # 4. The result
    pipe, live = pipeline(), gather_full_model(denoiser, ema.model, accelerator)  # collectives
    if accelerator.is_main_process:
        if not run.due(config.preview_every_images):
            run.log.write_preview(run.images_seen, *preview(pipe, config))
        with run.folder.writing_result() as folder:
            save(folder, pipe, live)
    run.finish()  # a collective
    return run.folder.result


def measured_once(vqvae: LooCVQModel, images: ImageSet | Subset, run: Run) -> Moments:
    """Measure the mean and deviation of the latents of `images`, or read them from `moments.json` in a resumed run.

    Collective: the main process measures, and every process gets the result. Call it after `run.resume`.
    """
    file = run.folder.path / "moments.json"

    def measure() -> Moments:
        if run.images_seen and file.is_file():
            return Moments(**json.loads(file.read_text()))
        batches = float_batches(images, num_workers=run.config.data.num_workers)
        with progress(batches, "measuring latents") as bar:
            moments = measure_latents(vqvae, bar)
        replace_text(file, json.dumps(asdict(moments)))
        return moments

    return on_main(run.accelerator, measure)


def preview(pipe: LooCLDMPipeline, config: DiffusionConfig) -> tuple[Image.Image, str]:
    """Return a grid of samples from fixed noise and its caption: one column per class, or unconditional ones."""
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
    caption = f"Samples by averaged weights, {config.preview_steps} steps, guidance scale {guidance:g}."
    if num_classes:
        caption += f" Columns: {', '.join(pipe.config.id2label[column] for column in range(columns))}."
    return make_image_grid([to_pil(image) for image in images], rows, columns), caption


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    show_log_lines()
    with one_line_errors():
        config = parse_command_line(DiffusionConfig, sys.argv[1:] if arguments is None else arguments, PROG)
        show_result(config, train(config))


if __name__ == "__main__":
    main()
