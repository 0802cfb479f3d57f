"""Images per second of both trainers, against the same step in a bare loop.

    python benchmarks/training.py --data PHOTOGRAPHS --batch-size 8          the small models, for CPUs
    python benchmarks/training.py --data PHOTOGRAPHS --config imagenet --device cuda

Writes benchmarks/results/training.jsonl, one line per contestant. --data holds one sub-folder of images per class, all
of at least the config's resolution. The contestants of a stage take turns, and each figure is the fastest of its turns:
read the ratios.

A *bare loop* has the trainer's networks, losses, precision, fused AdamW, revival and average of weights, but no
Accelerate, data, logs and checkpoints: its images are random numbers that stay on the device. A *trainer* is the
command in its own process; its speed is that of its log's second interval. The PatchGAN trains from the first step.
LPIPS and the first stage of stage 2 have random weights, which take as long as trained ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from results import RESULTS, ROOT, circumstances, replace_results
from safetensors.torch import save_file
from torch.nn.utils import clip_grad_norm_
from torchvision.models import vgg16

from looc_ldm import LooCVQModel
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.config_parsing import construct, load_config
from looc_ldm.training.data import with_stage_1_images
from looc_ldm.training.denoiser import Denoiser, make_scheduler
from looc_ldm.training.losses import (
    PatchDiscriminator,
    adaptive_adversarial_weight,
    hinge_discriminator_loss,
    load_lpips,
)
from looc_ldm.training.objectives import Objective
from looc_ldm.training.optimization import adamw, resolve_precision

EMA_DECAY = 0.999
NEVER = 10**12  # images


def autoencoder(config: AutoencoderConfig) -> LooCVQModel:
    torch.manual_seed(0)
    return construct(LooCVQModel, {"sample_size": config.data.resolution, **config.model}, "model")


@torch.no_grad()
def average(averaged: nn.Module, live: nn.Module) -> None:
    torch._foreach_lerp_(list(averaged.parameters()), list(live.parameters()), 1 - EMA_DECAY)


def update(loss: torch.Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def bare_autoencoder(config: AutoencoderConfig, device: str) -> Callable[[], None]:
    """Return a step of stage 1 without anything around it."""
    terms, side = config.loss, config.data.resolution
    model = autoencoder(config).to(device).train()
    if device != "cpu" if config.channels_last is None else config.channels_last:
        model.to(memory_format=torch.channels_last)
    critic = PatchDiscriminator(3, terms.discriminator_channels, terms.discriminator_layers).to(device)
    averaged, lpips = copy.deepcopy(model), load_lpips(terms.lpips_network, terms.lpips_weights).to(device)
    optimizer, critic_optimizer = adamw(model, config.optimizer), adamw(critic, config.optimizer)
    images = torch.rand(config.batch_size, 3, side, side, device=device) * 2 - 1
    bf16 = resolve_precision(config.mixed_precision) == "bf16"
    if config.compile:
        model.compile()
    model.quantize.owner_revives = True

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            output = model(images)
        sample = output.sample.float()
        reconstruction_loss = F.l1_loss(sample, images) + terms.lpips_weight * lpips(sample, images).mean()
        critic.requires_grad_(False)
        generator_loss = -critic(sample).mean()
        critic.requires_grad_(True)
        weight = terms.adversarial_weight
        if terms.adaptive_weight:
            last = model.decoder.conv_out.weight
            weight = weight * adaptive_adversarial_weight(reconstruction_loss, generator_loss, last)
        update(reconstruction_loss + output.commit_loss + weight * generator_loss, model, optimizer)
        real, fake = critic(torch.cat([images, sample.detach()])).chunk(2)
        update(hinge_discriminator_loss(real, fake), critic, critic_optimizer)
        model.quantize.revive()
        average(averaged, model)

    return step


def bare_diffusion(config: DiffusionConfig, vqvae: LooCVQModel, classes: int, device: str) -> Callable[[], None]:
    """Return a step of stage 2 without anything around it."""
    torch.manual_seed(0)
    denoiser = Denoiser.from_config(config, vqvae, classes).to(device).train()
    if device != "cpu" if config.channels_last is None else config.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    averaged = copy.deepcopy(denoiser)
    objective = Objective.from_config(config, make_scheduler(config.scheduler))
    optimizer = adamw(denoiser, config.optimizer)
    side = config.data.resolution // vqvae.downsampling_factor
    latents, noise = torch.randn(2, config.batch_size, vqvae.quantize.vq_embed_dim, side, side, device=device)
    uniform = torch.rand(config.batch_size, device=device)
    labels = torch.randint(classes, (config.batch_size,), device=device) if classes else None
    bf16 = resolve_precision(config.mixed_precision) == "bf16"
    if config.compile:
        denoiser.compile()

    def step() -> None:
        noisy, timesteps, target, weight = objective.example(latents, noise, uniform)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            prediction = denoiser(noisy, timesteps, labels).float()
        update(objective.loss(prediction, target, weight), denoiser, optimizer)
        average(averaged, denoiser)

    return step


def bare_loop(step: Callable[[], None], device: str) -> Callable[[int], float]:
    """Return a function that takes a number of steps and returns their seconds."""

    def turn(steps: int) -> float:
        step()  # warms up
        torch.cuda.synchronize() if device == "cuda" else None
        started = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize() if device == "cuda" else None
        return time.perf_counter() - started

    return turn


def trainer(config: str, settings: dict, batch_size: int, device: str) -> Callable[[int], float]:
    """Return a function that runs the trainer for two intervals of some steps and returns the seconds of the second."""
    environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {})

    def turn(steps: int) -> float:
        images = steps * batch_size
        interval = {"log_every_images": images, "total_images": 2 * images}
        flags = [f"--{name}={value}" for name, value in (settings | interval).items()]
        with tempfile.TemporaryDirectory() as output:
            command = [sys.executable, "-m", f"looc_ldm.training.{config.split('/')[1]}", "--config", config, *flags]
            ended = subprocess.run(
                [*command, f"--output_dir={output}/run"], cwd=ROOT, env=environment, capture_output=True, text=True
            )
            if ended.returncode:
                sys.exit(f"error: the trainer ended:\n{ended.stderr[-3000:]}")
            lines = Path(output, "run", "metrics.jsonl").read_text().splitlines()
        return images / json.loads(lines[1])["images_per_second"]

    return turn


def compare(contestants: dict[str, Callable[[int], float]], batch_size: int, options: argparse.Namespace) -> list[dict]:
    """Let contestants take turns. The first one, a bare loop, decides how many steps a turn has."""
    first = next(iter(contestants))
    steps = max(2, math.ceil(options.seconds / contestants[first](1)))
    seconds = {name: [] for name in contestants}
    for _ in range(options.turns):
        for name, turn in contestants.items():
            seconds[name].append(turn(steps))
            print(f"{name}: {steps * batch_size / seconds[name][-1]:.4g} images/s", flush=True)
    best = {name: min(taken) for name, taken in seconds.items()}
    return [
        {"contestant": name, "images_per_second": steps * batch_size / taken, "ratio": best[first] / taken}
        for name, taken in best.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder of photographs per class")
    parser.add_argument("--config", default="imagenette", help="bundled configs with LPIPS and PatchGAN")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step (default: 16)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a bare loop's turn (default: 20)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each contestant (default: 3)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "training.jsonl")
    options = parser.parse_args()
    batch, device = options.batch_size, options.device
    shared = {"data.path": options.data.resolve(), "data.validation_split": "null", "data.validation_images": 16}
    shared |= {"batch_size": batch, "tracker": "none"}
    shared |= {f"{event}_every_images": NEVER for event in ("preview", "checkpoint")}
    first = load_config(AutoencoderConfig, f"{options.config}/autoencoder", batch_size=batch)
    second = load_config(DiffusionConfig, f"{options.config}/diffusion", batch_size=batch)
    vqvae, side = autoencoder(first), first.data.resolution
    second = with_stage_1_images(second, vqvae)
    about = {
        "config": options.config,
        "batch_size": batch,
        "precision": resolve_precision(first.mixed_precision),
        "bits_per_pixel": vqvae.bits_per_image(side, side) / side**2,
        **circumstances(device, "accelerate"),
        "command": f"python benchmarks/training.py --data PHOTOGRAPHS --config {options.config} --batch-size {batch} "
        f"--seconds {options.seconds:g} --turns {options.turns} --device {device}",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random = vgg16(weights=None).features.state_dict()
        save_file({f"features.{key}": tensor for key, tensor in random.items()}, folder / "vgg16.safetensors")
        first.loss.lpips_weights = str(folder / "vgg16.safetensors")
        vqvae.save_pretrained(folder / "first_stage")
        own = {"loss.lpips_weights": first.loss.lpips_weights, "loss.adversarial_start_images": 0}
        stage_1 = {
            "bare loop": bare_loop(bare_autoencoder(first, device), device),
            "trainer": trainer(f"{options.config}/autoencoder", shared | own, batch, device),
        }
        config, own = f"{options.config}/diffusion", {"autoencoder": folder / "first_stage"}
        classes = sum(place.is_dir() for place in options.data.iterdir()) if second.class_conditional else 0
        stage_2 = {
            "bare loop": bare_loop(bare_diffusion(second, vqvae, classes, device), device),
            "trainer, cached latents": trainer(config, shared | own, batch, device),
            "trainer, latents in the loop": trainer(config, shared | own | {"cache_latents": "false"}, batch, device),
        }
        for stage, contestants in {"autoencoder": stage_1, "diffusion": stage_2}.items():
            lines = [{"stage": stage, **line, **about} for line in compare(contestants, batch, options)]
            replace_results(options.output, lines, ["contestant", "stage", "config", "device"])


if __name__ == "__main__":
    main()
