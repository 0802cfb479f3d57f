"""Stage 1: train a `LooCVQModel`.

    looc-ldm train autoencoder --config fashion_mnist/autoencoder
    looc-ldm train autoencoder --config imagenette/autoencoder --data.path my_images --output_dir runs/mine
    accelerate launch -m looc_ldm.training.autoencoder --config imagenet/autoencoder --data.path /data/imagenet

The loss is reconstruction + LPIPS + lambda * PatchGAN + quantizer (VQGAN, taming-transformers), each term switchable.
To resume an interrupted run, run the same command again.
"""

from __future__ import annotations

import logging
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch.utils.data import Subset

from looc_ldm.images.image_set import ImageSet, spread
from looc_ldm.images.pixels import to_float
from looc_ldm.metrics.reconstruction import evaluate_reconstruction
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.training.checks import check_config, check_evaluation, latent_side
from looc_ldm.training.config import AutoencoderConfig
from looc_ldm.training.config_parsing import parse_command_line
from looc_ldm.training.data import float_batches, load_image_sets, make_stream, stream_loader
from looc_ldm.training.ema import EMA
from looc_ldm.training.init_from import make_autoencoder, newest_weights
from looc_ldm.training.latent_fingerprint import run_fingerprint
from looc_ldm.training.log import data_line, progress, show_log_lines
from looc_ldm.training.losses import (
    PatchDiscriminator,
    adaptive_adversarial_weight,
    hinge_discriminator_loss,
    load_lpips,
)
from looc_ldm.training.moments import SCALING_IMAGES, measure_scaling_factor
from looc_ldm.training.optimization import adamw, clip_gradients, set_learning_rate
from looc_ldm.training.result import show_result, validation_data, write_description
from looc_ldm.training.run import Run
from looc_ldm.training.validation import LOGGED, codebook_use, reconstruction_figures, reconstruction_grid
from looc_ldm.utils.errors import ConfigError, one_line_errors

logger = logging.getLogger(__name__)

PROG = "looc-ldm train autoencoder"
PREVIEW_IMAGES = 8
PREVIEW_CAPTION = "Rows: held-out images; reconstructions by averaged weights; by live weights."


def train(config: AutoencoderConfig) -> Path:
    """Train the autoencoder of a config, or resume its run; return the folder of the finished model."""
    # 1. Data and models, before anything is written
    check_config(config)
    check_evaluation(config)
    set_seed(config.seed)
    start = newest_weights(config)
    model = make_autoencoder(config, start)
    if model.config.in_channels != model.config.out_channels:
        raise ConfigError(
            f"model.in_channels={model.config.in_channels} and model.out_channels={model.config.out_channels} must be "
            "equal, both 1 (grey) or both 3."
        )
    latent_side(model, config.data)  # refuses a resolution that does not divide
    images, validation = load_image_sets(config.data, model.config.in_channels)
    terms = config.loss
    lpips = load_lpips(terms.lpips_network, terms.lpips_weights) if terms.lpips_weight else None
    discriminator = None
    if terms.adversarial_weight:
        discriminator = PatchDiscriminator(
            model.config.out_channels, terms.discriminator_channels, terms.discriminator_layers
        )

    # 2. Devices, processes, precision; the newest checkpoint
    run = Run(config, result="model")
    if run.folder.finished:
        logger.info("%s is finished", run.folder.path)
        return run.folder.result
    accelerator = run.accelerator
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if run.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model = model.to(accelerator.device)
    ema = EMA(model, config.ema_halflife_images)
    if start is not None:
        ema.go_on_from(start.averaged, start.images)
    optimizer = adamw(model, config.optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    live = accelerator.unwrap_model(model)
    live.quantize.owner_revives = True
    if config.compile:
        if terms.adversarial_weight and terms.adaptive_weight:
            # The adaptive weight goes back through the graph more than once, which then may not give its buffers away.
            torch._functorch.config.donated_buffer = False
        live.compile()  # in place: the names of its weights stay
    if lpips is not None:
        lpips = lpips.to(accelerator.device)
    if discriminator is not None:
        discriminator_optimizer = adamw(discriminator, config.optimizer)
        discriminator, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)
    run.resume(partial(run_fingerprint, images), ema)
    logger.info(data_line(images, validation, images.classes, live))
    batches = run.stream_batches()
    stream = make_stream(images, config.seed, batches, config.data.num_workers, run.cursors)
    loader = stream_loader(stream, batches, config.data.num_workers, accelerator.device.type == "cuda")
    loading = {"batch_size": batches.per_forward, "num_workers": config.data.num_workers}
    save = partial(save_model, run, ema.model, live)
    preview_and_evaluate = partial(_preview_and_evaluate, run, ema.model, live, validation, lpips, loading)

    def trial() -> None:
        """Do the work of a training step and leave no trace of it."""
        output = model(torch.rand(batches.per_forward, live.config.in_channels, *2 * [config.data.resolution]))
        accelerator.backward(output.sample.float().mean() + output.commit_loss)
        optimizer.zero_grad()
        live.quantize.discard()

    # 3. Training
    model.train()
    run.use_fastest_threads(trial)
    with run.training("autoencoder"):
        for pixels, _ in run.watch(loader):  # uint8 images, as the loader gives them, and labels
            batch = to_float(pixels.to(accelerator.device, non_blocking=True))
            learning_rate = run.learning_rate(config.optimizer)
            adversarial = discriminator is not None and run.images_seen >= terms.adversarial_start_images
            with accelerator.accumulate(*(m for m in (model, discriminator) if m is not None)):
                # 3a. Autoencoder. All losses but LPIPS are outside of autocast: float32.
                output = model(batch)
                reconstruction = output.sample.float()
                distance = F.l1_loss if terms.reconstruction == "l1" else F.mse_loss
                pixel_loss = distance(reconstruction, batch)
                reconstruction_loss = terms.reconstruction_weight * pixel_loss
                if lpips is not None:
                    seen = math.ceil(terms.lpips_share * len(batch))
                    with accelerator.autocast():
                        perceptual_loss = lpips(*as_rgb(reconstruction[:seen], batch[:seen]), autocast=True).mean()
                    reconstruction_loss = reconstruction_loss + terms.lpips_weight * perceptual_loss
                    run.record(loss_lpips=perceptual_loss)
                loss = reconstruction_loss + terms.quantizer_weight * output.commit_loss
                if adversarial:
                    # Unwrapped and frozen: this pass is for the autoencoder's gradient alone.
                    critic = accelerator.unwrap_model(discriminator).requires_grad_(False)
                    generator_loss = -critic(reconstruction).float().mean()
                    critic.requires_grad_(True)
                    weight = terms.adversarial_weight
                    if terms.adaptive_weight:
                        weight = weight * adaptive_adversarial_weight(
                            reconstruction_loss,
                            generator_loss,
                            live.decoder.conv_out.weight,
                            partial(accelerator.reduce, reduction="mean"),  # a collective
                        )
                    loss = loss + weight * generator_loss
                    run.record(loss_generator=generator_loss, adversarial_weight=weight)
                run.record(
                    loss=loss,
                    loss_pixel=pixel_loss,
                    loss_quantizer=output.commit_loss,
                    perplexity=output.perplexity,
                )
                accelerator.backward(loss)
                finite = True
                if accelerator.sync_gradients:
                    norm = clip_gradients(accelerator, model, config.optimizer.max_grad_norm)  # waits for the device
                    run.record(grad_norm=norm)
                    finite = math.isfinite(norm)
                set_learning_rate(optimizer, learning_rate)
                if finite:
                    optimizer.step()
                optimizer.zero_grad()

                # 3b. Discriminator, on the same images
                discriminator_finite = True
                if adversarial:
                    logits = discriminator(torch.cat([batch, reconstruction.detach()])).float()
                    real, fake = logits.chunk(2)
                    discriminator_loss = hinge_discriminator_loss(real, fake)
                    run.record(loss_discriminator=discriminator_loss)
                    accelerator.backward(discriminator_loss)
                    if accelerator.sync_gradients:
                        norm = clip_gradients(accelerator, discriminator, config.optimizer.max_grad_norm)
                        run.record(discriminator_grad_norm=norm)
                        discriminator_finite = math.isfinite(norm)
                    set_learning_rate(discriminator_optimizer, learning_rate)
                    if finite and discriminator_finite:
                        discriminator_optimizer.step()
                    discriminator_optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue

            # 3c. After an optimizer step
            run.after_step(finite and discriminator_finite)
            if finite:
                live.quantize.revive()  # a collective
                ema.update(live, run.images_seen, config.batch_size)
            else:
                live.quantize.discard()
            if run.due(config.log_every_images):
                run.write_log(learning_rate=run.learning_rate(config.optimizer), **codebook_use(live.quantize))
            preview_and_evaluate()
            if run.due(config.checkpoint_every_images) and not run.skipping:
                run.save_checkpoint()
                run.push(save)
            run.stop_if_asked()  # a collective
            run.keep_speed()
        run.save_checkpoint()

    # 4. The result
    logger.info("measuring the scaling factor and the reconstructions of all held-out images")
    if accelerator.is_main_process:
        known = validation if config.data.streaming else Subset(images, spread(len(images), SCALING_IMAGES))
        with progress(float_batches(known, **loading), "scaling factor") as batches:
            scaling_factor = measure_scaling_factor(ema.model, batches)
        for trained in (ema.model, live):
            trained.register_to_config(scaling_factor=scaling_factor)
        with progress(float_batches(validation, **loading), "validation") as batches:
            measured = evaluate_reconstruction(ema.model, batches, validation.content_size)
        logger.info("held-out %s", ", ".join(f"{k} {measured[k]:.4g}" for k in LOGGED if k in measured))
        if not run.due(config.preview_every_images):
            grid = reconstruction_grid([ema.model, live], validation, PREVIEW_IMAGES)
            run.log.write_preview(run.images_seen, grid, PREVIEW_CAPTION)
        with run.folder.writing_result() as folder:
            save(folder, validation=measured | validation_data(config.data))
    run.finish()  # a collective
    return run.folder.result


def save_model(run: Run, averaged: LooCVQModel, live: LooCVQModel, folder: Path, **figures) -> None:
    """Save the averaged weights as the model, the live weights as its variant `non_ema`, and `training.json`."""
    averaged.save_pretrained(folder)
    live.save_pretrained(folder, variant="non_ema")
    caption = "Held-out images above, their reconstructions below."
    write_description(folder, run.config, run, caption, **figures)


def _preview_and_evaluate(
    run: Run, averaged: LooCVQModel, live: LooCVQModel, validation: ImageSet, lpips: nn.Module | None, loading: dict
) -> None:
    """Write the image grid and the figures that are due after the last step."""
    config = run.config
    if run.skipping or not run.accelerator.is_main_process:
        return
    with run.log.pause_timer():
        if run.due(config.preview_every_images) or run.log.first_preview_due():
            grid = reconstruction_grid([averaged, live], validation, PREVIEW_IMAGES)
            run.log.write_preview(run.images_seen, grid, PREVIEW_CAPTION)
        if run.due(config.evaluation.every_images):
            logger.info("measuring reconstructions of held-out images")
            figures = reconstruction_figures(averaged, validation, config.evaluation, **loading, lpips=lpips)
            run.log.write_evaluation(run.images_seen, figures)


def as_rgb(*images: torch.Tensor) -> list[torch.Tensor]:
    """Repeat grey images `(B, 1, H, W)` to three channels; leave others as they are."""
    return [image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image for image in images]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    show_log_lines()
    with one_line_errors():
        config = parse_command_line(AutoencoderConfig, sys.argv[1:] if arguments is None else arguments, PROG)
        show_result(config, train(config))


if __name__ == "__main__":
    main()
