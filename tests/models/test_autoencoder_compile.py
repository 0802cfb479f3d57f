"""`torch.compile` of `LooCVQModel`: one graph for encoding and one for decoding, with the results of eager calls."""

import shutil
from functools import partial

import pytest
import torch

from looc_ldm import LooCVQModel
from tiny import tiny_autoencoder

small_model = partial(tiny_autoencoder, block_out_channels=(8, 16), latent_channels=6, interpolation_factor=2)


@torch.no_grad()
def check_compiled(model: LooCVQModel, backend: str, batches: tuple[int, ...], dynamic: bool, tolerance: float) -> None:
    """Batches after the first must do with the graphs of the first."""
    torch.compiler.reset()
    encode = torch.compile(model.encode, fullgraph=True, backend=backend, dynamic=dynamic)
    decode = torch.compile(model.decode, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        x = torch.rand(batch, 3, 8, 12, generator=generator) * 2 - 1
        z = torch.randn(batch, 4, 4, 6, generator=generator)
        with torch.compiler.set_stance("default" if batch == batches[0] else "fail_on_recompile"):
            latents, found = encode(x).latents, decode(z)
        torch.testing.assert_close(latents, model.encode(x).latents, rtol=0, atol=tolerance)
        expected = model.decode(z)
        assert torch.equal(found.indices, expected.indices)
        for name in ("sample", "commit_loss", "perplexity"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=tolerance)


SPATIAL = {"norm_type": "spatial", "block_out_channels": (32, 32), "latent_channels": 4}


@pytest.mark.parametrize("kwargs", [{}, SPATIAL], ids=["group", "spatial"])
def test_one_graph_for_a_fixed_batch(kwargs):
    check_compiled(small_model(**kwargs), "aot_eager", batches=(2,), dynamic=False, tolerance=1e-5)


def test_one_graph_for_all_batches():
    check_compiled(small_model(), "aot_eager", batches=(2, 3, 5, 4), dynamic=True, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(
    ("kwargs", "dynamic", "batches"), [({}, True, (2, 3, 5)), (SPATIAL, False, (2,))], ids=["group", "spatial"]
)
def test_code_that_inductor_generates_gives_the_same(kwargs, dynamic, batches):
    check_compiled(small_model(**kwargs), "inductor", batches, dynamic, tolerance=1e-4)
