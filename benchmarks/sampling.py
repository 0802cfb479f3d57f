"""Measure images per second of `LooCLDMPipeline` and of diffusers' `LDMPipeline`, with the same networks and scheduler.

    python benchmarks/sampling.py                                        on a GPU if there is one
    python benchmarks/sampling.py --config lsun_churches/diffusion --batch-size 64 --device cuda
    python benchmarks/sampling.py --config starter --batch-size 16 [--steps 5 --busy]   numbers of threads, on a CPU

Writes benchmarks/results/sampling.jsonl, one line per contestant. The networks are built from a bundled config,
unconditional, with random weights, which take as long as trained ones. The contestants take turns, and each figure is
the fastest of its turns: read the ratios. Both pipelines draw with DDIM from one seed; the largest difference of a
pixel between the float32 pipelines is in the result. `LDMPipeline` fails in bfloat16, because its noise is float32, so
ours in bfloat16 is compared with theirs in float32. "compiled": `torch.compile` of UNet and decoder; the time of
compilation does not count.

`--config starter` draws garments with a bundled model and guidance 1.5, with PyTorch's own number of threads and with
the fastest one, which commands take. `LDMPipeline` knows neither classes nor guidance: it draws the null class, which
is half the work. `--busy` keeps one core busy meanwhile.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import LDMPipeline
from results import RESULTS, circumstances, replace_results

from looc_ldm import LooCLDMPipeline, LooCVQModel, starter_model
from looc_ldm.commands.shared import use_fastest_threads_to_sample
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.config_parsing import construct, load_config
from looc_ldm.training.data import with_stage_1_images
from looc_ldm.training.denoiser import Denoiser, make_scheduler

TURNS, BUSY_TURNS = 5, 2  # beside a busy process PyTorch's own threads need minutes


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


def contestant(pipe, batch_size: int, steps: int) -> Callable[[], torch.Tensor]:
    pipe.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipe(
            batch_size=batch_size, num_inference_steps=steps, generator=generator, output_type="np"
        ).images  # on the CPU: the device has finished

    return draw


def bundled_contestants(batch_size: int, steps: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Return contestants that draw from the bundled model on a CPU, each with its own number of threads."""
    own = torch.get_num_threads()
    contestants = {}
    for dtype in (torch.float32, torch.bfloat16):
        pipe = LooCLDMPipeline.from_pretrained(starter_model("fashion_mnist"), torch_dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        use_fastest_threads_to_sample(pipe, batch_size)
        fastest = torch.get_num_threads()
        for name, threads in (("PyTorch's threads", own), ("fastest threads", fastest)):

            def draw(pipe=pipe, threads=threads):
                torch.set_num_threads(threads)
                settings = {"num_inference_steps": steps, "guidance_scale": 1.5, "output_type": "np"}
                labels = [i % 10 for i in range(batch_size)]
                return pipe(class_labels=labels, generator=torch.Generator().manual_seed(0), **settings).images

            contestants[f"ours, {str(dtype)[6:]}, {name} ({threads})"] = draw
    pipe = LooCLDMPipeline.from_pretrained(starter_model("fashion_mnist"))
    null = torch.full((batch_size,), pipe.config.null_class_label)
    pipe.unet.forward = partial(pipe.unet.forward, class_labels=null)
    theirs = contestant(LDMPipeline(pipe.vqvae, pipe.unet, pipe.scheduler), batch_size, steps)

    def draw_theirs():
        torch.set_num_threads(own)
        return theirs()

    return {"LDMPipeline, float32": draw_theirs, **contestants}


def stay_busy() -> None:
    """Keep one core busy, in a session of its own: Linux (autogroup) divides CPU time between sessions first."""
    os.setsid()
    parent = os.getppid()
    while os.getppid() == parent:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="imagenette/diffusion", help="bundled diffusion config")
    parser.add_argument("--batch-size", type=int, default=4, help="images per call (default: 4)")
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps (default: 25)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled contestants out")
    parser.add_argument("--busy", action="store_true", help="keep one core busy meanwhile")
    parser.add_argument("--output", type=Path, help="default: a file in benchmarks/results")
    options = parser.parse_args()

    def pipeline(kind: type, dtype: torch.dtype = torch.float32, compiled: bool = False):
        pipe = kind(**networks(options.config)).to(options.device, dtype)
        if compiled:
            pipe.unet.compile(fullgraph=True)
            pipe.vqvae.decoder.compile(fullgraph=True)
        return contestant(pipe, options.batch_size, options.steps)

    if options.busy:
        multiprocessing.Process(target=stay_busy, daemon=True).start()
    bundled = options.config == "starter"
    if bundled:
        contestants = bundled_contestants(options.batch_size, options.steps)
        vqvae = LooCVQModel.from_pretrained(starter_model("fashion_mnist"), subfolder="vqvae")
    else:
        contestants = {"LDMPipeline, float32": pipeline(LDMPipeline), "ours, float32": pipeline(LooCLDMPipeline)}
        vqvae = networks(options.config)["vqvae"]
    if not options.no_compile and not bundled:
        contestants["ours, float32, compiled"] = pipeline(LooCLDMPipeline, compiled=True)
    if options.device != "cpu":
        contestants["ours, bfloat16"] = pipeline(LooCLDMPipeline, torch.bfloat16)
        if not options.no_compile:
            contestants["ours, bfloat16, compiled"] = pipeline(LooCLDMPipeline, torch.bfloat16, compiled=True)

    images = {name: draw() for name, draw in contestants.items()}  # warm-up: compiles and tunes
    apart = None if bundled else abs(images["LDMPipeline, float32"] - images["ours, float32"]).max().item()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    turns = BUSY_TURNS if options.busy else TURNS
    for _ in range(turns):
        for name, draw in contestants.items():
            start = time.perf_counter()
            draw()
            seconds[name].append(time.perf_counter() - start)
    theirs = min(seconds["LDMPipeline, float32"])
    side = vqvae.config.sample_size
    settings = {"config": options.config, "batch_size": options.batch_size, "steps": options.steps}
    command = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()]
    command += ["--busy"] * options.busy
    settings["busy"] = options.busy
    about = {
        "bits_per_pixel": vqvae.bits_per_image(side, side) / side**2,
        "largest_difference": apart,
        "turns": turns,
        **circumstances(options.device),
        "command": f"python benchmarks/sampling.py {' '.join(command)} --device {options.device}",
    }
    lines = []
    for name, taken in seconds.items():
        speed = {"images_per_second": options.batch_size / min(taken), "ratio": theirs / min(taken)}
        print(f"{name}: {speed['images_per_second']:.3g} images/s, {speed['ratio']:.2f} times LDMPipeline's")
        lines.append({"contestant": name, **settings, **speed, **about})
    output = options.output or RESULTS / ("sampling_threads.jsonl" if bundled else "sampling.jsonl")
    replace_results(output, lines, ["contestant", *settings, "device"])


if __name__ == "__main__":
    main()
