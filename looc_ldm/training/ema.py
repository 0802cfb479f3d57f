"""An average of a model's weights over training, usable as a model at any moment."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, distribute_tensor

# Share of the images seen that the half-life may not exceed, so that early averages follow (EDM2's ramp-up).
RAMP_UP = 0.05


class EMA:
    """Exponential moving average with a half-life in images.

    Buffers and quantizer codebooks are copied from the live model: usage counts are averages already, and an averaged
    codebook would lag behind codevectors that revival has moved.

    If FSDP shards the live weights (`shard_like`), each process averages its shard. Then `gathered`, `state_dict` and
    `load_state_dict` are collectives, and `model` is current after `gathered` only.

    Args:
        model (`nn.Module`): The live model; the average starts as a copy of it.
        halflife_images (`int`): Images after which a weight counts half.

    Attributes:
        model (`nn.Module`): The averaged model, in eval mode.
        earlier_images (`int`): Images that it averages over already, from a run before this one.
    """

    def __init__(self, model: nn.Module, halflife_images: int):
        self.halflife_images = halflife_images
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._device = next(model.parameters()).device
        self._parts: list[torch.Tensor] | None = None
        self.earlier_images = 0

    def shard_like(self, live: nn.Module) -> None:
        """Shard the average as the live weights are, under FSDP.

        Call it after `accelerator.prepare` and before a checkpoint is loaded.
        """
        if any(isinstance(parameter, DTensor) for parameter in live.parameters()):
            self._parts = [parameter.detach().clone() for parameter in live.parameters()]
            self.model.to("cpu")

    def go_on_from(self, averaged: dict[str, torch.Tensor], images: int) -> None:
        """Take over averages of an earlier run of `images` images; weights that it lacks stay."""
        self.load_state_dict({**self.model.state_dict(), **averaged})
        self.earlier_images = images

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, batch_size: int) -> None:
        """Take in the weights after an optimizer step that brought the count to `images_seen`."""
        halflife = min(self.halflife_images, (self.earlier_images + images_seen) * RAMP_UP)
        decay = 0.5 ** (batch_size / max(halflife, 1e-8))
        averaged, live = self._parts, list(model.parameters())
        if averaged is None:
            averaged = list(self.model.parameters())
        elif next(self.model.parameters()).device.type != "cpu":
            self.model.to("cpu")  # the full weights are no longer needed on the device
        torch._foreach_lerp_(averaged, live, 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
        if hasattr(model, "quantize"):
            self.model.quantize.load_state_dict(model.quantize.state_dict())

    @torch.no_grad()
    def gathered(self) -> nn.Module:
        """Return the unsharded averaged model, on its device. Collective under FSDP."""
        if self._parts is not None:
            for parameter, part in zip(self.model.parameters(), self._parts, strict=True):
                parameter.copy_(part.full_tensor())
            self.model.to(self._device)
        return self.model

    def state_dict(self) -> dict:
        return {name: tensor.cpu().contiguous() for name, tensor in self.gathered().state_dict().items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state)
        for parameter, part in zip(self.model.parameters(), self._parts or [], strict=bool(self._parts)):
            part.copy_(distribute_tensor(parameter.to(part.device), part.device_mesh, part.placements))
