"""`torch.compile` and `torch.export` of the quantizer give what it gives without them."""

import shutil

import onnxruntime
import pytest
import torch
import torch.nn as nn
from torch._dynamo.testing import CompileCounterWithBackend

from looc_ldm import LooCQuantizer
from tiny import small_quantizer, tiny_autoencoder


def features_of(batch: int, step: int, height: int = 3) -> torch.Tensor:
    return torch.randn(batch, 8, height, 4, generator=torch.Generator().manual_seed(step))


def train(quantizer: LooCQuantizer, forward, owner_revives: bool, batches=(2, 2, 3, 5, 5)) -> list[torch.Tensor]:
    """Everything that a few training steps give."""
    if owner_revives:
        quantizer.revive()
    everything = []
    for step, batch in enumerate(batches):
        torch.manual_seed(step)  # for anchors that are drawn
        z = features_of(batch, step).requires_grad_()
        quantized, loss, (perplexity, _, indices) = forward(z)
        quantizer.zero_grad()
        (quantized.square().sum() + loss).backward()
        if quantizer.codebook_update == "gradient":
            everything.append(quantizer.embedding.weight.grad.clone())
            with torch.no_grad():
                quantizer.embedding.weight -= 0.1 * quantizer.embedding.weight.grad
        if owner_revives:
            quantizer.revive()
        state = (quantizer.embedding.weight.detach().clone(), quantizer.usage.clone())
        everything += [quantized.detach(), loss.detach(), perplexity, indices, z.grad, *state]
    return everything


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], rtol: float = 1e-6) -> None:
    for one, other in zip(found, expected, strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=rtol, atol=1e-6)
        else:
            assert torch.equal(one, other)


TRAININGS = {
    "average, its owner revives": ({"codebook_update": "ema", "anchor": "closest"}, True),
    "average, drawn, nobody revives": (
        {"codebook_update": "ema", "anchor": "probrandom", "segment_layout": "patch"},
        False,
    ),
    "gradient, nobody revives": ({"codebook_update": "gradient"}, False),
    "gradient, drawn, its owner revives": (
        {"codebook_update": "gradient", "anchor": "probrandom", "distance": "euclidean"},
        True,
    ),
}


@pytest.mark.parametrize(("arguments", "owner_revives"), TRAININGS.values(), ids=TRAININGS)
def test_compiled_training_in_one_graph_is_eager_training_whatever_the_batch_sizes(arguments, owner_revives):
    torch.compiler.reset()
    eager, compiled = small_quantizer(**arguments), small_quantizer(**arguments)
    expected = train(eager, eager, owner_revives)
    forward = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    # Eager and compiled backward go in other parts.
    assert_same(train(compiled, forward, owner_revives), expected, rtol=5e-6)
    assert not torch.equal(eager.usage, torch.zeros(32))


@pytest.mark.parametrize("input_layout", ["BCHW", "BLC"])
def test_compiled_evaluation_in_one_graph_is_eager_evaluation_whatever_the_batch_sizes(input_layout):
    torch.compiler.reset()
    quantizer = small_quantizer(input_layout=input_layout, interpolation_factor=3).eval()
    forward = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for no_grad in (True, False):
        for step, batch in enumerate((2, 3, 5, 1)):
            z = features_of(batch, step)
            z = z if input_layout == "BCHW" else z.flatten(2).transpose(1, 2)
            with torch.set_grad_enabled(not no_grad):
                quantized, loss, (perplexity, _, indices) = forward(z)
                expected, expected_loss, (expected_perplexity, _, expected_indices) = quantizer(z)
            found = [quantized, loss, perplexity, indices]
            assert_same(found, [expected, expected_loss, expected_perplexity, expected_indices])


@pytest.mark.parametrize("training", [False, True])
def test_a_graph_is_compiled_once_for_all_batch_sizes_from_the_third_on(training):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    quantizer = small_quantizer().train(training)
    quantizer.revive()
    forward = torch.compile(quantizer, fullgraph=True, backend=counter)
    for batch in (2, 3, 4):
        forward(features_of(batch, 0))
        quantizer.revive()
    graphs = counter.frame_count
    for batch in (5, 6, 7):
        forward(features_of(batch, 0))
        quantizer.revive()
    assert counter.frame_count == graphs


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(("arguments", "owner_revives"), list(TRAININGS.values())[:3:2])
def test_code_that_inductor_generates_trains_the_same_codebook(arguments, owner_revives):
    torch.compiler.reset()
    eager, compiled = small_quantizer(**arguments), small_quantizer(**arguments)
    expected = train(eager, eager, owner_revives)
    assert_same(train(compiled, torch.compile(compiled, fullgraph=True), owner_revives), expected)


def operators_of(program: torch.export.ExportedProgram) -> set[torch._ops.OpOverload]:
    """All operators of the graph and of the graphs in it."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes]
    return {node.target for node in nodes if isinstance(node.target, torch._ops.OpOverload)}


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize(("num_codevectors", "layout"), [(32, "channel"), (300, "patch")])
def test_an_exported_quantizer_is_made_of_plain_operators_and_takes_maps_of_any_size(num_codevectors, layout, distance):
    arguments = {"num_codevectors": num_codevectors, "segment_layout": layout, "distance": distance}
    quantizer = small_quantizer(**arguments).eval()
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.export.export(quantizer, (features_of(2, 0),), dynamic_shapes={"z": sizes})
    operators = operators_of(program)
    assert {operator.namespace for operator in operators} == {"aten"}
    assert torch.ops.aten.addmm.default in operators
    for z in (features_of(2, 0), features_of(5, 1, height=7), torch.randn(1, 8, 9, 2)):
        quantized, loss, (perplexity, _, indices) = program.module()(z)
        expected, expected_loss, (expected_perplexity, _, expected_indices) = quantizer(z)
        assert_same(
            [quantized, loss, perplexity, indices], [expected, expected_loss, expected_perplexity, expected_indices]
        )


def test_exporting_a_quantizer_in_training_says_that_it_cannot_be():
    with pytest.raises(Exception, match="LooCQuantizer can be exported in eval mode only"):
        torch.export.export(small_quantizer().train(), (features_of(2, 0),))


def test_compiled_evaluation_returns_nan_where_it_cannot_refuse():
    torch.compiler.reset()
    quantizer = LooCQuantizer(8, 16, 4).eval()
    z = torch.randn(2, 8, 4, 4)
    z[0, 0, 0, 0] = torch.inf
    with torch.no_grad():
        assert torch.compile(quantizer, backend="eager", fullgraph=True)(z)[0].isnan().all()
        assert torch.compile(quantizer, backend="eager", fullgraph=True)(z.clamp(-1, 1))[0].isfinite().all()


MODEL_METHODS = {
    "forward": lambda model, x: model(x).sample,
    "encode_indices": lambda model, x: model.encode_indices(x),
    "decode": lambda model, x: model.decode(x).sample,
    "decode_indices": lambda model, x: model.decode_indices(x).sample,
}


class ModelPart(nn.Module):
    """One method of an autoencoder, tensor to tensor."""

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x):
        return MODEL_METHODS[self.method](self.model, x)


def input_of(model, method: str, batch: int, height: int, width: int) -> torch.Tensor:
    images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))
    if method == "decode":
        return model.encode(images).latents
    return model.encode_indices(images) if method == "decode_indices" else images


@torch.no_grad()
@pytest.mark.parametrize("method", MODEL_METHODS)
@pytest.mark.parametrize("layout", ["channel", "patch"])
def test_a_traced_model_depends_on_its_input(method, layout):
    model = tiny_autoencoder(interpolation_factor=2, segment_layout=layout)
    traced = torch.jit.trace(ModelPart(model, method), (input_of(model, method, 2, 16, 16),))
    for size in ((2, 16, 16), (1, 16, 16), (3, 24, 32)):
        x = input_of(model, method, *size)
        torch.testing.assert_close(traced(x), MODEL_METHODS[method](model, x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # the exporters' own
@pytest.mark.parametrize("method", MODEL_METHODS)
@pytest.mark.parametrize("dynamo", [True, False])
def test_an_onnx_file_depends_on_its_input(method, dynamo, tmp_path):
    # The older exporter fixes the batch and the sides of diffusers' attention.
    model = tiny_autoencoder(interpolation_factor=2, mid_block_add_attention=dynamo)
    if dynamo:
        batch_and_sides = (0, 1, 2) if method == "decode_indices" else (0, 2, 3)
        arguments = {"dynamic_shapes": (dict.fromkeys(batch_and_sides, torch.export.Dim.DYNAMIC),)}
    else:
        arguments = {"input_names": ["x"], "dynamic_axes": {"x": [0]}}
    x = input_of(model, method, 2, 16, 16)
    file = tmp_path / "model.onnx"
    torch.onnx.export(ModelPart(model, method).eval(), (x,), file, dynamo=dynamo, **arguments)
    session = onnxruntime.InferenceSession(file)
    for size in ((2, 16, 16), (3, 24, 32) if dynamo else (3, 16, 16)):
        x = input_of(model, method, *size)
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        torch.testing.assert_close(found, MODEL_METHODS[method](model, x), rtol=0, atol=1e-4)
