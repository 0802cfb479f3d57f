"""Measure images per second of `LooCLDMPipeline` and of diffusers' `LDMPipeline`, with the same networks and scheduler.

    python benchmarks/sampling.py                                        on a GPU if there is one
    python benchmarks/sampling.py --config lsun_churches/diffusion --batch-size 64 --device cuda

Writes benchmarks/results/sampling.jsonl, one line per contestant. The networks are built from a bundled config,
unconditional, with random weights, which take as long as trained ones. The contestants take turns, and each figure is
the fastest of its turns: read the ratios. Both pipelines draw with DDIM from one seed; the largest difference of a
pixel between the float32 pipelines is in the result. `LDMPipeline` fails in bfloat16, because its noise is float32, so
ours in bfloat16 is compared with theirs in float32. "compiled": `torch.compile` of UNet and decoder; the time of
compilation does not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from diffusers import LDMPipeline
from results import RESULTS, circumstances, replace_results

from looc_ldm import LooCLDMPipeline, LooCVQModel
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.config_parsing import construct, load_config
from looc_ldm.training.data import with_stage_1_images
from looc_ldm.training.denoiser import Denoiser, make_scheduler

TURNS = 5


def networks(name: str) -> dict:
    """Return VQ model, UNet and scheduler of a bundled diffusion config, as components of a pipeline."""
    config = load_config(DiffusionConfig, name, class_conditional=False)
    if config.unet.get("type") == "UNet2DConditionModel":
        raise SystemExit(f"--config {name}: LDMPipeline is unconditional; give a config without class tokens.")
    first = load_config(AutoencoderConfig, f"{name.split('/')[0]}/autoencoder")
    torch.manual_seed(0)
    vqvae = construct(LooCVQModel, {"sample_size": first.data.resolution, **first.model}, "model")
    vqvae.register_to_config(scaling_factor=1.0)
    unet = Denoiser.from_config(with_stage_1_images(config, vqvae), vqvae, 0).unet
    return {"vqvae": vqvae.eval(), "unet": unet.eval(), "scheduler": make_scheduler(config.scheduler)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="imagenette/diffusion", help="bundled diffusion config")
    parser.add_argument("--batch-size", type=int, default=4, help="images per call (default: 4)")
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps (default: 25)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    def contestant(kind: type, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Callable:
        pipe = kind(**networks(options.config)).to(options.device, dtype)
        pipe.set_progress_bar_config(disable=True)
        if compiled:
            pipe.unet.compile(fullgraph=True)
            pipe.vqvae.decoder.compile(fullgraph=True)
        settings = {"batch_size": options.batch_size, "num_inference_steps": options.steps, "output_type": "np"}
        # The images are on the CPU: the device has finished.
        return lambda: pipe(generator=torch.Generator().manual_seed(0), **settings).images

    contestants = {
        "LDMPipeline, float32": contestant(LDMPipeline),
        "ours, float32": contestant(LooCLDMPipeline),
        "ours, float32, compiled": contestant(LooCLDMPipeline, compiled=True),
    }
    if options.device != "cpu":
        contestants["ours, bfloat16"] = contestant(LooCLDMPipeline, torch.bfloat16)
        contestants["ours, bfloat16, compiled"] = contestant(LooCLDMPipeline, torch.bfloat16, compiled=True)

    images = {name: draw() for name, draw in contestants.items()}  # warm-up: compiles and tunes
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(TURNS):
        for name, draw in contestants.items():
            start = time.perf_counter()
            draw()
            seconds[name].append(time.perf_counter() - start)
    theirs = min(seconds["LDMPipeline, float32"])
    vqvae = networks(options.config)["vqvae"]
    side = vqvae.config.sample_size
    settings = {"config": options.config, "batch_size": options.batch_size, "steps": options.steps}
    command = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()]
    about = {
        "bits_per_pixel": vqvae.bits_per_image(side, side) / side**2,
        "largest_difference": abs(images["LDMPipeline, float32"] - images["ours, float32"]).max().item(),
        "turns": TURNS,
        **circumstances(options.device),
        "command": f"python benchmarks/sampling.py {' '.join(command)} --device {options.device}",
    }
    lines = []
    for name, taken in seconds.items():
        speed = {"images_per_second": options.batch_size / min(taken), "ratio": theirs / min(taken)}
        print(f"{name}: {speed['images_per_second']:.3g} images/s, {speed['ratio']:.2f} times LDMPipeline's")
        lines.append({"contestant": name, **settings, **speed, **about})
    replace_results(RESULTS / "sampling.jsonl", lines, ["contestant", *settings, "device"])


if __name__ == "__main__":
    main()
