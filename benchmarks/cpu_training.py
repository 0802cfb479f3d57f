"""Measure training steps on a CPU by memory format, kernel of attention and number of threads.

    python benchmarks/cpu_training.py                        the quickstart's networks
    python benchmarks/cpu_training.py --config imagenette --batch-size 8

Writes benchmarks/results/cpu_training.jsonl, one line per contestant. A step is forward, backward, clipping and AdamW
on random numbers, in bfloat16 and float32. The contestants take turns, and each figure is the fastest of its turns:
read the ratios, whose 1 is channels last with the fused kernel and one thread. Nothing else may compute meanwhile;
`--busy` keeps one core busy on purpose.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from results import RESULTS, circumstances, replace_results
from sampling import stay_busy
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_

from looc_ldm import LooCVQModel
from looc_ldm.training import denoiser
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.config_parsing import construct, load_config
from looc_ldm.training.data import with_stage_1_images
from looc_ldm.training.optimization import adamw

SECONDS, TURNS = 2.0, 3
KERNELS = {"fused": nullcontext, "products": lambda: sdpa_kernel(SDPBackend.MATH)}


def step_of(stage: str, config: str, batch: int, bf16: bool, channels_last: bool, kernel: str) -> Callable[[], None]:
    """Return a training step of a bundled config."""
    first = load_config(AutoencoderConfig, f"{config}/autoencoder")
    torch.manual_seed(0)
    vqvae = construct(LooCVQModel, {"sample_size": first.data.resolution, **first.model}, "model")
    if stage == "autoencoder":
        model, settings = vqvae, first.optimizer
        inputs = (torch.rand(batch, vqvae.config.in_channels, *2 * [first.data.resolution]) * 2 - 1,)
        target = inputs[0]
    else:
        second = with_stage_1_images(load_config(DiffusionConfig, f"{config}/diffusion"), vqvae)
        model, settings = denoiser.Denoiser.from_config(second, vqvae, 10), second.optimizer
        side = first.data.resolution // vqvae.downsampling_factor
        target = torch.randn(batch, vqvae.quantize.vq_embed_dim, side, side)
        inputs = (target, torch.randint(1000, (batch,)), torch.randint(10, (batch,)))
    model.train().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    optimizer = adamw(model, settings)

    def step() -> None:
        chosen = mock.patch.object(denoiser, "attention_kernel", return_value=KERNELS[kernel]())
        with chosen, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(*inputs)
        loss = F.mse_loss(output.float(), target) if stage == "diffusion" else F.l1_loss(output.sample.float(), target)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if stage == "autoencoder":
            model.quantize.discard()

    return step


def images_per_second(step: Callable[[], None], batch: int, threads: int) -> float:
    torch.set_num_threads(threads)
    step()
    steps, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < SECONDS:
        step()
        steps += 1
    return steps * batch / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="fashion_mnist", help="bundled configs")
    parser.add_argument("--batch-size", type=int, help="default: the configs'")
    parser.add_argument("--busy", action="store_true", help="keep one core busy meanwhile")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_training.jsonl")
    options = parser.parse_args()
    if options.busy:
        multiprocessing.Process(target=stay_busy, daemon=True).start()
    lines = []
    for stage, kernels in (("autoencoder", ["fused"]), ("diffusion", list(KERNELS))):
        batch = options.batch_size or (16 if stage == "autoencoder" else 64)
        settings = list(product((True, False), (True, False), kernels))
        steps = {setting: step_of(stage, options.config, batch, *setting) for setting in settings}
        runs = list(product(settings, (1, os.cpu_count())))
        best = dict.fromkeys(runs, 0.0)
        for _ in range(TURNS):
            for setting, threads in runs:
                speed = images_per_second(steps[setting], batch, threads)
                best[setting, threads] = max(best[setting, threads], speed)
        for ((bf16, channels_last, kernel), threads), speed in best.items():
            line = {
                "stage": stage,
                "config": options.config,
                "batch_size": batch,
                "precision": "bfloat16" if bf16 else "float32",
                "memory_format": "channels last" if channels_last else "contiguous",
                "attention": kernel if stage == "diffusion" else None,
                "threads": threads,
                "busy": options.busy,
                "images_per_second": speed,
                "ratio": speed / best[(bf16, True, "fused"), 1],
            }
            print(line, flush=True)
            command = f"python benchmarks/cpu_training.py --config {options.config}" + " --busy" * options.busy
            lines.append({**circumstances("cpu"), **line, "command": command})
    replace_results(
        options.output,
        lines,
        ["stage", "config", "batch_size", "precision", "memory_format", "attention", "threads", "busy"],
    )


if __name__ == "__main__":
    main()
