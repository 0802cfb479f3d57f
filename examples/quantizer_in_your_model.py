"""LooC's quantizer in an autoencoder of your own, on the Fashion-MNIST images that come with the package.

python examples/quantizer_in_your_model.py --steps 2000
"""

import argparse
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import nn

import looc_ldm
from looc_ldm import LooCQuantizer, codebook_statistics
from looc_ldm.metrics import psnr


class Autoencoder(nn.Module):
    """28x28 grey pixels to 7x7 positions of 24 channels, 8 codes each: 49 * 8 * log2(256) bits, 4 per pixel."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 24, 4, 2, 1))
        self.quantizer = LooCQuantizer(24, 256, 3, interpolation_factor=1, distance="euclidean")
        self.quantizer.owner_revives = True  # the training loop below does
        self.decoder = nn.Sequential(nn.ConvTranspose2d(24, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1))

    def forward(self, x):
        quantized, quantizer_loss, (_, _, indices) = self.quantizer(self.encoder(x))
        return self.decoder(quantized), quantizer_loss, indices


def bundled_images(split: str) -> torch.Tensor:
    """Return the images of a split as floats in [0, 1], (N, 1, 28, 28)."""
    file = Path(looc_ldm.__file__).parent / "data" / "fashion_mnist" / f"{split}.parquet"
    images = datasets.Dataset.from_parquet(str(file))["image"]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])[:, None] / np.float32(255))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of 64 images (default: 2000)")
    options = parser.parse_args()

    torch.manual_seed(0)
    train, held_out = bundled_images("train"), bundled_images("validation")
    model = Autoencoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(options.steps):
        x = train[torch.randint(len(train), (64,))]
        reconstruction, quantizer_loss, _ = model(x)
        loss = (reconstruction - x).square().mean() + quantizer_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.quantizer.revive()  # moves the codebook, once per optimizer step
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")

    model.eval()
    with torch.no_grad():
        reconstruction, _, indices = model(held_out)
        statistics = codebook_statistics(model.quantizer, model.encoder(held_out).split(100))
    bits = indices[0].numel() * 8 / (28 * 28)
    print(f"PSNR {psnr(held_out, reconstruction.clamp(0, 1)).mean().item():.2f} dB at {bits:.2f} bits per pixel")
    print(f"{statistics.use:.0%} of the codebook is used")


if __name__ == "__main__":
    main()
