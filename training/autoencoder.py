"""Stage 1: train a `LooCVQModel`.

    looc-ldm train autoencoder --config fashion_mnist/autoencoder
    looc-ldm train autoencoder --config imagenette/autoencoder --data.path my_images --output_dir runs/mine
    accelerate launch -m looc_ldm.training.autoencoder --config imagenet/autoencoder --data.path /data/imagenet

The loss is reconstruction + LPIPS + lambda * PatchGAN + quantizer (VQGAN, taming-transformers), each term switchable.
The same command again goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers.utils import make_image_grid
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from looc_ldm.autoencoder import LooCVQModel
from looc_ldm.errors import one_line_errors
from looc_ldm.files import check_folder
from looc_ldm.images import to_float, to_pil, to_uint8
from looc_ldm.metrics.reconstruction import evaluate_reconstruction
from looc_ldm.training.config import AutoencoderConfig, construct, parse_command_line
from looc_ldm.training.data import ImageSet, ImageStream, StreamBatches, load_image_sets, spread, stream_loader
from looc_ldm.training.ema import EMA
from looc_ldm.training.init_from import autoencoder_from
from looc_ldm.training.latents import latent_side, measure_scaling_factor
from looc_ldm.training.losses import (
    PatchDiscriminator,
    adaptive_adversarial_weight,
    hinge_discriminator_loss,
    load_lpips,
)
from looc_ldm.training.run import Run, adamw, set_learning_rate

logger = logging.getLogger(__name__)

PROG = "looc-ldm train autoencoder"
PREVIEW_IMAGES = 8
SCALING_IMAGES = 2_000  # images that the standard deviation of the latents is measured on


def train(config: AutoencoderConfig) -> Path:
    """Train, or go on with, the autoencoder of a config; returns the folder of the finished model."""
    # 1. Data and models, before anything is written
    check_folder(Path(config.output_dir))
    set_seed(config.seed)
    if config.init_from:
        model = autoencoder_from(config)
    else:
        model = construct(LooCVQModel, {"sample_size": config.data.resolution, **config.model}, "model")
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
    if run.finished:
        logger.info("%s is finished", run.folder)
        return run.result
    accelerator = run.accelerator
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model = model.to(accelerator.device)
    ema = EMA(model, config.ema_halflife_images)
    accelerator.register_for_checkpointing(ema)
    optimizer = adamw(model, config.optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    if lpips is not None:
        lpips = lpips.to(accelerator.device)
    if discriminator is not None:
        discriminator_optimizer = adamw(discriminator, config.optimizer)
        discriminator, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)
    run.resume()
    live = accelerator.unwrap_model(model)
    live.quantize.revive()  # tells the quantizer that we call it, once per optimizer step
    batches = StreamBatches(
        run.images_seen,
        config.total_images,
        config.batch_size,
        config.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
    )
    loader = stream_loader(
        ImageStream(images, config.seed), batches, config.data.num_workers, accelerator.device.type == "cuda"
    )

    # 3. Training
    model.train()
    with run.stopping_cleanly(), run.progress_bar("autoencoder") as bar:
        for batch, _ in loader:
            batch = batch.to(accelerator.device, non_blocking=True)
            with accelerator.accumulate(*(m for m in (model, discriminator) if m is not None)):
                # 3a. Autoencoder
                output = model(batch)
                reconstruction = output.sample.float()
                distance = F.l1_loss if terms.reconstruction == "l1" else F.mse_loss
                pixel_loss = distance(reconstruction, batch)
                reconstruction_loss = terms.reconstruction_weight * pixel_loss
                if lpips is not None:
                    perceptual_loss = lpips(*as_rgb(reconstruction, batch)).mean()
                    reconstruction_loss = reconstruction_loss + terms.lpips_weight * perceptual_loss
                    run.record(loss_lpips=perceptual_loss)
                loss = reconstruction_loss + terms.quantizer_weight * output.commit_loss
                adversarial = discriminator is not None and run.images_seen >= terms.adversarial_start_images
                if adversarial:
                    # Unwrapped and frozen: this pass is for the autoencoder's gradient alone.
                    critic = accelerator.unwrap_model(discriminator).requires_grad_(False)
                    generator_loss = -critic(reconstruction).float().mean()
                    critic.requires_grad_(True)
                    weight = torch.tensor(terms.adversarial_weight, device=accelerator.device)
                    if terms.adaptive_weight:
                        ratio = adaptive_adversarial_weight(
                            reconstruction_loss, generator_loss, live.decoder.conv_out.weight
                        )
                        weight = weight * accelerator.reduce(ratio, reduction="mean")
                    loss = loss + weight * generator_loss
                    run.record(loss_generator=generator_loss, adversarial_weight=weight)
                accelerator.backward(loss)
                if accelerator.sync_gradients and config.optimizer.max_grad_norm:
                    accelerator.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
                set_learning_rate(optimizer, run.learning_rate(config.optimizer))
                optimizer.step()
                optimizer.zero_grad()
                run.record(
                    loss=loss,
                    loss_pixel=pixel_loss,
                    loss_quantizer=output.commit_loss,
                    perplexity=output.perplexity,
                )

                # 3b. Discriminator, on the same images
                if adversarial:
                    logits = discriminator(torch.cat([batch, reconstruction.detach()])).float()
                    discriminator_loss = hinge_discriminator_loss(*logits.chunk(2))
                    accelerator.backward(discriminator_loss)
                    if accelerator.sync_gradients and config.optimizer.max_grad_norm:
                        accelerator.clip_grad_norm_(discriminator.parameters(), config.optimizer.max_grad_norm)
                    set_learning_rate(discriminator_optimizer, run.learning_rate(config.optimizer))
                    discriminator_optimizer.step()
                    discriminator_optimizer.zero_grad()
                    run.record(loss_discriminator=discriminator_loss)
            if not accelerator.sync_gradients:
                continue

            # 3c. After an optimizer step
            live.quantize.revive()  # a collective
            run.images_seen += config.batch_size
            ema.update(live, run.images_seen, config.batch_size)
            bar.update(config.batch_size)
            if run.due(config.log_every_images) or run.due(config.checkpoint_every_images):
                live.quantize.check_finite()  # before anything of it is kept
            if run.due(config.log_every_images):
                run.log(bar, learning_rate=run.learning_rate(config.optimizer))
            if run.due(config.checkpoint_every_images):
                run.save_checkpoint()
            if run.due(config.preview_every_images) and accelerator.is_main_process:
                run.save_preview(preview(ema.model, validation))
            run.stop_if_asked()
        live.quantize.check_finite()
        run.save_checkpoint()

    # 4. The result: averaged weights under the plain name, live ones as the variant `non_ema`
    if accelerator.is_main_process:
        loading = {"batch_size": batches.per_forward, "num_workers": config.data.num_workers}
        some = Subset(images, spread(len(images), SCALING_IMAGES))
        scaling_factor = measure_scaling_factor(ema.model, tqdm(float_batches(some, **loading), "scaling factor"))
        ema.model.register_to_config(scaling_factor=scaling_factor)
        live.register_to_config(scaling_factor=ema.model.config.scaling_factor)
        held_out = tqdm(float_batches(validation, **loading), "validation")
        measured = evaluate_reconstruction(ema.model, held_out, validation.content_size)
        with run.writing_result() as folder:
            ema.model.save_pretrained(folder)
            live.save_pretrained(folder, variant="non_ema")
            description = {"validation": measured, "data": asdict(config.data), "images_seen": run.images_seen}
            (folder / "training.json").write_text(json.dumps(description, indent=2))
        run.save_preview(preview(ema.model, validation))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run.result


def as_rgb(*images: torch.Tensor) -> list[torch.Tensor]:
    """Grey images `(B, 1, H, W)` repeated to three channels; others as they are."""
    return [image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image for image in images]


def float_batches(images: ImageSet | Subset, batch_size: int = 64, num_workers: int = 0) -> DataLoader:
    """Batches `(B, C, H, W)` in [-1, 1], in order, not augmented."""
    return DataLoader(images, batch_size=batch_size, num_workers=num_workers, collate_fn=_float_pixels)


def _float_pixels(rows: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    return to_float(torch.stack([pixels for pixels, _ in rows]))


@torch.no_grad()
def preview(model: LooCVQModel, images: ImageSet, count: int = PREVIEW_IMAGES) -> Image.Image:
    """A grid of images, taken at even distances from the set, above their reconstructions."""
    chosen = spread(len(images), count)
    originals = torch.stack([images[int(i)][0] for i in chosen])
    reconstructions = to_uint8(model(to_float(originals).to(model.device, model.dtype)).sample).cpu()
    return make_image_grid([to_pil(image) for image in [*originals, *reconstructions]], 2, len(chosen))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    with one_line_errors():
        config = parse_command_line(AutoencoderConfig, sys.argv[1:] if arguments is None else arguments, PROG)
        print(train(config))


if __name__ == "__main__":
    main()
