"""Images a second of `LooCLDMPipeline` and of diffusers' `LDMPipeline`, with the same networks, scheduler and steps.

python benchmarks/sampling.py                                        on the best device there is
python benchmarks/sampling.py --config lsun_churches/diffusion --batch-size 64      what a GPU is worth

The networks are those of a bundled config, unconditional, with random weights, which take as long as trained ones. The
contestants take turns in one run, and each figure is the fastest of its turns: read the ratios. Both pipelines draw
float32 images with DDIM from one seed; how far these are apart is part of the result. `LDMPipeline` fails in bfloat16
(its noise is float32), so that ours in bfloat16 is compared with theirs in float32. "compiled" is `torch.compile` of
the UNet and of the decoder; its first call, which compiles, is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import LDMPipeline

from looc_ldm import LooCLDMPipeline, LooCVQModel
from looc_ldm.files import replace_text
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.config_parsing import construct, load_config
from looc_ldm.training.diffusion import Denoiser, make_scheduler

RESULTS = Path(__file__).resolve().parent / "results"
TURNS = 5


def networks(name: str) -> dict:
    """VQ model, UNet and scheduler of a bundled diffusion config, as components of a pipeline."""
    config = load_config(DiffusionConfig, name, class_conditional=False)
    if config.unet.get("type") == "UNet2DConditionModel":
        raise SystemExit(f"--config {name}: LDMPipeline is unconditional; give a config without class tokens.")
    first = load_config(AutoencoderConfig, f"{name.split('/')[0]}/autoencoder")
    torch.manual_seed(0)
    vqvae = construct(LooCVQModel, {"sample_size": first.data.resolution, **first.model}, "model")
    vqvae.register_to_config(scaling_factor=1.0)
    unet = Denoiser.from_config(config, vqvae, 0).unet
    return {"vqvae": vqvae.eval(), "unet": unet.eval(), "scheduler": make_scheduler(config.scheduler)}


def bits_per_pixel(name: str) -> float:
    """The rate of the first stage."""
    vqvae = networks(name)["vqvae"]
    side = vqvae.config.sample_size
    return vqvae.bits_per_image(side, side) / side**2


def contestant(pipe, batch_size: int, steps: int) -> Callable[[], torch.Tensor]:
    pipe.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipe(
            batch_size=batch_size, num_inference_steps=steps, generator=generator, output_type="np"
        ).images  # on the CPU: the device has finished

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="imagenette/diffusion", help="bundled diffusion config")
    parser.add_argument("--batch-size", type=int, default=4, help="images a call (default: 4)")
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps (default: 25)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled contestants out")
    parser.add_argument("--output", type=Path, help="default: results/sampling_DEVICE.json beside this script")
    options = parser.parse_args()

    def pipeline(kind: type, dtype: torch.dtype = torch.float32, compiled: bool = False):
        pipe = kind(**networks(options.config)).to(options.device, dtype)
        if compiled:
            pipe.unet.compile(fullgraph=True)
            pipe.vqvae.decoder.compile(fullgraph=True)
        return contestant(pipe, options.batch_size, options.steps)

    contestants = {"LDMPipeline, float32": pipeline(LDMPipeline), "ours, float32": pipeline(LooCLDMPipeline)}
    if not options.no_compile:
        contestants["ours, float32, compiled"] = pipeline(LooCLDMPipeline, compiled=True)
    if options.device != "cpu":
        contestants["ours, bfloat16"] = pipeline(LooCLDMPipeline, torch.bfloat16)
        if not options.no_compile:
            contestants["ours, bfloat16, compiled"] = pipeline(LooCLDMPipeline, torch.bfloat16, compiled=True)

    images = {name: draw() for name, draw in contestants.items()}  # warm-up: compiles and tunes
    apart = abs(images["LDMPipeline, float32"] - images["ours, float32"]).max().item()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(TURNS):
        for name, draw in contestants.items():
            start = time.perf_counter()
            draw()
            seconds[name].append(time.perf_counter() - start)
    theirs = min(seconds["LDMPipeline, float32"])
    record = {
        "command": f"python benchmarks/sampling.py --config {options.config} --batch-size {options.batch_size} "
        f"--steps {options.steps} --device {options.device}",
        "config": options.config,
        "batch_size": options.batch_size,
        "steps": options.steps,
        "turns": TURNS,
        "bits_per_pixel": bits_per_pixel(options.config),
        "processor": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "largest_difference": apart,
        "contestants": {
            name: {"images_per_second": options.batch_size / min(taken), "ratio": theirs / min(taken)}
            for name, taken in seconds.items()
        },
    }
    print(json.dumps(record, indent=1))
    output = options.output or RESULTS / f"sampling_{options.device}.json"
    output.parent.mkdir(exist_ok=True)
    replace_text(output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
