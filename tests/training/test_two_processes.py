"""The README's launches on several processes: the trainers as modules, with all terms and accumulation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FEW = ["--total_images", "64", "--batch_size", "16", "--gradient_accumulation_steps", "2", "--tracker", "none"]
GAN = ["--loss.adversarial_weight", "0.5", "--loss.adversarial_start_images", "16", "--model.anchor", "probrandom"]

pytestmark = pytest.mark.slow


def train(stage: str, processes: int, *arguments: str | Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = ["-m", f"looc_ldm.training.{stage}", "--config", f"fashion_mnist/{stage}", *FEW, *arguments]
    subprocess.run([*launcher, *command], env={**os.environ, "ACCELERATE_USE_CPU": "true"}, check=True)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    """A first stage, trained by two processes with the PatchGAN."""
    folder = tmp_path_factory.mktemp("two") / "autoencoder"
    train("autoencoder", 2, *GAN, "--output_dir", folder)
    return folder / "model"


def test_two_processes_train_a_first_stage_with_patchgan_and_accumulation(autoencoder):
    weights = load_file(autoencoder / "diffusion_pytorch_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert weights["quantize.usage"].sum() > 0


def test_two_processes_train_the_second_stage_of_one(autoencoder, tmp_path):
    name = "pipeline/unet/diffusion_pytorch_model.non_ema.safetensors"
    runs = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        train("diffusion", processes, "--autoencoder", autoencoder, "--output_dir", folder)
        runs[processes] = load_file(folder / name)
    for key, tensor in runs[1].items():
        torch.testing.assert_close(tensor, runs[2][key], rtol=0, atol=1e-4)
