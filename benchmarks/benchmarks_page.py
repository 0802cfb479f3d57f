"""Write the tables between the markers of docs/benchmarks.md, from benchmarks/results and the bundled configs.

python benchmarks/benchmarks_page.py                        all tables
python benchmarks/benchmarks_page.py --quickstart FOLDER --machine "2 quiet CPU cores"    and a finished quickstart
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from results import DOCS, RESULTS, fill, markdown_table, read_results, replace_results
from torch.utils.flop_counter import FlopCounterMode

from looc_ldm import LooCVQModel, configs
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.config_parsing import construct, load_config
from looc_ldm.training.data import with_stage_1_images
from looc_ldm.training.denoiser import Denoiser
from looc_ldm.utils.errors import one_line_errors

BYTES_PER_PARAMETER = 20  # float32 weight, gradient, two moments of AdamW, average
SUSTAINED_FLOPS = 1e14
CLASSES = {"imagenet": 1000, "imagenette": 10, "fashion_mnist": 10, "starter": 10, "photos": 10}


# Costs of the bundled configs -----------------------------------------------------------------------------------------


def autoencoder_costs() -> str:
    rows = []
    for name in configs.names():
        if name.split("/")[1].startswith("autoencoder"):
            config = load_config(AutoencoderConfig, name)
            model, side = make_autoencoder(config), config.data.resolution
            c, bits = model.config, model.bits_per_image(side, side)
            row = {"config": f"`{name}`", "side": side, "f": model.downsampling_factor, "n_q": c.vq_embed_dim}
            row |= {"K × d": f"{c.num_vq_embeddings} × {c.codevector_dim}", "s": c.interpolation_factor}
            row |= {"bits per image": f"{bits:,.0f}", "bits per pixel": f"{bits / side**2:.3g}"}
            image = torch.empty(1, c.in_channels, side, side, device="meta")
            rows.append(row | training_costs(model, (image,), config.total_images))
    return markdown_table(rows)


def diffusion_costs() -> str:
    rows = []
    autoencoders = [name for name in configs.names() if name.split("/")[1].startswith("autoencoder")]
    trained_by = {f"{load_config(AutoencoderConfig, name).output_dir}/model": name for name in autoencoders}
    for name in configs.names():
        data_set, stage = name.split("/")
        if stage.startswith("diffusion"):
            config = load_config(DiffusionConfig, name)
            vqvae = make_autoencoder(load_config(AutoencoderConfig, trained_by[config.autoencoder]))
            config = with_stage_1_images(config, vqvae)
            classes = CLASSES[data_set] if config.class_conditional else 0
            denoiser = Denoiser.from_config(config, vqvae, classes)
            side = config.data.resolution // vqvae.downsampling_factor
            latents = torch.empty(1, vqvae.config.vq_embed_dim, side, side, device="meta")
            label = torch.zeros(1, dtype=torch.long, device="meta") if classes else None
            inputs = latents, torch.zeros(1, device="meta"), label
            row = {"config": f"`{name}`", "latents": " × ".join(map(str, latents.shape[1:]))}
            rows.append(row | training_costs(denoiser, inputs, config.total_images))
    return markdown_table(rows)


def make_autoencoder(config: AutoencoderConfig) -> LooCVQModel:
    with torch.device("meta"):
        return construct(LooCVQModel, {"sample_size": config.data.resolution, **config.model}, "model")


def training_costs(model: torch.nn.Module, inputs: tuple, images: int) -> dict:
    """Return parameters, bytes of state, bytes kept for the backward pass of an image, arithmetic, images, and days."""
    model = model.to("meta")
    run = model
    if isinstance(model, LooCVQModel):
        model.quantize = torch.nn.Identity()  # its search has no meta kernel, and next to nothing to count
        run = lambda x: model._decode_quantized(model.encode(x).latents)  # noqa: E731
    kept: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t), FlopCounterMode(display=False) as counter:
        run(*inputs)
    activations = sum(size for key, size in kept.items() if key not in parameters)
    count = sum(p.numel() for p in model.parameters())
    flops = 3 * counter.get_total_flops()  # the backward pass costs about twice the forward pass
    seconds = flops * images / SUSTAINED_FLOPS
    return {
        "parameters": f"{count / 1e6:,.1f} M",
        "weights and optimizer": f"{count * BYTES_PER_PARAMETER / 2**30:.2g} GiB",
        "kept for backward, per image": f"{activations / 2**30:.2g} GiB",
        "TFLOP per image": f"{flops / 1e12:.2g}",
        "training": f"{images / 1e6:,.3g} M images",
        "time": f"{seconds / 86400:.2g} days" if seconds > 3600 else None,
    }


# Measured -------------------------------------------------------------------------------------------------------------


def quickstart_table() -> str:
    rows = [
        {
            "machine": line["machine"],
            "PSNR": f"{line['psnr']:.2f} dB",
            "SSIM": f"{line['ssim']:.4f}",
            "bits per pixel": f"{line['bits_per_pixel']:.3g}",
            "codebook use": f"{line['codebook_use']:.0%}",
            "perplexity": f"{line['perplexity']:.0f}",
            "minutes": f"{line['seconds'] / 60:.1f}",
        }
        for line in read_results(RESULTS / "quickstart.jsonl")
    ]
    return markdown_table(rows)


def fid_table() -> str:
    rows = [
        {
            "model": line["model"],
            "FID@768": f"{line['fid@768']:.3f}",
            "bits per pixel": f"{line['bits_per_pixel']:.3g}",
            "samples": f"{line['images_first']:,}",
            "DDIM steps": line["num_inference_steps"],
            "guidance scale": line["guidance_scale"],
        }
        for line in read_results(RESULTS / "fid.jsonl")
    ]
    return markdown_table(rows)


def flowers_table() -> str:
    rows = []
    for line in read_results(RESULTS / "flowers.jsonl"):
        if "images_first" in line:  # compared with the validation photographs
            row = {"images": line["set"], "number": f"{line['images_first']:,}", "FID@768": f"{line['fid@768']:.3f}"}
            row |= {"KID@768": f"{line['kid@768']:.5f}"}
            row |= {name: f"{line[f'{name}@768']:.2f}" for name in ("precision", "recall")}
            rows.append(row | {"copies": f"{line['copies@768']:.1%}" if "copies@768" in line else None})
    return markdown_table(rows)


def quantizer_table() -> str:
    rows = []
    for line in read_results(RESULTS / "quantizer.jsonl"):
        if line["kind"] == "quantizers" and line["d"] == 4:
            mode = "training" if line["training"] else "evaluation"
            row = {"device": line["device"], "N": f"{line['n']:,}", "K": f"{line['k']:,}", "mode": mode}
            row["ours, ms"] = f"{line['looc']['ms']:,.1f}"
            names = {"diffusers": "diffusers", "lucidrains": "vector-quantize-pytorch", "cdist": "`cdist`"}
            for name, title in names.items():
                ms = line[name]["ms"]
                row[title] = "does not fit" if ms is None else f"{ms / line['looc']['ms']:.3g}×"
            for name, title in {"looc": "ours", **names}.items():
                mib = line[name]["mib"]
                row[f"{title}, MiB"] = "does not fit" if mib is None else f"{mib:,.0f}"
            rows.append(row)
    return markdown_table(rows, align_left=1)


def gradients_table() -> str:
    rows = [
        {
            "device": line["device"],
            "N": f"{line['n']:,}",
            "K": f"{line['k']:,}",
            "straight-through, ms": f"{line['ms']['straight-through']:.1f}",
            "rotation trick": f"{line['ratio']:.2f}×",
            "straight-through, MiB": f"{line['mib']['straight-through']:.0f}",
            "rotation trick, MiB": f"{line['mib']['rotation']:.0f}",
        }
        for line in read_results(RESULTS / "quantizer.jsonl")
        if line["kind"] == "gradients"
    ]
    return markdown_table(rows, align_left=1)


def speed_table(file: str, title: str, *columns: str) -> str:
    """Return a table of images per second, and their ratio to the first contestant's."""
    rows = []
    for line in read_results(RESULTS / file):
        row = {name.replace("_", " "): line[name] for name in (*columns, "config", "device", "batch_size")}
        speed = {"images per second": f"{line['images_per_second']:.3g}", title: f"{line['ratio']:.2f}×"}
        rows.append(row | {"bits per pixel": f"{line['bits_per_pixel']:.3g}"} | speed)
    return markdown_table(rows, align_left=len(columns) + 2)


def cpu_training_table() -> str:
    """Return a table of training steps on a CPU, by memory format, attention and threads."""
    names = ("stage", "precision", "memory_format", "attention", "threads")
    rows = []
    for line in read_results(RESULTS / "cpu_training.jsonl"):
        row = {name.replace("_", " "): line[name] for name in names}
        row["images per second"] = f"{line['images_per_second']:.0f}"
        rows.append(row | {"against channels last, fused, 1 thread": f"{line['ratio']:.2f}×"})
    return markdown_table(rows, align_left=4)


def threads_table() -> str:
    """Return a table of drawing from the bundled model on a CPU, by threads, on a quiet machine and a busy one."""
    lines = read_results(RESULTS / "sampling_threads.jsonl")
    setting = lambda line: (line["busy"], line["steps"])  # noqa: E731
    own = {setting(line): line["images_per_second"] for line in lines if "float32, PyTorch" in line["contestant"]}
    rows = [
        {
            "contestant": line["contestant"],
            "busy": "one core" if line["busy"] else "no",
            "steps": line["steps"],
            "steps × images per second": f"{line['steps'] * line['images_per_second']:.3g}",
            "against ours, float32, PyTorch's threads": f"{line['images_per_second'] / own[setting(line)]:.2f}×",
        }
        for line in lines
    ]
    return markdown_table(rows, align_left=2)


def measured_tables() -> dict[str, str]:
    """Return the tables of what was measured, by the names of their markers."""
    return {
        "quickstart": quickstart_table(),
        "fid": fid_table(),
        "flowers": flowers_table(),
        "quantizer": quantizer_table(),
        "gradients": gradients_table(),
        "sampling": speed_table("sampling.jsonl", "against `LDMPipeline`", "contestant"),
        "training": speed_table("training.jsonl", "against the bare loop", "stage", "contestant"),
        "cpu training": cpu_training_table(),
        "sampling threads": threads_table(),
    }


# Pictures -------------------------------------------------------------------------------------------------------------


def take_quickstart(folder: Path, machine: str) -> None:
    """Take pictures and figures of a finished quickstart on a machine, described in words."""
    for name in ("samples.png", "reconstructions.png"):
        with Image.open(folder / name) as image:
            image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(DOCS / name)
    figures = json.loads((folder / "figures.json").read_text())
    names = ("protocol", "images", "psnr", "ssim", "bits_per_pixel", "codebook_use", "perplexity")
    line = {"command": "looc-ldm quickstart", "machine": machine}
    line |= {name: figures["reconstruction"][name] for name in names}
    line |= {name: figures[name] for name in ("seconds", "cpu_count")}
    replace_results(RESULTS / "quickstart.jsonl", [line], ["machine"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, metavar="FOLDER", help="folder of a finished `looc-ldm quickstart`")
    parser.add_argument("--machine", help="of that quickstart, in words")
    options = parser.parse_args()
    if (options.quickstart is None) != (options.machine is None):
        parser.error("--quickstart and --machine go together")
    with one_line_errors():
        if options.quickstart is not None:
            take_quickstart(options.quickstart, options.machine)
        costs = {"autoencoder costs": autoencoder_costs(), "diffusion costs": diffusion_costs()}
        fill(DOCS / "benchmarks.md", measured_tables() | costs)


if __name__ == "__main__":
    main()
