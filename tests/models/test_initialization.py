"""The weights that new autoencoders are trained from."""

import torch
import torch.nn.functional as F

from looc_ldm.models.initialization import initialize
from tiny import tiny_autoencoder


def error_after_training(start, steps=120):
    """Return the mean squared error of smooth colour images after a short training without the quantizer."""
    model = tiny_autoencoder(blocks=3, block_out_channels=(8, 16, 32), vq_embed_dim=8, latent_channels=8).train()
    start(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    torch.manual_seed(1)
    for _ in range(steps):
        images = F.interpolate(torch.rand(4, 3, 4, 4) * 2 - 1, 16, mode="bicubic")
        error = F.mse_loss(model.decode(model.encode(images).latents, force_not_quantize=True).sample, images)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    return error.item()


def test_a_new_autoencoder_learns_faster_from_its_initial_weights_than_from_pytorchs():
    assert error_after_training(initialize) < 0.7 * error_after_training(lambda model: None)


def test_residual_blocks_of_a_new_autoencoder_pass_their_input_on():
    model = tiny_autoencoder()
    initialize(model)
    block = model.encoder.down_blocks[0].resnets[0]
    x = torch.randn(1, 8, 16, 16)
    torch.testing.assert_close(block(x, temb=None), x)
