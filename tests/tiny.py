"""Tiny models with random weights, and helpers of several test files."""

import importlib.util
import io
import json
import multiprocessing
import os
import re
import runpy
import socket
import sys
import tarfile
from collections.abc import Iterable
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from looc_ldm import ClassEmbedding, LooCLDMPipeline, LooCQuantizer, LooCVQModel
from looc_ldm.commands.main import main as looc_ldm

TINY_CLASSES = ["circle", "square", "7"]


def small_quantizer(seed: int = 0, **changes) -> LooCQuantizer:
    """Return a quantizer of 8 channels with 32 codevectors of 4 channels, drawn from a normal distribution."""
    torch.manual_seed(seed)
    quantizer = LooCQuantizer(**{"vq_embed_dim": 8, "num_codevectors": 32, "codevector_dim": 4, **changes})
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


def tiny_autoencoder(
    channels: int = 3, blocks: int = 2, seed: int = 0, kind: type[LooCVQModel] = LooCVQModel, **changes
) -> LooCVQModel:
    """Return an autoencoder of 16x16 images in eval mode: f = 2 ** (blocks - 1), 16 codevectors, 2 codes per position.

    The codevectors are drawn from a normal distribution, so that images use many of them.
    """
    torch.manual_seed(seed)
    settings = {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "block_out_channels": (8,) * blocks,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "vq_embed_dim": 4,
        "num_vq_embeddings": 16,
        "codevector_dim": 2,
        "interpolation_factor": 1,
        "sample_size": 16,
        "scaling_factor": 1.0,
    }
    model = kind(**{**settings, **changes})
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model.eval()


def tiny_unet(num_class_embeds: int | None = None, **changes) -> UNet2DModel:
    """Return a UNet for the 8x8 latents of `tiny_autoencoder`, in eval mode."""
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "num_class_embeds": num_class_embeds,
    }
    return UNet2DModel(**{**settings, **changes}).eval()


def tiny_pipeline(
    kind: str = "num_class_embeds",
    classes: Iterable[str] = TINY_CLASSES,
    vqvae: LooCVQModel | None = None,
    seed: int = 0,
    **arguments,
) -> LooCLDMPipeline:
    """Return a pipeline on `vqvae`, or on a `tiny_autoencoder`. The null class follows the others.

    Args:
        kind: The way the UNet gets the class: "num_class_embeds", "cross_attention", or "unconditional".
        arguments: Further arguments of the pipeline.
    """
    torch.manual_seed(seed)
    vqvae = tiny_autoencoder(seed=seed) if vqvae is None else vqvae
    id2label = dict(enumerate(classes))
    conditional = {"id2label": id2label, "null_class_label": len(id2label)}
    if kind == "unconditional":
        unet, conditional = tiny_unet(), {}
    elif kind == "num_class_embeds":
        unet = tiny_unet(len(id2label) + 1)
    else:
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=12,
            attention_head_dim=2,
        ).eval()
        conditional["class_embedding"] = ClassEmbedding(len(id2label) + 1, 12)
    pipe = LooCLDMPipeline(vqvae, unet, DDIMScheduler(clip_sample=False), **{**conditional, **arguments})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def similarity_float64(vectors: torch.Tensor, codebook: torch.Tensor, distance: str) -> torch.Tensor:
    """Return the cosine, or minus the squared distance, of each vector and codevector by definition: `(N, K)`."""
    vectors, codebook = vectors.double(), codebook.double()
    if distance == "cosine":
        return F.cosine_similarity(vectors[:, None], codebook[None], dim=-1)
    return -(vectors[:, None] - codebook[None]).square().sum(-1)


def noise(count: int, channels: int = 1, height: int = 16, width: int | None = None, seed: int = 1) -> torch.Tensor:
    """Return uint8 images of noise `(count, channels, height, width)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width or height), dtype=torch.uint8, generator=generator)


def write_image(file: Path, color=(200, 100, 50), size: tuple[int, int] = (40, 20)) -> None:
    """Write an image of one color, and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(file)


def write_tar(file: Path, examples: Iterable[dict[str, bytes]], first: int = 0) -> None:
    """Write a shard as WebDataset has it: the fields of each example, `00001.jpg`, `00001.cls`, next to each other."""
    with tarfile.open(file, "w") as tar:
        for number, fields in enumerate(examples, first):
            for suffix, content in fields.items():
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def log_lines(run: Path, without: Iterable[str] = ()) -> list[dict]:
    """Return the lines of a run's `metrics.jsonl`, without the keys named."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in without} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the safetensors below a folder, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}/{name}": value for file in files for name, value in load_file(file).items()}


def assert_equal_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Check that two state dicts have the same names, and equal tensors to the last bit."""
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


def sgd(model: torch.nn.Module, settings) -> torch.optim.SGD:
    """Stand in for AdamW, whose normalization turns rounding errors of vanishing gradients into whole steps."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=settings.learning_rate)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the bytes of every file below a folder, and when it was written."""
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def blocks(page: Path, language: str) -> list[str]:
    """Return the blocks of a language in a Markdown page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def run(capsys, *arguments) -> str:
    """Run a command of `looc-ldm` and return what it prints."""
    looc_ldm([str(argument) for argument in arguments])
    return capsys.readouterr().out


def stopped(capsys, *arguments) -> list[str]:
    """Run a command that ends with status 2, and return the lines of its errors, without progress bars."""
    with pytest.raises(SystemExit) as stop:
        looc_ldm([str(argument) for argument in arguments])
    assert stop.value.code == 2
    lines = re.split(r"[\n\r]", capsys.readouterr().err)
    return [line for line in lines if line.strip() and not re.search(r"%\||it/s|^Generating", line)]


def refusal(capsys, *arguments) -> str:
    """Return the one line with which a command refuses its arguments. Nothing in the working directory changes."""

    def contents() -> dict[Path, bytes | None]:
        return {path: path.read_bytes() if path.is_file() else None for path in Path.cwd().rglob("*")}

    before = contents()
    (line,) = stopped(capsys, *arguments)
    assert line.startswith("error: ")
    assert contents() == before
    return line


def forkserver() -> BaseContext:
    """Return the context of processes that start with the package imported, which takes each of them seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "looc_ldm.training.autoencoder", "looc_ldm.training.diffusion"])
    return context


def rank_variables(processes: int) -> list[dict[str, str]]:
    """Return the environment variables with which a launcher tells each of some processes who it is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    counts = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **counts, **address} for rank in range(processes)]


def launch(file: str, *arguments: str | Path, processes: int = 2) -> str:
    """Run a Python file on CPU processes that talk through gloo, as torchrun does. Return what they print."""
    with TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(processes)]
        variables = [{**os.environ, "ACCELERATE_USE_CPU": "true", **own} for own in rank_variables(processes)]
        command = [file, *map(str, arguments)]
        ranks = [
            forkserver().Process(target=_run_file, args=(command, own, log))
            for own, log in zip(variables, logs, strict=True)
        ]
        for process in ranks:
            process.start()
        try:
            running = {process.sentinel: process for process in ranks}
            while running:
                ended = wait(running, timeout=600)
                assert ended, "the processes hang"
                for sentinel in ended:
                    assert running.pop(sentinel).exitcode == 0, "\n".join(log.read_text()[-3000:] for log in logs)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return "".join(log.read_text() for log in logs)


def _run_file(command: list[str], variables: dict[str, str], log: Path) -> None:
    """Run a file as the main program of this process, and write what it prints to `log`."""
    multiprocessing.set_start_method("fork", force=True)  # for its workers; others would import all anew
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = command
    with log.open("w") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    runpy.run_path(command[0], run_name="__main__")


def import_file(file: Path) -> ModuleType:
    """Import a Python file that is in no package, under the name of the file."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses and pickle look it up
    spec.loader.exec_module(module)
    return module
