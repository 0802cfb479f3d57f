"""Write the README's tables and pictures from what they describe.

python benchmarks/readme.py costs                  the table of rates, parameters, memory and arithmetic
python benchmarks/readme.py quickstart FOLDER      pictures and figures of a finished `looc-ldm quickstart`, and
                                                   the FID that benchmarks/fashion_mnist_fid.py measured on it
python benchmarks/readme.py starter                picture and figures of the starter model, as benchmarks/starter.py
                                                   left them
python benchmarks/readme.py quantizer              the speeds that benchmarks/quantizer.py measured
python benchmarks/readme.py sampling               the speeds that benchmarks/sampling.py measured
python benchmarks/readme.py tiling                 what tiling costs and changes, as benchmarks/tiling.py measured
python benchmarks/readme.py training               images a second of the trainers, as benchmarks/training.py measured
python benchmarks/readme.py metrics                the speed and exactness that benchmarks/metrics.py measured
python benchmarks/readme.py tables                 docs/tables.md, its plots and its short form, from what
                                                   benchmarks/tables.py measured
python benchmarks/readme.py recipes                docs/quantizer_recipes.md, from what benchmarks/quantizer_recipes.py
                                                   measured
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from looc_ldm import LooCVQModel, configs
from looc_ldm.errors import UserError, one_line_errors
from looc_ldm.files import replace_text
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.config_parsing import construct, load_config
from looc_ldm.training.diffusion import Denoiser

ROOT = Path(__file__).resolve().parent.parent
BYTES_PER_PARAMETER = 20  # float32 weight, gradient, two moments of AdamW, average
SUSTAINED_FLOPS = 1e14
CLASSES = {"imagenet": 1000, "imagenette": 10, "fashion_mnist": 10, "starter": 10}


def costs() -> str:
    """Markdown tables over all bundled configs."""
    autoencoders, diffusions = [], []
    for name in configs.names():
        data_set, kind = name.split("/")
        if kind.startswith("autoencoder"):
            config = load_config(AutoencoderConfig, name)
            model = autoencoder(config)
            side, c = config.data.resolution, model.config
            bits = model.bits_per_image(side, side)
            autoencoders.append(
                f"| `{name}` | {side} | {model.downsampling_factor} | {c.vq_embed_dim} | {c.num_vq_embeddings} × "
                f"{c.codevector_dim} | {c.interpolation_factor} | {bits:,.0f} | {bits / side**2:.3g} | "
                f"{training_cost(model, (image_of(config, model),), config)} |"
            )
        else:
            config = load_config(DiffusionConfig, name)
            first = load_config(AutoencoderConfig, configs_name_of(config.autoencoder))
            vqvae = autoencoder(first)
            classes = CLASSES[data_set] if config.class_conditional else 0
            denoiser = Denoiser.from_config(config, vqvae, classes)
            latents = torch.empty(
                1, c_of(vqvae), *[config.data.resolution // vqvae.downsampling_factor] * 2, device="meta"
            )
            label = torch.zeros(1, dtype=torch.long, device="meta") if classes else None
            step = torch.zeros(1, device="meta")
            shape = " × ".join(map(str, latents.shape[1:]))
            diffusions.append(f"| `{name}` | {shape} | {training_cost(denoiser, (latents, step, label), config)} |")
    cost_columns = (
        "parameters | weights and optimizer | kept for backward, an image | TFLOP an image | training | time |"
    )
    rules = "---:|---:|---:|---:|---:|---:|"
    return "\n".join(
        [
            "Made by `python benchmarks/readme.py costs`. Bits per pixel count the image as the network sees it.",
            "",
            "| autoencoder | side | f | n_q | K × d | s | bits an image | bits per pixel | " + cost_columns,
            "|---|---:|---:|---:|---:|---:|---:|---:|" + rules,
            *autoencoders,
            "",
            "| diffusion | latents | " + cost_columns,
            "|---|---:|" + rules,
            *diffusions,
        ]
    )


def autoencoder(config: AutoencoderConfig) -> LooCVQModel:
    with torch.device("meta"):
        return construct(LooCVQModel, {"sample_size": config.data.resolution, **config.model}, "model")


def configs_name_of(folder: str) -> str:
    """`runs/ffhq/autoencoder/model` is made by the config `ffhq/autoencoder`."""
    return "/".join(Path(folder).parts[1:3])


def c_of(model: LooCVQModel) -> int:
    return model.quantize.vq_embed_dim


def image_of(config: AutoencoderConfig, model: LooCVQModel) -> torch.Tensor:
    return torch.empty(1, model.config.in_channels, config.data.resolution, config.data.resolution, device="meta")


def training_cost(model: torch.nn.Module, inputs: tuple, config) -> str:
    """Cells: parameters, bytes of state, bytes kept for backward, arithmetic, images, days."""
    model = model.to("meta")
    if isinstance(model, LooCVQModel):
        model.quantize = torch.nn.Identity()  # its search has no meta kernel, and next to nothing to count
        run = lambda x: model._decode_quantized(model.encode(x).latents)  # noqa: E731
    else:
        run = model
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
    seconds = flops * config.total_images / SUSTAINED_FLOPS
    time = f"{seconds / 86400:.2g} days" if seconds > 3600 else "-"
    return (
        f"{count / 1e6:,.1f} M | {count * BYTES_PER_PARAMETER / 2**30:.2g} GiB | {activations / 2**30:.2g} GiB | "
        f"{flops / 1e12:.2g} | {config.total_images / 1e6:,.3g} M images | {time}"
    )


def quickstart(folder: Path) -> str:
    """Pictures into docs/, and a table of the figures."""
    for name in ("figures.json", "samples.png", "reconstructions.png"):
        if not (folder / name).is_file():
            raise UserError(f"no {name} in {str(folder)!r}: it must be the folder of a finished quickstart.")
    figures = json.loads((folder / "figures.json").read_text())
    (ROOT / "docs").mkdir(exist_ok=True)
    for name in ("samples", "reconstructions"):
        enlarge(folder / f"{name}.png", name)
    first = figures["reconstruction"]
    held_out = f"{first['images']} held-out images of the bundled subset, on the original 28x28 pixels"
    rate = f"{first['bits_per_pixel']:.2f} bits per pixel"
    rows = [
        ("PSNR", f"{first['psnr']:.2f} dB at {rate}", held_out),
        ("SSIM", f"{first['ssim']:.4f} at {rate}", held_out),
        (
            "codebook",
            f"{first['num_codevectors']} × {first['codevector_dim']}, {first['codebook_use']:.0%} in use",
            f"perplexity {first['perplexity']:.0f}",
        ),
        (
            "time",
            f"{figures['seconds'] / 60:.1f} minutes",
            f"{figures['cpu_count']} CPU cores; both stages, sampling, evaluation",
        ),
    ]
    return "\n".join(
        [
            "This is what `looc-ldm quickstart` makes: samples of each of the ten classes,",
            "",
            "![A row a class: t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot]"
            "(docs/samples.png)",
            "",
            "and held-out images above their reconstructions.",
            "",
            "![Originals above, reconstructions below](docs/reconstructions.png)",
            "",
            "| | | measured on |",
            "|---|---|---|",
            *[f"| {' | '.join(row)} |" for row in rows + fid_rows(rate)],
            "",
            f"Protocol `{first['protocol']}`. FID@768 is the Fréchet distance of 768 Inception features; published",
            "FIDs use 2048 and do not compare. Made by `looc-ldm quickstart`, `benchmarks/fashion_mnist_fid.py` and",
            "`python benchmarks/readme.py quickstart quickstart`.",
        ]
    )


def starter() -> str:
    """The card's picture into docs/, and a table of the figures."""
    folder = ROOT / "looc_ldm" / "data" / "starter"
    enlarge(folder / "samples.png", "starter")
    fid = json.loads((ROOT / "benchmarks" / "results" / "starter_fid.json").read_text())
    rate = f"{fid['bits_per_pixel']:.2f} bits per pixel"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    parameters = sum(
        math.prod(weights.get_slice(name).get_shape())
        for file in folder.rglob("*.safetensors")
        for weights in [safe_open(file, "pt")]
        for name in weights.keys()  # noqa: SIM118
        if name != "quantize.usage"  # a buffer
    )
    images_seen = json.loads((folder / "training.json").read_text())["images_seen"]
    return "\n".join(
        [
            "![A row a class: t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot]"
            "(docs/starter.png)",
            "",
            f"Class-conditional, on 55,000 images of Fashion-MNIST, 32x32 pixels; {parameters / 1e6:.1f} M parameters,",
            f"{size / 2**20:.1f} MiB in half precision; its UNet saw {images_seen:,} images. How it was made is in its",
            "[card](looc_ldm/data/starter/README.md).",
            "",
            "| | | measured on |",
            "|---|---|---|",
            *[f"| {' | '.join(row)} |" for row in fid_rows(rate, "starter_fid")],
            "",
            "Protocol `clean`; of FID@768 see above. Made by `benchmarks/starter.py` and",
            "`python benchmarks/readme.py starter`.",
        ]
    )


def enlarge(picture: Path, name: str) -> None:
    """A picture, twice as large, as docs/NAME.png."""
    with Image.open(picture) as image:
        image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(ROOT / f"docs/{name}.png")


def fid_rows(rate: str, result: str = "fashion_mnist_fid") -> list[tuple[str, str, str]]:
    """Rows of the FID against the whole test set, where benchmarks/fashion_mnist_fid.py has measured it."""
    file = ROOT / "benchmarks" / "results" / f"{result}.json"
    if not file.is_file():
        return []
    fid = json.loads(file.read_text())
    drawn = (
        f"{fid['trained']['images_first']:,} samples, {fid['num_inference_steps']} DDIM steps, guidance scale "
        f"{fid['guidance_scale']:g}; {fid['reference']}; `{fid['command']}`"
    )
    (layer,) = [name for name in fid["trained"] if name.startswith("fid@")]
    rows = [(f"{layer.upper()} of samples", f"{fid['trained'][layer]:.3f} at {rate} of 28x28", drawn)]
    if "untrained" in fid:
        rows.append((f"{layer.upper()}, UNet untrained", f"{fid['untrained'][layer]:.3f}", "the same"))
    return rows


def quantizer() -> str:
    """A table of ratios for each device that was measured."""
    parts = []
    for file in sorted((ROOT / "benchmarks" / "results").glob("quantizer_*.json")):
        record = json.loads(file.read_text())
        on_cuda = "floor_ms" in record["cells"][0]
        where = record["processor"] if on_cuda else f"{record['threads']} threads of a {record['processor']} CPU"
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        floor = " our search / one read and write |" if on_cuda else ""
        parts += [
            f"Measured on {where} by `{record['command']}`, all contestants in turns in one run: how many times as",
            "long as `LooCQuantizer` they take for N vectors of d = 4 and K codevectors, and the memory beyond the",
            "input; more sizes are in `benchmarks/results/`. Rates are equal in a row: log2 K bits a vector. Training",
            "is forward, backward and the update of the codebook; vector-quantize-pytorch turns gradients, the others "
            f"pass them straight through. {versions}.",
            *_price_of_rotation(file.with_name(file.name.replace("quantizer_", "rotation_"))),
            "",
            "| N | K | | ours, ms | diffusers | vector-quantize-pytorch | `cdist` | ours, MiB | diffusers | "
            f"vector-quantize-pytorch | `cdist` |{floor}",
            "|---:|---:|---|" + "---:|" * (9 if on_cuda else 8),
        ]
        for cell in record["cells"]:
            if cell["d"] != 4:
                continue
            figures = cell["contestants"]
            ours = figures["looc"]
            others = [figures[name] for name in ("diffusers", "lucidrains", "cdist")]
            times = [f"{o['ms'] / ours['ms']:.2g}×" if o["ms"] else "does not fit" for o in others]
            sizes = [f"{o['mib']:,.0f}" if o["mib"] is not None else "does not fit" for o in others]
            columns = [
                f"{cell['n']:,}",
                f"{cell['k']:,}",
                "training" if cell["training"] else "evaluation",
                f"{ours['ms']:,.1f}",
                *times,
                f"{ours['mib']:,.0f}",
                *sizes,
            ]
            if on_cuda:
                columns.append(f"{cell['search_ms'] / cell['floor_ms']:.1f}")
            parts.append(f"| {' | '.join(columns)} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def _price_of_rotation(file: Path) -> list[str]:
    if not file.is_file():
        return []
    record = json.loads(file.read_text())
    ratios = [cell["ratio"] for cell in record["cells"]]
    largest = max(record["cells"], key=lambda cell: (cell["n"], cell["k"]))
    sizes = f"{largest['mib']['rotation']:.0f} MiB instead of {largest['mib']['straight-through']:.0f}"
    codevectors = " and ".join(f"{k:,}" for k in sorted({cell["k"] for cell in record["cells"]}))
    return [
        f"Our training with the rotation trick, the default, takes {min(ratios):.2f} to {max(ratios):.2f} times as",
        f"long as straight through for these N and K of {codevectors}, and at the largest of them {sizes}:",
        f"`{record['command']}`.",
    ]


def sampling() -> str:
    """A Markdown table: images a second of every contestant, on every device that was measured."""
    parts = []
    for file in sorted((ROOT / "benchmarks" / "results").glob("sampling_*.json")):
        record = json.loads(file.read_text())
        versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        parts += [
            f"Measured on {record['threads']} threads of a {record['processor']} by `{record['command']}`: networks of",
            f"`{record['config']}` with random weights, unconditional, {record['steps']} DDIM steps, "
            f"{record['batch_size']} images a call, {record['bits_per_pixel']:.3g} bits per pixel; contestants in",
            f"turns in one run, the fastest of {record['turns']} turns each. {versions}.",
            "",
            "| | images a second | against `LDMPipeline` |",
            "|---|---:|---:|",
        ]
        for name, figures in record["contestants"].items():
            parts.append(f"| {name} | {figures['images_per_second']:.3g} | {figures['ratio']:.2f}× |")
        parts += [
            "",
            f"Largest difference of a pixel between the float32 pipelines: {record['largest_difference']:.1g}.",
            "",
        ]
    return "\n".join(parts).rstrip()


def tiling() -> str:
    """A Markdown table: decoding a large image at once, in our tiles, and in blended tiles."""
    record = json.loads((ROOT / "benchmarks" / "results" / "tiling.json").read_text())
    rows = {(row["image"], row["job"], row["tiling"]): row for row in record["rows"]}
    names = {"none": "at once", "tiled": "`enable_tiling()`", "diffusers": "blended tiles, as in `AutoencoderKL`"}
    side, model, versions = record["side"], record["model"], record["versions"]
    f = 2 ** (len(model["block_out_channels"]) - 1)
    parts = [
        f"Decoding {side}x{side} pixels with a trained f = {f} model, tiles of {record['tile']} pixels, "
        f"{record['threads']} CPU thread;",
        "differences to decoding at once as shares of the pixel range. Measured by "
        f"`{record['command']}`, torch {versions['torch']}, diffusers {versions['diffusers']}.",
        "",
        "| image | decoded | mean difference | largest | codes that differ | peak memory | time |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (image, job, kind), row in rows.items():
        if job != "decode":
            continue
        whole = rows[image, job, "none"]
        differences = [
            f"{row[key]:.2g}" if key in row else "-"
            for key in ("mean_difference", "largest_difference", "codes_that_differ")
        ]
        parts.append(
            f"| {image} | {names[kind]} | {' | '.join(differences)} | {row['peak_mib'] / whole['peak_mib']:.2f}× | "
            f"{row['seconds'] / whole['seconds']:.1f}× |"
        )
    return "\n".join(parts)


def training() -> str:
    """Tables of both stages: images a second of every contestant, on every device that was measured."""
    lines = []
    for file in sorted((ROOT / "benchmarks" / "results").glob("training_*.json")):
        record = json.loads(file.read_text())
        parts = record["parts"]
        versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        commands = dict.fromkeys(f"`{part['command']}` ({part['turns']} turns)" for part in parts.values())
        lines += [
            f"Measured on {record['threads']} threads of a {record['processor']} by {', '.join(commands)};",
            "contestants of a stage in turns in one run, the fastest turn of each. The bare loop trains the same "
            "networks on random",
            f"numbers without Accelerate, data, logs and checkpoints. {versions}.",
            "",
            "| `" + record["config"] + "` | precision | batch | images a second | against the bare loop |",
            "|---|---|---:|---:|---:|",
        ]
        for stage in ("autoencoder", "diffusion"):
            part = parts.get(stage, {"contestants": {}})
            for name, figures in part["contestants"].items():
                precision = {"no": "float32", "bf16": "bfloat16"}[part["precision"]]
                if "recipe" in name:
                    name, precision = name.split(", ")
                cells = [f"{stage}, {name}", precision, f"{part['batch_size']}", f"{figures['images_per_second']:.3g}"]
                lines.append(f"| {' | '.join(cells)} | {figures['ratio']:.2f}× |")
        lines.append("")
        if "autoencoder" in parts:
            theirs = parts["autoencoder"]["bits_per_pixel_of_recipe"]
            lines += [
                f"Rates: {record['bits_per_pixel']:.3g} bits per pixel here, {theirs:.3g} in the recipe of diffusers' "
                "examples with the same encoder,",
                "decoder and number of codevectors. A batch trains one of its two networks; one of ours trains both.",
                "",
            ]
        if "data" in parts:
            data = parts["data"]
            lines += [
                f"On {data['jpeg_side']}-pixel JPEGs the autoencoder's trainer waits for data "
                f"{max(data['data_wait']):.2%} of the time (`imagenette/autoencoder`, "
                f"{data['num_workers']} workers).",
                "",
            ]
    return "\n".join(lines).rstrip()


def metrics() -> str:
    """A Markdown table: the Fréchet distance by us and by others."""
    record = json.loads((ROOT / "benchmarks" / "results" / "metrics_cpu.json").read_text())
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    parts = [
        f"Statistics and Fréchet distance of two sets of {record['dim']} features, on {record['threads']} CPU threads; "
        "contestants in turns in",
        f"one run, the fastest of {record['turns']} turns each. Measured by `{record['command']}`. {versions}.",
        "",
        "| images of each set | seconds | torch-fidelity takes | `scipy.linalg.sqrtm` takes | our relative error | "
        "torch-fidelity's |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in record["cells"]:
        ours, fidelity, scipy = (cell["contestants"][name] for name in ("looc", "torch-fidelity", "scipy"))
        parts.append(
            f"| {cell['images']:,} | {ours['seconds']:.2g} | {fidelity['times_looc']:.1f}× | "
            f"{scipy['times_looc']:.1f}× | {ours['relative_error']:.0e} | {fidelity['relative_error']:.0e} |"
        )
    if "whole_run" in record:
        run = record["whole_run"]
        shares = ", ".join(f"{name} {share:.1%}" for name, share in sorted(run["shares"].items(), key=lambda x: -x[1]))
        parts += [
            "",
            f"Time of a whole FID and KID of {run['photos']} images of {run['side']}x{run['side']} against as many "
            f"photographs, {run['layer']} features: {shares}.",
        ]
    return "\n".join(parts)


def recipes() -> str:
    """A Markdown page: PSNR and start of every recipe, a table for each setting."""
    lines = (ROOT / "benchmarks" / "results" / "quantizer_recipes.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    names = {"fashion_mnist": "Fashion-MNIST", "mnist": "MNIST", "cifar10": "CIFAR-10"}
    sets = _where_the_default_leads(runs, names)
    parts = [
        "# How a codebook should start and learn",
        "",
        "Written by `python benchmarks/readme.py recipes` from what `benchmarks/quantizer_recipes.py` measured: the",
        "paper's small VQ-VAE, K x d = 256 x 4, n_q = 128, Adam 3e-4, batch 64, all at equal images seen. PSNR in dB",
        "(protocol `clean`, mean over images) is of the last 2,000 training images, which were not trained on; test",
        "sets were not read. In brackets, the highest total loss of the first 150 steps over that of the first step:",
        "1.0 where it only falls. All figures are of one seed.",
        "",
        "The moving average with the rotation trick is the default: at 25,000 images it is ahead of the published rule",
        f"and of either change alone on {sets}. Which update of the codebook is better with the rotation trick",
        "is open in [longer trainings](tables.md#how-the-codebook-learns). Only runs with *rotation trick* in their",
        "name turn gradients. A *learned rotation of channels* is something else: an orthogonal map before the",
        "quantizer; it and the starts from features or by k-means are in this benchmark only, not in the package.",
    ]
    settings = ("images", "distance", "anchor", "interpolation_factor", "bits_per_pixel")
    for setting in dict.fromkeys(tuple(run[key] for key in settings) for run in runs):
        images, distance, anchor, s, rate = setting
        chosen = [run for run in runs if tuple(run[key] for key in settings) == setting]
        data = [name for name in names if any(run["data"] == name for run in chosen)]
        parts += [
            "",
            f"## {images:,} images, {distance}, anchor {anchor}, s = {s}: {rate:g} bits per pixel",
            "",
            f"| | {' | '.join(names[name] for name in data)} |",
            "|---|" + "---:|" * len(data),
        ]
        for recipe in dict.fromkeys(run["recipe"] for run in chosen):
            cells = [
                ", ".join(
                    f"{run['psnr']:.2f} ({run['highest_over_first_loss']:.1f})"
                    for run in chosen
                    if run["recipe"] == recipe and run["data"] == name
                )
                for name in data
            ]
            parts.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def _where_the_default_leads(runs: list[dict], names: dict[str, str]) -> str:
    """Sets on which the default is ahead of the published rule and of either of its changes alone."""
    setting = {"images": 25_000, "distance": "cosine", "anchor": "closest", "interpolation_factor": 1}
    ahead = []
    for data in names:
        psnr = {r["recipe"]: r["psnr"] for r in runs if r["data"] == data and setting.items() <= r.items()}
        others = [psnr[recipe] for recipe in ("published", "published, rotation trick", "moving average")]
        if psnr["moving average, rotation trick"] > max(others):
            ahead.append(names[data])
    return "all three sets" if len(ahead) == len(names) else " and ".join(ahead) or "no set"


def replace_section(name: str, text: str) -> None:
    """Put text between the README's markers of that name."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(f"<!-- {name} -->")
    _, after = rest.split(f"<!-- /{name} -->")
    replace_text(readme, f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->{after}")


def tables() -> str:
    """docs/tables.md and its plots, and its short form."""
    from tables_page import summary, write_page

    write_page()
    return summary()


def main() -> None:
    written = (costs, quickstart, starter, quantizer, sampling, tiling, training, metrics, tables, recipes)
    sections = {function.__name__: function for function in written}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=sections, metavar="SECTION", help=", ".join(sections))
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="of quickstart alone: what it has made")
    with one_line_errors():
        options = parser.parse_args()
        if (options.section == "quickstart") != (options.folder is not None):
            parser.error("quickstart needs the folder that it has made, and no other section takes one")
        if options.section == "recipes":
            replace_text(ROOT / "docs" / "quantizer_recipes.md", recipes())
        elif options.section == "quickstart":
            replace_section("quickstart", quickstart(options.folder))
        else:
            replace_section(options.section, sections[options.section]())


if __name__ == "__main__":
    main()
