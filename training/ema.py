"""An average of a model's weights over training, usable as a model at any moment."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn

# Share of the images seen that the half-life may not exceed, so that early averages follow (EDM2's ramp-up).
RAMP_UP = 0.05


class EMA:
    """Exponential moving average with a half-life in images.

    Buffers and quantizer codebooks are those of the live model: usage counts are averages already, and an averaged
    codebook would lag behind codevectors that revival has moved.

    Args:
        model (`nn.Module`): The live model; the average starts as a copy of it.
        halflife_images (`int`): Images after which a weight counts half.

    Attributes:
        model (`nn.Module`): The averaged model, in eval mode.
    """

    def __init__(self, model: nn.Module, halflife_images: int):
        self.halflife_images = halflife_images
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, batch_size: int) -> None:
        """Take in the weights after an optimizer step that brought the count to `images_seen`."""
        halflife = min(self.halflife_images, images_seen * RAMP_UP)
        decay = 0.5 ** (batch_size / max(halflife, 1e-8))
        averaged, live = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(averaged, live, 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
        if hasattr(model, "quantize"):
            self.model.quantize.load_state_dict(model.quantize.state_dict())

    def state_dict(self) -> dict:
        return self.model.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state)
