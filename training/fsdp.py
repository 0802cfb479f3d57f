"""Weights divided over processes (FSDP 2), for UNets that DDP has no memory for."""

from __future__ import annotations

import copy

import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import DistributedType

from looc_ldm.errors import ConfigError
from looc_ldm.training.ema import EMA


def prepare_fsdp(accelerator: Accelerator) -> bool:
    """Whether FSDP divides the weights; if so, in such a way that the numbers are those of DDP.

    Accelerate's own mixed precision for FSDP rounds everything that enters a module, and with it the timesteps of flow
    matching (999.4 and 1000 are one number in bfloat16), and sums gradients in bfloat16. Without it the weights stay
    float32 and the loop's autocast holds.

    Raises:
        ConfigError: The first version of FSDP, whose flat parameters the average of the weights cannot follow.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    if not accelerator.is_fsdp2:
        raise ConfigError("fsdp_version must be 2 in Accelerate's config, got 1.")
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
    return True


def whole(model: nn.Module, ema: EMA, accelerator: Accelerator) -> nn.Module:
    """The live network; where FSDP has divided its weights, a copy that the main process has complete. A collective."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.unwrap_model(model)
    weights = accelerator.get_state_dict(model)
    copied = copy.deepcopy(ema.model).cpu()
    if accelerator.is_main_process:
        copied.load_state_dict(weights)
    return copied
