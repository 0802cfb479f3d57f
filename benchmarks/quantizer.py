"""Time and memory of `LooCQuantizer` against other vector quantizers, on random features.

    python benchmarks/quantizer.py                     the whole grid, about half an hour on 2 CPU cores
    python benchmarks/quantizer.py --device cuda       the same on a GPU
    python benchmarks/quantizer.py --dims 4            a third of it
    python benchmarks/quantizer.py --gradients         training with the rotation trick against straight-through, d = 4

Writes benchmarks/results/quantizer.jsonl, one line per size and mode. The contestants take turns, and each figure is
the fastest of its turns: read the ratios, not the milliseconds. Every contestant gets N vectors of d dimensions and one
codebook of K codevectors, and measures by euclidean distance:

    looc        LooCQuantizer, s = 1, anchor "closest", straight-through; in training with `revive()`
    diffusers   diffusers' VectorQuantizer, on maps of d channels
    lucidrains  vector-quantize-pytorch with its defaults, 8 heads that share the codebook, rotation trick
    cdist       torch.cdist and argmin, straight-through, the two losses

"Evaluation" is a forward without gradient in eval mode, "training" is forward and backward in training mode. Memory is
the growth of the process's peak during the call; on CUDA, of the peak of allocated memory. Null: it does not fit.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from results import RESULTS, circumstances, replace_results

from looc_ldm import LooCQuantizer
from looc_ldm.quantizer.loocq import GRADIENTS

HEADS = 8
TURNS = 3
SIDE = 64
CONTESTANTS = ("looc", "diffusers", "lucidrains", "cdist")


class Cdist(nn.Module):
    def __init__(self, num_codevectors: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(num_codevectors, dim)

    def forward(self, vectors):
        indices = torch.cdist(vectors, self.embedding.weight).argmin(1)
        chosen = self.embedding(indices)
        loss = F.mse_loss(chosen, vectors.detach()) + 0.25 * F.mse_loss(vectors, chosen.detach())
        return vectors + (chosen - vectors).detach(), loss


def make(
    name: str, n: int, k: int, d: int, device: str, gradient: str = "straight-through"
) -> tuple[nn.Module, torch.Tensor]:
    """Return a contestant and its input, both with N(0, 1) entries. `gradient` is that of looc."""
    torch.manual_seed(0)
    if name == "looc":
        module = LooCQuantizer(HEADS * d, k, d, 1, distance="euclidean", gradient=gradient)
        shape = (n // (HEADS * SIDE**2), HEADS * d, SIDE, SIDE)
        nn.init.normal_(module.embedding.weight)
        module.usage.fill_(1 / k)
        module.revive()
    elif name == "diffusers":
        from diffusers.models.autoencoders.vae import VectorQuantizer

        module, shape = VectorQuantizer(k, d, beta=0.25, legacy=False), (n // SIDE**2, d, SIDE, SIDE)
        nn.init.normal_(module.embedding.weight)
    elif name == "lucidrains":
        from vector_quantize_pytorch import VectorQuantize

        module = VectorQuantize(dim=HEADS * d, codebook_dim=d, codebook_size=k, heads=HEADS)
        shape = (n // (HEADS * SIDE**2), SIDE**2, HEADS * d)
        nn.init.normal_(module._codebook.embed)
    else:
        module, shape = Cdist(k, d), (n, d)
        nn.init.normal_(module.embedding.weight)
    z = torch.randn(shape)
    assert z.numel() == n * d
    return module.to(device), z.to(device)


def call_of(name: str, module: nn.Module, z: torch.Tensor, training: bool) -> Callable[[], None]:
    module.train(training)

    def evaluate():
        with torch.no_grad():
            module(z)

    def train():
        x = z.detach().requires_grad_()
        module.zero_grad()
        output = module(x)
        loss = output[2] if name == "lucidrains" else output[1]
        (output[0].sum() + loss.sum()).backward()
        if name == "looc":
            module.revive()

    return train if training else evaluate


def seconds(call: Callable[[], None], device: str) -> float:
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def resident(field: str) -> float:
    """Return the MiB of this process: VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


def measure_memory(queue, name: str, n: int, k: int, d: int, training: bool, device: str, *gradient: str) -> None:
    """Put the MiB of a call, or None if memory does not suffice, into a queue. Runs in its own process."""
    try:
        module, z = make(name, n, k, d, device, *gradient)
        warm_module, warm_z = make(name, HEADS * SIDE**2, k, d, device, *gradient)
        call_of(name, warm_module, warm_z, training)()  # compiles, starts threads
        call = call_of(name, module, z, training)
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            queue.put((torch.cuda.max_memory_allocated() - before) / 2**20)
            return
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + int(0.8 * available()),) * 2)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
        call()
        queue.put(resident("VmHWM") - before)
    except (RuntimeError, MemoryError) as error:
        if not any(word in str(error).lower() for word in ("memory", "alloc")):
            raise
        queue.put(None)


def memory(*arguments) -> float | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["looc_ldm.quantizer.loocq", "diffusers", "vector_quantize_pytorch", "numba"])
    queue = context.Queue()
    process = context.Process(target=measure_memory, args=(queue, *arguments))
    process.start()
    process.join()
    if process.exitcode:  # killed for want of memory
        return None
    return queue.get()


def cell(n: int, k: int, d: int, training: bool, device: str) -> dict[str, dict[str, float | None]]:
    """Return milliseconds and MiB of every contestant, None for both if it does not fit."""
    figures = {name: {"mib": memory(name, n, k, d, training, device), "ms": None} for name in CONTESTANTS}
    calls = {
        name: call_of(name, *make(name, n, k, d, device), training)
        for name in CONTESTANTS
        if figures[name]["mib"] is not None
    }
    for call in calls.values():
        call()  # warms up
    turns = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(TURNS)]
    for name in calls:
        figures[name]["ms"] = 1000 * min(turn[name] for turn in turns)
    return figures


def gradients(device: str) -> list[dict]:
    """Measure a training step for every `gradient` at d = 4: milliseconds, the median ratio of turns, and MiB."""
    cells = []
    for k in (256, 1024):
        for n in (2**16, 2**18, 2**20):
            calls = {g: call_of("looc", *make("looc", n, k, 4, device, g), True) for g in GRADIENTS}
            turns = {name: [] for name in calls}
            for turn in range(-1, 10):  # one to warm up
                for name, call in calls.items():
                    taken = seconds(call, device)
                    turns[name] += [taken] if turn >= 0 else []
            pairs = zip(turns["rotation"], turns["straight-through"], strict=True)
            figures = {name: 1000 * min(taken) for name, taken in turns.items()}
            mib = {name: memory("looc", n, k, 4, True, device, name) for name in GRADIENTS}
            ratio = statistics.median(turned / straight for turned, straight in pairs)
            cells.append({"kind": "gradients", "n": n, "k": k, "d": 4, "ratio": ratio, "ms": figures, "mib": mib})
            print(json.dumps(cells[-1]), flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, nargs="+", default=[2**16, 2**18, 2**20], help="N")
    parser.add_argument("--codevectors", type=int, nargs="+", default=[256, 1024, 8192], help="K")
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 4, 8], help="d")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "quantizer.jsonl")
    parser.add_argument("--gradients", action="store_true", help="compare the gradients of training instead")
    options = parser.parse_args()
    about = circumstances(options.device, "vector-quantize-pytorch", "numba", "scipy")
    about["command"] = "python benchmarks/quantizer.py --device " + options.device
    keys = ["kind", "n", "k", "d", "training", "device"]
    if options.gradients:
        about["command"] += " --gradients"
        replace_results(options.output, [line | about for line in gradients(options.device)], keys)
        return
    for d in options.dims:
        for k in options.codevectors:
            for n in options.vectors:
                for training in (False, True):
                    size = {"kind": "quantizers", "n": n, "k": k, "d": d, "training": training}
                    line = {**size, **cell(n, k, d, training, options.device)}
                    print(json.dumps(line), flush=True)
                    replace_results(options.output, [line | about], keys)


if __name__ == "__main__":
    main()
