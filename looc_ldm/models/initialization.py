"""Initial weights of new autoencoders."""

from __future__ import annotations

from torch import nn


def initialize(autoencoder: nn.Module) -> None:
    """Give a new autoencoder of diffusers' blocks the weights that its training starts from, in place.

    Convolutions become orthogonal (Saxe et al. 2014, arXiv:1312.6120), and the last one of each residual block zero, so
    that the network starts as one without these blocks (Goyal et al. 2017, arXiv:1706.02677, section 5.1). PyTorch's
    own weights divide the signal's variance by three in each convolution, and little of the image reaches the latents.

    Args:
        autoencoder (`torch.nn.Module`): A `LooCVQModel`, or an encoder or decoder of diffusers.
    """
    for name, module in autoencoder.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if name.endswith(".conv2"):  # of diffusers' ResnetBlock2D
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        else:
            # Biases stay. The first codevectors are almost zero, within 1/K: without biases the decoder's norms would
            # divide by almost zero.
            nn.init.orthogonal_(module.weight)
