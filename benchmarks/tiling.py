"""What tiling changes and saves: encoding and decoding of 1024x1024 images with a trained model, untiled and tiled.

    python benchmarks/tiling.py MODEL IMAGES

Two images are made from the photographs below IMAGES: a mosaic of different ones, whose parts differ most from the
whole, and one photograph enlarged. Differences are absolute, in units of the pixel range: 1 is from black to white.
"diffusers" is `AutoencoderKL.tiled_decode` of diffusers with the same decoder, the same size of tiles and its overlap
of a quarter, on latents that are quantized already. The peak is what memory grows by during the call, each in a process
of its own: on a CPU the resident memory that Linux reports, on a GPU what torch has allocated. Seconds are of processor
time on a CPU, which other work on the machine does not change.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from looc_ldm import LooCVQModel
from looc_ldm.files import replace_text
from looc_ldm.images import to_float, to_pil, to_uint8

RESULT = Path(__file__).resolve().parent / "results" / "tiling.json"
AMPLIFICATION = 20


def large_images(folder: Path, side: int, channels: int) -> dict[str, torch.Tensor]:
    """Float images `(1, channels, side, side)` in [-1, 1] by name."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    tile = 128
    rows = side // tile
    if len(files) < rows * rows:
        raise SystemExit(f"{folder} holds {len(files)} images; a mosaic needs {rows * rows}.")
    chosen = [files[i] for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[: rows * rows]]
    photographs = [Image.open(file).convert("RGB" if channels == 3 else "L").resize((tile, tile)) for file in chosen]
    mosaic = Image.new(photographs[0].mode, (side, side))
    for number, photograph in enumerate(photographs):
        mosaic.paste(photograph, (number % rows * tile, number // rows * tile))
    images = {"mosaic": mosaic, "enlarged": photographs[0].resize((side, side), Image.Resampling.BICUBIC)}
    pixels = {name: np.array(image).reshape(side, side, channels) for name, image in images.items()}
    return {name: to_float(torch.from_numpy(array).permute(2, 0, 1)[None]) for name, array in pixels.items()}


def diffusers_tiled_decode(model: LooCVQModel, quantized: torch.Tensor, tile: int) -> torch.Tensor:
    overlap = 0.25
    stand_in = SimpleNamespace(
        decoder=model.decoder,
        post_quant_conv=model.post_quant_conv,
        config=SimpleNamespace(use_post_quant_conv=True),
        tile_sample_min_size=tile,
        tile_latent_min_size=tile // model.downsampling_factor,
        tile_overlap_factor=overlap,
    )
    stand_in.blend_v = partial(AutoencoderKL.blend_v, stand_in)
    stand_in.blend_h = partial(AutoencoderKL.blend_h, stand_in)
    return AutoencoderKL.tiled_decode(stand_in, quantized).sample


def measure(
    name: str, job: str, tiling: str, tile: int, given: torch.Tensor, device: str
) -> tuple[torch.Tensor, torch.Tensor | None, float, float]:
    """Result, codes (of decoding), peak in MiB and seconds. To be run in a fresh process."""
    torch.set_grad_enabled(False)
    model = LooCVQModel.from_pretrained(name).to(device)
    given = given.to(device)
    if tiling == "tiled":
        model.enable_tiling(tile)

    def work(given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if job == "encode":
            return model.encode(given).latents, None
        if tiling == "diffusers":
            return diffusers_tiled_decode(model, model.quantize(given)[0], tile), None
        output = model.decode(given)
        return output.sample, output.indices

    work(given[:, :, :8, :8])  # libraries and kernels
    (result, codes), peak = with_peak(partial(work, given), device)
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    work(given)
    synchronize(device)
    seconds = clock() - start
    return result.cpu(), None if codes is None else codes.cpu(), peak / 2**20, seconds


def with_peak(work: Callable, device: str) -> tuple:
    """What `work` returns, and by how many bytes memory had grown at its peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        return result, torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    result = work()
    return result, resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_fresh_process(function: Callable, *arguments):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def compare(result: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    difference = (result - reference).abs() / 2  # of [-1, 1]
    return {"mean_difference": difference.mean().item(), "largest_difference": difference.max().item()}


def save_pictures(folder: Path, name: str, result: torch.Tensor, reference: torch.Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    amplified = ((result - reference).abs() * AMPLIFICATION - 1).clamp(max=1)
    for kind, image in (("tiled", result), ("untiled", reference), (f"difference x{AMPLIFICATION}", amplified)):
        to_pil(to_uint8(image)[0]).save(folder / f"{name} {kind}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id of a LooCVQModel")
    parser.add_argument("images", type=Path, help="folder with photographs, at any depth")
    parser.add_argument("--side", type=int, default=1024, help="of the images, in pixels, a multiple of 128")
    parser.add_argument("--tile", type=int, default=128, help="side of a tile, in pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pictures", type=Path, help="folder for the decoded images and their differences")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()

    config = LooCVQModel.load_config(options.model)
    rows = []
    for name, image in large_images(options.images, options.side, config["in_channels"]).items():
        latents, _, peak, seconds = in_fresh_process(
            measure, options.model, "encode", "none", options.tile, image, options.device
        )
        rows.append({"image": name, "job": "encode", "tiling": "none", "peak_mib": peak, "seconds": seconds})
        tiled, _, peak, seconds = in_fresh_process(
            measure, options.model, "encode", "tiled", options.tile, image, options.device
        )
        rows.append({"image": name, "job": "encode", "tiling": "tiled", "peak_mib": peak, "seconds": seconds})
        rows[-1]["largest_difference_of_latents"] = (tiled - latents).abs().max().item()
        reference = None
        for tiling in ("none", "tiled", "diffusers"):
            decoded, codes, peak, seconds = in_fresh_process(
                measure, options.model, "decode", tiling, options.tile, latents, options.device
            )
            row = {"image": name, "job": "decode", "tiling": tiling, "peak_mib": peak, "seconds": seconds}
            if reference is None:
                reference, reference_codes = decoded, codes
            else:
                row |= compare(decoded, reference)
                if codes is not None:
                    row["codes_that_differ"] = int((codes != reference_codes).sum())
                if options.pictures:
                    save_pictures(options.pictures, f"{name} {tiling}", decoded, reference)
            rows.append(row)
    for row in rows:
        print(
            ", ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )

    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    result = {
        "command": shlex.join(["python", "benchmarks/tiling.py", *words]),
        "model": {key: config[key] for key in ("block_out_channels", "layers_per_block", "vq_embed_dim", "norm_type")},
        "side": options.side,
        "tile": options.tile,
        "device": options.device if options.device == "cpu" else torch.cuda.get_device_name(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "rows": rows,
    }
    replace_text(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
