"""Stage 2 with its weights divided over two processes by FSDP. This file is also the script that each of them runs.

Accelerate divides weights on accelerators only, and on CPUs takes DDP without a word, so the script takes that decision
for it; everything after it is Accelerate's and PyTorch's own.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import accelerate.state
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from looc_ldm import LooCLDMPipeline
from looc_ldm.training import diffusion
from looc_ldm.training.config import DiffusionConfig
from looc_ldm.training.config_parsing import config_text, load_config
from tiny import launch

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}

pytestmark = pytest.mark.slow


def run(config: DiffusionConfig, folder: Path) -> None:
    file = folder / f"{Path(config.output_dir).name}.yaml"
    file.write_text(config_text(config))
    launch(__file__, file)


def weights(pipeline: Path) -> dict[str, torch.Tensor]:
    files = sorted((pipeline / "unet").glob("*.safetensors"))
    assert len(files) == 2  # averaged and live
    return {f"{file.name}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def divided(diffusion_config, tmp_path_factory) -> tuple[DiffusionConfig, Path]:
    """A run of twelve steps, interrupted by its own end after three."""
    folder = tmp_path_factory.mktemp("fsdp")
    config = diffusion_config(folder / "divided", class_conditional=True, total_images=96, checkpoint_every_images=24)
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=0.05))
    run(replace(config, total_images=24), folder)
    run(config, folder)
    return config, folder


def test_divided_weights_end_as_those_of_one_process_also_when_resumed(divided, monkeypatch):
    config, folder = divided
    monkeypatch.setattr(diffusion, "adamw", sgd)
    one = weights(diffusion.train(replace(config, output_dir=str(folder / "one"))))
    two = weights(folder / "divided" / "pipeline")
    assert one.keys() == two.keys()
    start = weights(diffusion.train(replace(config, output_dir=str(folder / "short"), total_images=8)))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    assert max((one[name] - start[name]).abs().max() for name in one) > 1e-3
    assert (folder / "was_divided").read_text() == "True"


def test_the_pipeline_of_divided_weights_draws(divided):
    _, folder = divided
    pipe = LooCLDMPipeline.from_pretrained(folder / "divided" / "pipeline")
    assert len(pipe(class_labels=["bag"], num_inference_steps=2, output_type="pt").images) == 1


def sgd(model, settings):
    """In place of AdamW, whose normalization turns rounding errors of vanishing gradients into whole steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=0.5)  # FSDP cannot load a state of nothing


def divide_on_cpus() -> None:
    """Let Accelerate take FSDP on CPUs as it does on GPUs."""
    make = accelerate.state.AcceleratorState.__init__

    def make_and_divide(state, *arguments, **options):
        first = not accelerate.state.AcceleratorState._shared_state
        make(state, *arguments, **options)
        if first:
            state.distributed_type = DistributedType.FSDP
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = options["fsdp_plugin"]

    accelerate.state.AcceleratorState.__init__ = make_and_divide


def main(file: Path) -> None:
    os.environ.update(FSDP)
    divide_on_cpus()
    diffusion.adamw = sgd
    prepare = diffusion.prepare_fsdp

    def recording(accelerator):
        divided = prepare(accelerator)
        (file.parent / "was_divided").write_text(str(divided))
        return divided

    diffusion.prepare_fsdp = recording
    diffusion.train(load_config(DiffusionConfig, str(file)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
