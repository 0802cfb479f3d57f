"""Train the small VQ-VAE of LooC's and CVQ-VAE's tables with one quantizer on one set of images.

Networks, loss and optimizer are the published ones: MSE / data variance + quantizer loss, Adam, no augmentation.
`Training` holds what can be varied. The same call resumes from its checkpoint. The weights that are returned are those
with the lowest error on images held out of the *training* set.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from looc_ldm import LooCSmallVQModel
from looc_ldm.images.pixels import to_float
from looc_ldm.utils.errors import UserError
from looc_ldm.utils.files import renamed_when_complete

EPOCHS = 500  # the published training: passes over all training images
HELD_OUT = 5000  # the last training images: checkpoints are chosen on them
VALIDATIONS = 50  # at most, besides the one at the end
EVALUATION_BATCH = 250


@dataclass(frozen=True)
class Training:
    """Settings of a training. The defaults are the published ones."""

    images: int  # training images to see, with repeats
    batch_size: int = 128
    learning_rate: float = 3e-4  # Adam's; the highest one if it changes
    warm_up_steps: int = 0  # steps in which the learning rate rises linearly
    decay_to: float = 1.0  # last learning rate as a share of the highest, reached linearly; 1 is a constant rate
    max_grad_norm: float | None = None  # norm to which gradients are clipped
    bf16: bool = False  # networks in bfloat16; quantizers, losses and errors stay float32
    seed: int = 42  # for weights and order

    @property
    def steps(self) -> int:
        return math.ceil(self.images / self.batch_size)

    @property
    def is_annealed(self) -> bool:
        return self.decay_to < 1

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        warm_up = min(1.0, step / self.warm_up_steps) if self.warm_up_steps else 1.0
        return self.learning_rate * warm_up * (1 - (1 - self.decay_to) * (step / self.steps))


def annealed(images: int, seed: int = Training.seed) -> Training:
    """Return a training that reaches more with few images: small batches, and a high rate that falls to 0."""
    return Training(images, 16, 2e-3, warm_up_steps=1250, decay_to=0.0, max_grad_norm=1.0, bf16=True, seed=seed)


def train(
    make_model: Callable[[], torch.nn.Module],
    pixels: torch.Tensor,
    training: Training,
    checkpoint: Path,
    device: torch.device,
    objective: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    log: Callable[[str], None] = print,
) -> tuple[torch.nn.Module, dict]:
    """Train a model, or continue from the checkpoint.

    Args:
        make_model: Makes the autoencoder. Its forward returns sample and loss as `LooCVQModel`'s does.
        pixels: All training images, uint8 `(n, C, H, W)`.
        training: The settings.
        checkpoint: File to resume from. It is written with each held-out error.
        device: Device of the training.
        objective: Loss of images and reconstructions, to which the quantizer's is added. Default: the published one,
            the mean squared error of images in [-1, 1] over the variance of the training images in [0, 1].
        log: Receives a line with each held-out error.

    Returns:
        The model with the chosen weights in eval mode, and a dict: `images_seen`, `chosen_at_images`,
        `validation_mse` (of images in [-1, 1]), `curve` (pairs of images seen and held-out MSE), `seconds`, and the
        settings of the `quantizer`.

    Raises:
        UserError: The batch is larger than the training set, or the checkpoint has different settings.
        FloatingPointError: The held-out error is not finite.
    """
    if training.batch_size > len(pixels) - HELD_OUT:
        raise UserError(
            f"batch size {training.batch_size:,} is more than the {len(pixels) - HELD_OUT:,} training images."
        )
    torch.manual_seed(training.seed)
    model = make_model().to(device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=training.learning_rate)
    stateful = {"model": model, "optimizer": optimizer}
    settings = {"training": asdict(training), "quantizer": settings_of(model.quantize)}
    progress = {"step": 0, "seconds": 0.0, "curve": [], "best": None, "settings": settings}
    if checkpoint.is_file():
        progress = _load(checkpoint, settings, stateful, device)
        log(f"resumes at {progress['step'] * training.batch_size:,} images")

    train_pixels, held_out = pixels[:-HELD_OUT].to(device), pixels[-HELD_OUT:].to(device)
    variance = (pixels.double() / 255).var().item()
    # Validating shall not take a large part of the time.
    validate_every = max(math.ceil(5 * HELD_OUT / training.batch_size), training.steps // VALIDATIONS)
    started = time.perf_counter() - progress["seconds"]
    for step, x in _batches(train_pixels, training, progress["step"]):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate_at(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=training.bf16):
            output = model(x)
        reconstruction = output.sample.float()
        error = F.mse_loss(reconstruction, x) / variance if objective is None else objective(x, reconstruction)
        optimizer.zero_grad()
        (error + output.commit_loss).backward()
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        model.quantize.revive()
        if step % validate_every and step < training.steps:
            continue
        images, mse = step * training.batch_size, held_out_error(model, held_out)
        if not math.isfinite(mse):
            raise FloatingPointError(f"the held-out error is {mse} after {images:,} images.")
        progress["curve"].append([images, mse])
        if progress["best"] is None or mse < progress["best"]["mse"]:
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            progress["best"] = {"mse": mse, "images": images, "weights": weights}
        progress |= {"step": step, "seconds": time.perf_counter() - started}
        _save(checkpoint, progress, stateful, device)
        to_go = progress["seconds"] * (training.steps / step - 1)
        log(f"{images:>12,} images  {10 * math.log10(4 / mse):6.2f} dB  {to_go / 60:5.0f} minutes to go")

    best = progress["best"]
    model.load_state_dict(best["weights"])
    outcome = {
        "images_seen": progress["step"] * training.batch_size,
        "chosen_at_images": best["images"],
        "validation_mse": best["mse"],
        "curve": progress["curve"],
        "seconds": progress["seconds"],
        "quantizer": settings["quantizer"],
    }
    return model.eval(), outcome


def small_model(quantizer: torch.nn.Module, channels: int, side: int) -> LooCSmallVQModel:
    """Return the network of images of `side` pixels, with a quantizer."""
    model = LooCSmallVQModel(
        channels, channels, sample_size=side, vq_embed_dim=quantizer.vq_embed_dim, interpolation_factor=1
    )
    model.quantize = quantizer
    return model


def settings_of(quantizer: torch.nn.Module) -> dict:
    """Return class and plain settings of a quantizer and, if it has segments, of the first of them."""
    settings = {}
    for part in [quantizer, *getattr(quantizer, "segments", [])[:1]]:
        name = type(part).__name__
        settings["class"] = f"{settings['class']} of {name}" if settings else name
        for key, value in vars(part).items():
            if isinstance(value, bool | int | float | str | tuple) and not key.startswith("_") and key != "training":
                settings[key] = list(value) if isinstance(value, tuple) else value
    return settings


@torch.no_grad()
def held_out_error(model: torch.nn.Module, pixels: torch.Tensor) -> float:
    """Return the mean squared error of reconstructions in [-1, 1]."""
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for part in pixels.split(EVALUATION_BATCH):
        x = to_float(part)
        total += F.mse_loss(model(x).sample.clamp(-1, 1), x, reduction="sum").double().cpu()
    model.train(was_training)
    return (total / pixels.numel()).item()


def _batches(pixels: torch.Tensor, training: Training, done: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the steps after `done`, counted from 1, with their images in an order set by seed and epoch."""
    per_epoch = len(pixels) // training.batch_size
    order = None
    for step in range(done, training.steps):
        epoch, place = divmod(step, per_epoch)
        if order is None or place == 0:
            generator = torch.Generator().manual_seed(training.seed * 100_003 + epoch)
            order = torch.randperm(len(pixels), generator=generator).to(pixels.device)
        yield step + 1, to_float(pixels[order[place * training.batch_size : (place + 1) * training.batch_size]])


def _save(file: Path, progress: dict, stateful: dict, device: torch.device) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {name: part.state_dict() for name, part in stateful.items()}
    state |= {"progress": progress, "rng": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(device)
    with renamed_when_complete(file) as partial:
        torch.save(state, partial)


def _load(file: Path, settings: dict, stateful: dict, device: torch.device) -> dict:
    state = torch.load(file, map_location=device, weights_only=True)
    found = state["progress"]["settings"]
    if found != settings:
        raise UserError(f"{str(file)!r} was trained with {found}, not with {settings}: remove it.")
    for name, part in stateful.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"].cpu(), device)
    return state["progress"]
