"""Train and measure the small VQ-VAE of LooC's and CVQ-VAE's tables with one quantizer on one set of images.

Encoder, decoder, loss and optimizer are the published ones (MSE / data variance + quantizer loss, Adam 3e-4, no
schedule, no augmentation); HVQ-VAE's is that of its paper, and an annealed training has a schedule, to learn more of
fewer images. A run resumes: it leaves a checkpoint beside its result, and the same call goes on there. The weights that
are measured are those with the lowest error on images held out of the *training* set.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from looc_ldm.errors import UserError
from looc_ldm.files import renamed_when_complete, replace_text
from looc_ldm.images import to_float
from looc_ldm.training.stopping import StopSignals, stopped_by

EPOCHS, PUBLISHED_BATCH, PUBLISHED_RATE = 500, 128, 3e-4  # as published; epochs are of all training images
ANNEALED_RATE = 3e-3
HELD_OUT = 5000  # the last training images: checkpoints are chosen on them
EVALUATION_BATCH = 250
SWITCHES = ("annealed", "bf16")  # of a training, and of the command line that starts it
TIMED = 100  # steps from which the time of a training is told
TOLD_EVERY = 60  # seconds, about
WARM_UP = 200  # steps of annealed trainings
# Of the training of Williams et al. 2020 (HQA): where the learning rate begins to fall, how far, and the norm to which
# gradients are clipped, of a loss that is a mean over the values of an image.
COSINE_FROM, COSINE_TO, GRADIENT_NORM = 2 / 3, 0.1, 1.0


@dataclass(frozen=True)
class Training:
    """How a row is trained.

    Attributes:
        images: Training images to see, with repeats.
        batch_size: Images of a step.
        learning_rate: Of Adam; of an annealed training the highest.
        annealed: Whether the learning rate falls, see `learning_rate_at`.
        bf16: Whether the networks are bfloat16.
        seed: Of weights and order.
        clipped_cosine: Whether gradients are clipped and the learning rate, unless it is annealed, falls along a cosine
            to a tenth in the last third, for a loss that is a sum over an image.
        validations: How often the held-out error is measured at most, at even distances; also at the end.
    """

    images: int
    batch_size: int = PUBLISHED_BATCH
    learning_rate: float = PUBLISHED_RATE
    annealed: bool = False
    bf16: bool = False
    seed: int = 42
    clipped_cosine: bool = False
    validations: int = 50

    @property
    def steps(self) -> int:
        return math.ceil(self.images / self.batch_size)

    def learning_rate_at(self, step: int) -> float:
        """For a step counted from 1: always the same or, annealed, risen in 200 steps and falling in a line to 0."""
        if self.annealed:
            return self.learning_rate * min(step / WARM_UP, (self.steps - step + 1) / self.steps)
        done = (step / self.steps - COSINE_FROM) / (1 - COSINE_FROM)
        if not self.clipped_cosine or done <= 0:
            return self.learning_rate
        return self.learning_rate * (COSINE_TO + (1 - COSINE_TO) * (1 + math.cos(math.pi * done)) / 2)


def train(
    make_model: Callable[[], torch.nn.Module],
    pixels: torch.Tensor,
    training: Training,
    checkpoint: Path,
    device: torch.device,
    say: Callable[[str], None] = print,
    objective: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    session: dict | None = None,
) -> tuple[torch.nn.Module, dict]:
    """Train a model, or go on training it.

    Args:
        make_model: Makes the autoencoder: called with images it returns sample and loss as `LooCVQModel` does.
        pixels: All training images, uint8 `(n, C, H, W)`.
        training: See there.
        checkpoint: File to go on from, and to leave.
        device: Where.
        say: Told how it goes.
        objective: The loss of images and their reconstructions that goes with the quantizer's; if not given, the
            published one, the mean squared error of images in [-1, 1] by the variance of training images in [0, 1].
        session: What is to be known of code and machine. A training that goes on keeps those of the parts before.

    Returns:
        The model with the chosen weights, in eval mode, and what happened: `images_seen`, `chosen_at_images`,
        `validation_mse` (images in [-1, 1]), `curve` (pairs of images seen and held-out MSE), `seconds`, the settings
        of the `quantizer`, and `sessions`, each with the images seen before it.

    Raises:
        UserError: The checkpoint is of another training or quantizer, or a batch is larger than the training set.
        FloatingPointError: The error is not finite any more.
        KeyboardInterrupt: After SIGINT, and `Terminated`, which is one, after SIGTERM: the step under way was finished,
            and a checkpoint left.
    """
    if training.batch_size > len(pixels) - HELD_OUT:
        raise UserError(f"batch size {training.batch_size:,} is more than the {len(pixels) - HELD_OUT:,} images.")
    torch.manual_seed(training.seed)
    model = make_model().to(device).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=training.learning_rate)
    made_with = asdict(training) | settings_of(model.quantize) | {"device": device.type}
    state = {"images_seen": 0, "best": None, "curve": [], "seconds": 0.0, "made_with": made_with, "sessions": []}
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["made_with"] != made_with:
            raise UserError(f"{str(checkpoint)!r} is of {state['made_with']}, not of {made_with}: remove it.")
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
        torch.set_rng_state(state.pop("rng").cpu())
        if device.type == "cuda":
            torch.cuda.set_rng_state(state.pop("cuda_rng").cpu(), device)
        say(f"goes on at {state['images_seen']:,} images")
    if state["images_seen"] < training.images:
        state["sessions"].append({"images_seen": state["images_seen"], **(session or {})})
    train_pixels, held_out = pixels[:-HELD_OUT].to(device), pixels[-HELD_OUT:].to(device)
    variance = (pixels.double() / 255).var().item()
    steps = training.steps
    # Not so often that validating takes a good part of the time.
    every = max(math.ceil(5 * HELD_OUT / training.batch_size), steps // training.validations)
    started = time.perf_counter() - state["seconds"]
    done = state["images_seen"] // training.batch_size
    with StopSignals() as stop:
        for step, x in _batches(train_pixels, training, done, steps):
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate_at(step)
            with torch.autocast(device.type, torch.bfloat16, enabled=training.bf16):
                output = model(x)
            output.sample = output.sample.float()
            error = F.mse_loss(output.sample, x) / variance if objective is None else objective(x, output.sample)
            loss = error + output.commit_loss
            optimizer.zero_grad()
            loss.backward()
            if training.clipped_cosine:
                torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM * pixels[0].numel())
            optimizer.step()
            model.quantize.revive()
            now = time.perf_counter()
            if step == done + 1:
                began = told = now  # after what only the first step has to do
            if step == done + 1 + TIMED or now > told + TOLD_EVERY:  # the first held-out error may be minutes away
                minutes = (now - began) / max(step - done - 1, 1) * (steps - step) / 60
                say(f"{step * training.batch_size:>12,} images, about {minutes:.0f} minutes to go")
                told = now
            validates, received = step % every == 0 or step == steps, stop.received  # once: it may come at any moment
            if not validates and not received:
                continue
            seen = step * training.batch_size
            if validates:
                error = _error(model, held_out)
                if not math.isfinite(error):
                    raise FloatingPointError(f"the error is {error} after {seen:,} images.")
                state["curve"].append([seen, error])
                if state["best"] is None or error < state["best"]["error"]:
                    weights = {name: value.clone() for name, value in model.state_dict().items()}
                    state["best"] = {"error": error, "images": seen, "weights": weights}
            state["images_seen"], state["seconds"] = seen, time.perf_counter() - started
            _save(checkpoint, state, model, optimizer)
            if validates:
                psnr = 10 * math.log10(4 / error)
                say(f"{seen:>12,} images  {psnr:6.2f} dB  {state['seconds']:8.0f} s")
            if received:
                raise stopped_by(received, f"stopped at {seen:,} images; the same command goes on from there")
    model.load_state_dict(state["best"]["weights"])
    happened = {
        "images_seen": state["images_seen"],
        "chosen_at_images": state["best"]["images"],
        "validation_mse": state["best"]["error"],
        "curve": state["curve"],
        "seconds": state["seconds"],
        "quantizer": settings_of(model.quantize),
        "sessions": state["sessions"],
    }
    return model.eval(), happened


def command_line(values: dict) -> str:
    """The switches that are on, as they are given on a command line."""
    return "".join(f" --{name}" for name in SWITCHES if values[name])


def weights_in_words(figures: dict) -> str:
    """What a command line needs further for the figures of a result that need weights."""
    words = " --lpips-vgg-weights FILE" if "lpips_vgg" in figures else ""
    for name in figures:
        if name.startswith("rfid@"):
            words += f" --inception-weights FILE --feature-layer {name.removeprefix('rfid@')}"
    return words


def settings_of(quantizer: torch.nn.Module) -> dict:
    """Class and plain settings of a quantizer, of its first segment too if it has several: what a row is made of."""
    parts = [quantizer, *getattr(quantizer, "segments", [])[:1]]
    settings = {}
    for part in parts:
        settings["class"] = f"{settings['class']} of {type(part).__name__}" if settings else type(part).__name__
        plain = bool | int | float | str | tuple
        settings |= {
            name: value
            for name, value in vars(part).items()
            if isinstance(value, plain) and not name.startswith("_") and name != "training"
        }
    return settings


def _batches(pixels: torch.Tensor, training: Training, done: int, steps: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Steps after `done`, counted from 1, with their batches; the order of an epoch depends on seed and epoch only."""
    per_epoch = len(pixels) // training.batch_size
    order = None
    for step in range(done, steps):
        epoch, place = divmod(step, per_epoch)
        if order is None or place == 0:
            generator = torch.Generator().manual_seed(training.seed * 100_003 + epoch)
            order = torch.randperm(len(pixels), generator=generator).to(pixels.device)
        rows = order[place * training.batch_size : (place + 1) * training.batch_size]
        yield step + 1, to_float(pixels[rows])


@torch.no_grad()
def _error(model: torch.nn.Module, pixels: torch.Tensor) -> float:
    """Mean squared error of reconstructions in [-1, 1]."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for part in pixels.split(EVALUATION_BATCH):
        x = to_float(part)
        total += F.mse_loss(model(x).sample.clamp(-1, 1), x, reduction="sum").double().cpu()
    model.train()
    return (total / pixels.numel()).item()


def _save(file: Path, state: dict, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    everything = {**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    everything["rng"] = torch.get_rng_state()
    if model.device.type == "cuda":
        everything["cuda_rng"] = torch.cuda.get_rng_state(model.device)
    with renamed_when_complete(file) as partial:
        torch.save(everything, partial)


def read_result(file: Path) -> dict:
    """A result. Raises UserError, with its name, for what is none."""
    try:
        result = json.loads(file.read_text())
        if not result["test"]["clean"].keys() >= {"psnr", "bits_per_pixel"}:
            raise KeyError("test")
    except (ValueError, KeyError, TypeError, AttributeError):  # ValueError: no JSON, or no text at all
        raise UserError(f"{str(file)!r} is not a whole result of benchmarks/tables.py: remove it.") from None
    return result


def write_result(file: Path, result: dict) -> None:
    """A result as JSON, in place when it is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(result, indent=1) + "\n")
