"""Images a second of both trainers, against the same step in a bare loop and against diffusers' VQGAN recipe.

python benchmarks/training.py --data photos                                a small model, what CPUs are for
python benchmarks/training.py --data photos --config imagenet --parts autoencoder diffusion       on a GPU

A *bare loop* has the trainer's networks, losses, precision, fused AdamW, revival and average of the weights, but no
Accelerate, no data, no logs and no checkpoints: one batch of random numbers that stays on the device. A *trainer* is
the command itself, in a process of its own, on 1,024 JPEGs made from `--data`; its speed is that of a log interval
after a first one, as it stands in its log. The contestants of a part take turns in one run, and each figure is the
fastest of its turns: read the ratios. Losses are those of the config with the PatchGAN from the first step; LPIPS and
the first stage of the diffusion models have random weights, which take as long as trained ones.

    autoencoder   stage 1: bare loop, trainer, and the VQGAN recipe of diffusers' examples (vqgan_recipe.py), also
                  without data, in its default precision and in the trainer's
    diffusion     stage 2: bare loop, trainer on cached latents, trainer that encodes images in its loop
    data          share of the time that the stage-1 trainer of `imagenette` waits for data, on 256-pixel JPEGs

Parts that are measured alone take the place of theirs in the result file of the same circumstances.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch.nn.utils import clip_grad_norm_
from torchvision.models import vgg16
from vqgan_recipe import VQGANRecipe, vq_model

from looc_ldm import LooCVQModel, configs
from looc_ldm.files import replace_text
from looc_ldm.images import to_pil
from looc_ldm.training.autoencoder import as_rgb
from looc_ldm.training.config import AutoencoderConfig, DataConfig, DiffusionConfig, EvaluationConfig, RunConfig
from looc_ldm.training.config_parsing import config_text, construct, load_config
from looc_ldm.training.data import load_image_sets
from looc_ldm.training.diffusion import Denoiser, make_scheduler
from looc_ldm.training.image_set import spread
from looc_ldm.training.losses import (
    PatchDiscriminator,
    adaptive_adversarial_weight,
    hinge_discriminator_loss,
    load_lpips,
)
from looc_ldm.training.objectives import Objective
from looc_ldm.training.optimization import resolve_precision

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PARTS = ("autoencoder", "diffusion", "data")
WARM_UP_STEPS = 1
EMA_DECAY = 0.999
NEVER = 10**12  # images: an interval that does not end
PHOTOGRAPHS, JPEG_SIDE, JPEG_QUALITY = 1024, 256, 90
# A contestant does so many steps and says how many seconds these took, without what comes before the first.
Turn = Callable[[int], float]


# Bare loops -----------------------------------------------------------------------------------------------------------


def bare_loop(step: Callable[[], None], device: str) -> Turn:
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def turn(steps: int) -> float:
        for _ in range(WARM_UP_STEPS):
            step()
        wait()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        return time.perf_counter() - started

    return turn


def adamw(parameters: Iterable[torch.nn.Parameter], config: RunConfig) -> torch.optim.AdamW:
    settings = config.optimizer
    betas, decay = settings.betas, settings.weight_decay
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=betas, weight_decay=decay, fused=True)


def average(averaged: torch.nn.Module, live: torch.nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(averaged.parameters()), list(live.parameters()), 1 - EMA_DECAY)


def autocast(device: str, precision: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def clip(parameters: Iterable[torch.nn.Parameter], config: RunConfig) -> None:
    clip_grad_norm_(parameters, config.optimizer.max_grad_norm or math.inf)  # the trainer measures the norm, too


def prepared(module: torch.nn.Module, config: RunConfig, device: str) -> torch.nn.Module:
    if config.channels_last:
        module = module.to(memory_format=torch.channels_last)
    return module.to(device)


def bare_autoencoder(config: AutoencoderConfig, device: str, precision: str) -> Callable[[], None]:
    """A step of stage 1 without anything around it."""
    terms, size = config.loss, config.data.resolution
    model = prepared(autoencoder(config), config, device).train()
    critic = PatchDiscriminator(model.config.out_channels, terms.discriminator_channels, terms.discriminator_layers)
    critic = critic.to(device)
    averaged = copy.deepcopy(model)
    optimizer, critic_optimizer = adamw(model.parameters(), config), adamw(critic.parameters(), config)
    lpips = load_lpips(terms.lpips_network, terms.lpips_weights).to(device) if terms.lpips_weight else None
    images = torch.rand(config.batch_size, model.config.in_channels, size, size, device=device) * 2 - 1
    distance = F.l1_loss if terms.reconstruction == "l1" else F.mse_loss
    if config.compile:
        model.compile()
    model.quantize.revive()

    def step() -> None:
        with autocast(device, precision):
            output = model(images)
        reconstruction = output.sample.float()
        reconstruction_loss = terms.reconstruction_weight * distance(reconstruction, images)
        if lpips is not None:
            perceptual_loss = lpips(*as_rgb(reconstruction, images)).mean()
            reconstruction_loss = reconstruction_loss + terms.lpips_weight * perceptual_loss
        loss = reconstruction_loss + terms.quantizer_weight * output.commit_loss
        if terms.adversarial_weight:
            critic.requires_grad_(False)
            generator_loss = -critic(reconstruction).mean()
            critic.requires_grad_(True)
            weight = terms.adversarial_weight
            if terms.adaptive_weight:
                last = model.decoder.conv_out.weight
                weight = weight * adaptive_adversarial_weight(reconstruction_loss, generator_loss, last)
            loss = loss + weight * generator_loss
        loss.backward()
        clip(model.parameters(), config)
        optimizer.step()
        optimizer.zero_grad()
        if terms.adversarial_weight:
            real, fake = critic(torch.cat([images, reconstruction.detach()])).chunk(2)
            hinge_discriminator_loss(real, fake).backward()
            clip(critic.parameters(), config)
            critic_optimizer.step()
            critic_optimizer.zero_grad()
        model.quantize.revive()
        average(averaged, model)

    return step


def bare_diffusion(config: DiffusionConfig, device: str, precision: str, num_classes: int) -> Callable[[], None]:
    """A step of stage 2 without anything around it."""
    torch.manual_seed(0)
    vqvae = LooCVQModel.from_pretrained(config.autoencoder)
    denoiser = prepared(Denoiser.from_config(config, vqvae, num_classes), config, device).train()
    averaged = copy.deepcopy(denoiser)
    objective = Objective.from_config(config, make_scheduler(config.scheduler))
    optimizer = adamw(denoiser.parameters(), config)
    side = config.data.resolution // vqvae.downsampling_factor
    shape = (config.batch_size, vqvae.quantize.vq_embed_dim, side, side)
    latents, noise = torch.randn(2, *shape, device=device)
    time_ = torch.rand(config.batch_size, device=device)
    labels = torch.randint(num_classes, (config.batch_size,), device=device) if num_classes else None
    if config.compile:
        denoiser.compile()

    def step() -> None:
        noisy, timesteps, target, weight = objective.example(latents, noise, time_)
        with autocast(device, precision):
            prediction = denoiser(noisy, timesteps, labels).float()
        objective.loss(prediction, target, weight).backward()
        clip(denoiser.parameters(), config)
        optimizer.step()
        optimizer.zero_grad()
        average(averaged, denoiser)

    return step


# Trainers -------------------------------------------------------------------------------------------------------------


class Trainer:
    """A trainer's command. Each turn starts it, or lets it go on, and stops it as a time limit does.

    Args:
        config: Its settings; intervals are set here.
        folder (`Path`): For its output and what it caches.
        device (`str`): Where it runs.

    Attributes:
        data_wait (`list[float]`): Share of the time that it waited for data, in each turn.
    """

    def __init__(self, config: AutoencoderConfig | DiffusionConfig, folder: Path, device: str):
        self.stage = "autoencoder" if isinstance(config, AutoencoderConfig) else "diffusion"
        self.folder = folder
        self.config = replace(
            config,
            output_dir=str(folder / "run"),
            total_images=NEVER,
            preview_every_images=NEVER,
            checkpoint_every_images=NEVER,
            evaluation=EvaluationConfig(),
            tracker="none",
        )
        self.environment = dict(os.environ, HF_DATASETS_CACHE=str(folder.parent / "datasets"))
        if device == "cpu":
            self.environment["ACCELERATE_USE_CPU"] = "true"
        self.data_wait: list[float] = []

    def __call__(self, steps: int) -> float:
        """Seconds of so many steps, after as many that are not counted."""
        self.folder.mkdir(exist_ok=True)
        settings = self.folder / "config.yaml"
        settings.write_text(config_text(replace(self.config, log_every_images=steps * self.config.batch_size)))
        log = Path(self.config.output_dir) / "metrics.jsonl"
        lines = len(log.read_text().splitlines()) if log.is_file() else 0
        command = [sys.executable, "-m", f"looc_ldm.training.{self.stage}", "--config", str(settings)]
        with open(self.folder / "errors.txt", "w") as errors:
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=errors, stderr=errors)
            while not (log.is_file() and log.read_text().count("\n") >= lines + 2):
                if process.poll() is not None:
                    sys.exit(f"the trainer ended:\n{(self.folder / 'errors.txt').read_text()[-3000:]}")
                time.sleep(0.2)
            process.terminate()
            process.wait()
        measured = json.loads(log.read_text().splitlines()[lines + 1])
        self.data_wait.append(measured["data_wait"])
        return steps * self.config.batch_size / measured["images_per_second"]


# Parts ----------------------------------------------------------------------------------------------------------------


def compare(contestants: dict[str, Turn], batch_size: int, options: argparse.Namespace) -> dict[str, dict]:
    """Let contestants take turns; the first one, a bare loop, says how many steps make a turn."""
    first = next(iter(contestants.values()))
    first(1)  # compiles, tunes
    steps = max(2, 2 * math.ceil(options.seconds / first(1) / 2))  # the recipe's come in pairs
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(options.turns):
        for name, contestant in contestants.items():
            seconds[name].append(contestant(steps))
            print(f"turn {turn + 1}: {name}, {steps * batch_size / seconds[name][-1]:.4g} images/s", flush=True)
    best = {name: min(taken) for name, taken in seconds.items()}
    figures = {}
    for name, contestant in contestants.items():
        figures[name] = {
            "images_per_second": steps * batch_size / best[name],
            "ratio": min(seconds[next(iter(contestants))]) / best[name],
            "turns": [steps * batch_size / taken for taken in seconds[name]],
        }
        if isinstance(contestant, Trainer):
            figures[name]["data_wait"] = contestant.data_wait
    return {"batch_size": batch_size, "steps": steps, "contestants": figures}


def part_autoencoder(config: AutoencoderConfig, folder: Path, options: argparse.Namespace) -> dict:
    precision = resolve_precision(config.mixed_precision)
    size, device = config.data.resolution, options.device
    contestants: dict[str, Turn] = {
        "bare loop": bare_loop(bare_autoencoder(config, device, precision), device),
        "trainer": Trainer(config, folder / "autoencoder", device),
    }
    for name, dtype in {"float32": None, "bfloat16": torch.bfloat16}.items():
        if dtype is None or precision == "bf16":
            recipe = VQGANRecipe(config.model, size, config.batch_size, device, dtype)
            contestants[f"diffusers' recipe, {name}"] = bare_loop(recipe.step, device)
    theirs = vq_model(config.model, size)
    positions = (size // 2 ** (len(theirs.config.block_out_channels) - 1)) ** 2
    return {
        "precision": precision,
        **compare(contestants, config.batch_size, options),
        "bits_per_pixel_of_recipe": positions * math.log2(theirs.config.num_vq_embeddings) / size**2,
    }


def part_diffusion(config: DiffusionConfig, folder: Path, options: argparse.Namespace) -> dict:
    precision = resolve_precision(config.mixed_precision)
    classes = len(list(Path(config.data.path).iterdir())) if config.class_conditional else 0
    config = replace(config, latents=str(folder / "latents"))
    contestants: dict[str, Turn] = {
        "bare loop": bare_loop(bare_diffusion(config, options.device, precision, classes), options.device),
        "trainer, cached latents": Trainer(config, folder / "cached", options.device),
        "trainer, latents in the loop": Trainer(
            replace(config, cache_latents=False, latents=None), folder / "in_the_loop", options.device
        ),
    }
    return {"precision": precision, **compare(contestants, config.batch_size, options)}


def part_data(config: AutoencoderConfig, folder: Path, options: argparse.Namespace) -> dict:
    """What the small model's trainer waits for 256-pixel JPEGs."""
    trainer = Trainer(config, folder / "trainer", options.device)
    seconds = [trainer(options.data_steps) for _ in range(options.turns)]
    return {
        "batch_size": config.batch_size,
        "num_workers": config.data.num_workers,
        "jpeg_side": config.data.resolution,
        "images_per_second": options.data_steps * config.batch_size / min(seconds),
        "data_wait": trainer.data_wait,
    }


def photographs(data: DataConfig, folder: Path, side: int, channels: int) -> dict:
    """Images of a data set, at even distances, as JPEGs of one size in a folder for each class; settings for them."""
    images, _ = load_image_sets(data, channels)
    for number in spread(len(images), PHOTOGRAPHS).tolist():
        pixels, label = images[number]
        place = folder / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        photograph = to_pil(pixels).resize((side, side), Image.Resampling.BICUBIC)
        photograph.save(place / f"{number}.jpg", quality=JPEG_QUALITY)
    held_out = {"split": "train", "validation_split": None, "validation_images": 16}
    return {"path": str(folder), "resolution": side, "streaming": False, **held_out}


def settings_of(
    data_set: str, folder: Path, options: argparse.Namespace, side: int | None = None
) -> tuple[AutoencoderConfig, DiffusionConfig]:
    """The bundled configs of a data set, on JPEGs of `options.data`, with random weights for LPIPS and for the first
    stage of stage 2."""
    folder.mkdir()
    first = load_config(AutoencoderConfig, f"{data_set}/autoencoder")
    second = load_config(DiffusionConfig, f"{data_set}/diffusion")
    made_by = "/".join(Path(second.autoencoder).parts[1:3])  # runs/ffhq/autoencoder/model: by ffhq/autoencoder
    autoencoder(load_config(AutoencoderConfig, made_by)).save_pretrained(folder / "first_stage")
    weights = vgg16(weights=None).features.state_dict()
    save_file({f"features.{name}": tensor for name, tensor in weights.items()}, folder / "vgg16.safetensors")
    given = replace(first.data, path=options.data or first.data.path)
    channels = autoencoder(first).config.in_channels
    on_them = photographs(given, folder / "photographs", side or first.data.resolution, channels)
    batch = {"batch_size": options.batch_size} if options.batch_size else {}
    loss = replace(first.loss, lpips_weights=str(folder / "vgg16.safetensors"), adversarial_start_images=0)
    first = replace(first, data=replace(first.data, **on_them), loss=loss, **batch)
    second = replace(second, data=replace(second.data, **on_them), autoencoder=str(folder / "first_stage"), **batch)
    return first, second


def autoencoder(config: AutoencoderConfig) -> LooCVQModel:
    torch.manual_seed(0)
    return construct(LooCVQModel, {"sample_size": config.data.resolution, **config.model}, "model")


def command_line(options: argparse.Namespace) -> str:
    """The command that was given, without the places of files."""
    places = {options.data: options.data and Path(options.data).name, "--output": None, str(options.output): None}
    words = [places.get(word, word) for word in sys.argv[1:]]
    return " ".join(["python benchmarks/training.py", *filter(None, words)])


def main() -> None:
    names = sorted({name.split("/")[0] for name in configs.names()})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="imagenette", choices=names, help="bundled configs (default: imagenette)")
    parser.add_argument("--data", help="folder of photographs, instead of the config's data.path")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--batch-size", type=int, help="images of a step (default: the config's)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a bare loop's turn (default: 20)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each contestant (default: 3)")
    parser.add_argument("--data-steps", type=int, default=10, help="steps of the part `data` in a turn (default: 10)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="default: results/training_DEVICE.json beside this script")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first, second = settings_of(options.config, folder / options.config, options)
        size = first.data.resolution
        record = {
            "config": options.config,
            "device": options.device,
            "processor": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "cpu_count": os.cpu_count(),
            "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate")},
            "bits_per_pixel": autoencoder(first).bits_per_image(size, size) / size**2,
            "parts": {},
        }
        for part in options.parts:
            (folder / part).mkdir()
            if part == "autoencoder":
                record["parts"][part] = part_autoencoder(first, folder / part, options)
            elif part == "diffusion":
                record["parts"][part] = part_diffusion(second, folder / part, options)
            else:
                small, _ = settings_of("imagenette", folder / "small", options, JPEG_SIDE)
                record["parts"][part] = part_data(small, folder / part, options)
            record["parts"][part] |= {"command": command_line(options), "turns": options.turns}
    output = options.output or RESULTS / f"training_{options.device}.json"
    output.parent.mkdir(exist_ok=True)
    if output.is_file():
        before = json.loads(output.read_text())
        if {**before, "parts": None} == {**record, "parts": None}:
            record["parts"] = {**before["parts"], **record["parts"]}
    print(json.dumps(record, indent=1))
    replace_text(output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
