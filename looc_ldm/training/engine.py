"""Make the `Accelerator` of a run: supported engines, precision, accumulation."""

from __future__ import annotations

import os

from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs

from looc_ldm.training.config import DiffusionConfig, RunConfig
from looc_ldm.training.optimization import resolve_precision
from looc_ldm.utils.distributed import WAIT, refuse_lone_process
from looc_ldm.utils.errors import ConfigError

ENGINES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_training_accelerator(config: RunConfig) -> Accelerator:
    """Return the `Accelerator` of a run. The config decides, whatever Accelerate's environment variables say.

    Raises:
        ConfigError: Accelerate's engine is not one that the trainer supports: one process, DDP, and in stage 2 FSDP 2.
            (The average of the weights cannot follow the flat parameters of FSDP 1.)
    """
    stage_2 = isinstance(config, DiffusionConfig)
    for engine in ("DEEPSPEED", "MEGATRON_LM"):  # Accelerate would import their packages first
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true":
            raise _refusal(engine, stage_2)
    accelerator = Accelerator(
        mixed_precision=resolve_precision(config.mixed_precision),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        dynamo_backend="no",  # `config.compile` compiles
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
    )
    engine = accelerator.distributed_type
    if engine == DistributedType.FSDP and stage_2:
        if not accelerator.is_fsdp2:
            raise _refusal("FSDP with fsdp_version 1", stage_2)
    elif engine not in ENGINES:
        raise _refusal(engine.value, stage_2)
    refuse_lone_process(accelerator)
    return accelerator


def _refusal(engine: str, stage_2: bool) -> ConfigError:
    return ConfigError(
        f"Accelerate's config or environment selects the engine {engine}, but {'stage 2' if stage_2 else 'stage 1'} "
        f"trains with one process or DDP on CPUs or GPUs (MULTI_CPU, MULTI_GPU){', or with FSDP 2' if stage_2 else ''}."
    )
