"""How a LooC codebook should start and learn: small VQ-VAEs at equal bits and equal images seen.

python benchmarks/quantizer_recipes.py --data fashion_mnist cifar10 --recipes published default
python benchmarks/quantizer_recipes.py --help

The network is the published small VQ-VAE (28x28 or 32x32, f = 4, n_q = 128) with a codebook of 256 x 4 and s = 1:
32 codes of 8 bits at each latent position, 16 bits per pixel. Adam 3e-4, batch 64, MSE / variance + quantizer loss, as
published. Every run trains on all but the last 2,000 training images and is measured on those; test sets are not read.
A run is a line of results/quantizer_recipes.jsonl, with the loss of its first 150 steps; runs that are there are not
repeated. `benchmarks/readme.py recipes` makes the table of them.

`--data-root` holds Fashion-MNIST's and MNIST's train-images-idx3-ubyte(.gz), each in a folder of the set's name, and
CIFAR-10's data_batch_1.png to data_batch_5.png, 10,000 rows of 1,024 RGB pixels each, in the folder cifar10.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from small_images import load_images

from looc_ldm import LooCQuantizer

RESULTS = Path(__file__).resolve().parent / "results" / "quantizer_recipes.jsonl"
HELD_OUT, BATCH, RATE, WATCHED_STEPS = 2000, 64, 3e-4, 150
CHANNELS, CODEVECTORS, DIM = 128, 256, 4
PUBLISHED = {"codebook_update": "gradient", "gradient": "straight-through"}
RECIPES = {
    "published": PUBLISHED,
    "published, rotation trick": {"codebook_update": "gradient", "gradient": "rotation"},
    "moving average": {"codebook_update": "ema", "gradient": "straight-through"},
    "moving average, rotation trick": {"codebook_update": "ema", "gradient": "rotation"},
    "moving average, rotation trick, start from features": {
        "codebook_update": "ema",
        "gradient": "rotation",
        "start": "features",
        "start_steps": 1,
    },
    "start from features, 30 steps": {**PUBLISHED, "start": "features", "start_steps": 30},
    "start by k-means, 10 steps": {**PUBLISHED, "start": "k-means", "start_steps": 10},
    "moving average, learned rotation of channels": {
        "codebook_update": "ema",
        "gradient": "straight-through",
        "rotate_channels": True,
    },
}


class ResidualBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(CHANNELS, 32, 3, padding=1), nn.Conv2d(32, CHANNELS, 1)

    def forward(self, x):
        return x + self.second(F.relu(self.first(F.relu(x))))


def networks(colours: int) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of the published small VQ-VAE."""
    encoder = nn.Sequential(
        *(nn.Conv2d(colours, 64, 4, 2, 1), nn.ReLU(), nn.Conv2d(64, CHANNELS, 4, 2, 1), nn.ReLU()),
        *(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), ResidualBlock(), ResidualBlock(), nn.ReLU()),
        nn.Conv2d(CHANNELS, CHANNELS, 1),
    )
    decoder = nn.Sequential(
        *(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), ResidualBlock(), ResidualBlock(), nn.ReLU()),
        *(nn.ConvTranspose2d(CHANNELS, 64, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(64, colours, 4, 2, 1)),
    )
    return encoder, decoder


class Autoencoder(nn.Module):
    def __init__(self, colours: int, rotate_channels: bool = False, **quantizer):
        super().__init__()
        self.encoder, self.decoder = networks(colours)
        self.quantizer = LooCQuantizer(CHANNELS, CODEVECTORS, DIM, **quantizer)
        self.rotation = None
        if rotate_channels:  # OPQ's idea: an orthogonal map decides which channels share a segment
            linear = nn.Linear(CHANNELS, CHANNELS, bias=False)
            nn.init.eye_(linear.weight)
            self.rotation = nn.utils.parametrizations.orthogonal(linear, orthogonal_map="cayley")

    def forward(self, x):
        z = self.encoder(x)
        if self.rotation is None:
            quantized, loss, (_, _, codes) = self.quantizer(z)
        else:
            matrix = self.rotation.weight[:, :, None, None]
            quantized, loss, (_, _, codes) = self.quantizer(F.conv2d(z, matrix))
            quantized = F.conv2d(quantized, matrix.transpose(0, 1))
        return self.decoder(quantized), loss, codes, z


@torch.no_grad()
def start_codebook(quantizer: LooCQuantizer, z: torch.Tensor, start: str) -> None:
    """Put the codebook to segments of this batch, or to their k-means centres."""
    segments = quantizer.search(z)[1].reshape(-1, DIM)
    codebook = segments[torch.randperm(len(segments))[:CODEVECTORS]].clone()
    for _ in range(10 if start == "k-means" else 0):
        nearest = torch.cat([torch.cdist(part, codebook).argmin(1) for part in segments.split(8192)])
        counts = torch.bincount(nearest, minlength=CODEVECTORS)[:, None]
        sums = torch.zeros_like(codebook).index_add_(0, nearest, segments)
        codebook = torch.where(counts > 0, sums / counts.clamp(min=1), codebook)
    quantizer.embedding.weight.copy_(codebook)


@torch.no_grad()
def validate(model: Autoencoder, images: torch.Tensor) -> dict[str, float]:
    model.eval()
    psnr, used = [], torch.zeros(CODEVECTORS, dtype=torch.bool)
    for x in images.split(100):
        reconstruction, _, codes, _ = model(x)
        error = (reconstruction.clamp(-1, 1) - x) / 2
        psnr.append(-10 * error.square().mean((1, 2, 3)).log10())
        used[codes.flatten()] = True
    return {"psnr": torch.cat(psnr).mean().item(), "codebook_use": used.double().mean().item()}


def run(pixels: torch.Tensor, recipe: dict, common: dict, images: int, seed: int) -> dict:
    """Train and measure one autoencoder."""
    recipe = dict(recipe)
    start, start_steps = recipe.pop("start", None), recipe.pop("start_steps", 0)
    torch.manual_seed(seed)
    held_out = pixels[-HELD_OUT:].float() / 127.5 - 1
    pixels = pixels[:-HELD_OUT]
    variance = (pixels.double() / 255).var().item()
    model = Autoencoder(pixels.shape[1], **recipe, **common)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    order = torch.Generator().manual_seed(seed)
    stream = torch.cat([torch.randperm(len(pixels), generator=order) for _ in range(math.ceil(images / len(pixels)))])
    watched, started = [], time.monotonic()
    for step, rows in enumerate(stream[:images].split(BATCH)):
        x = pixels[rows].float() / 127.5 - 1
        reconstruction, quantizer_loss, _, z = model(x)
        loss = F.mse_loss(reconstruction, x) / variance + quantizer_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.quantizer.revive()
        if step < start_steps:
            start_codebook(model.quantizer, z.detach(), start)
        if step < WATCHED_STEPS:
            watched.append(loss.item())
    height, width = pixels.shape[-2:]
    codes = model.quantizer.codes_per_position * (height // 4) * (width // 4)
    return {
        **validate(model, held_out),
        "bits_per_pixel": codes * math.log2(CODEVECTORS) / (height * width),
        "highest_over_first_loss": max(watched) / watched[0],
        "losses": [round(value, 4) for value in watched],
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["fashion_mnist", "mnist", "cifar10"])
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--images", type=int, default=25_000, help="training images seen, with repeats")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--distance", default="cosine", choices=("cosine", "euclidean"))
    parser.add_argument("--anchor", default="closest")
    parser.add_argument("--interpolation-factor", type=int, default=1)
    options = parser.parse_args()
    keys = ("data", "recipe", "images", "seed", "distance", "anchor", "interpolation_factor")
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    for seed in options.seeds:
        for name in options.data:
            pixels = load_images(name, options.data_root, "train")
            for recipe in options.recipes:
                common = {
                    "distance": options.distance,
                    "anchor": options.anchor,
                    "interpolation_factor": options.interpolation_factor,
                }
                settings = {"data": name, "recipe": recipe, "images": options.images, "seed": seed, **common}
                if any(all(other[key] == settings[key] for key in keys) for other in done):
                    continue
                record = {**settings, **run(pixels, RECIPES[recipe], common, options.images, seed)}
                print({key: value for key, value in record.items() if key != "losses"}, flush=True)
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
