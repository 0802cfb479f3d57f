"""Figures measured during training equal the metrics, on one process and on two, and do not change the training.

This file is also the script that each of two processes runs.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from accelerate import Accelerator

from looc_ldm import LooCLDMPipeline, LooCQuantizer, LooCVQModel
from looc_ldm.images.config import DataConfig
from looc_ldm.images.image_set import spread
from looc_ldm.images.pixels import to_float, to_uint8
from looc_ldm.metrics import InceptionFeatures, evaluate_reconstruction, fid_and_kid
from looc_ldm.pipelines.sampling import sample_images
from looc_ldm.training.checks import check_evaluation
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig, EvaluationConfig
from looc_ldm.training.data import load_image_sets
from looc_ldm.training.validation import (
    codebook_use,
    generation_figures,
    reconstruction_figures,
    reconstruction_grid,
)
from looc_ldm.utils.errors import ConfigError, DataError
from tiny import launch, tiny_autoencoder, tiny_pipeline


def small_autoencoder(seed: int = 0) -> LooCVQModel:
    return tiny_autoencoder(1, seed=seed, distance="euclidean", mid_block_add_attention=False)


def small_pipeline(classes: int = 10) -> LooCLDMPipeline:
    kind = "num_class_embeds" if classes else "unconditional"
    return tiny_pipeline(kind, map(str, range(classes)), small_autoencoder())


def small_config(folder: Path, weights: Path, data: DataConfig, **evaluation) -> DiffusionConfig:
    asked = {"every_images": 8, "images": 15, "fid": True, "feature_layer": 64, "inception_weights": str(weights)}
    evaluation = EvaluationConfig(**asked | evaluation)
    return DiffusionConfig(output_dir=str(folder), data=data, batch_size=8, preview_steps=2, evaluation=evaluation)


@pytest.fixture
def alone() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def sets(small_data):
    """64 training and 16 validation images, 32x32."""
    return load_image_sets(small_data, channels=1)


# Before training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", [AutoencoderConfig, DiffusionConfig])
def test_a_run_without_inception_weights_is_refused_before_it_starts(config_class, tmp_path):
    (tmp_path / "text.pth").write_text("hello world, not a network")
    for file, message in (("nowhere.pth", "No Inception weights at"), ("text.pth", "is not a state dict")):
        evaluation = EvaluationConfig(every_images=8, fid=True, inception_weights=str(tmp_path / file))
        with pytest.raises(ConfigError, match=rf"^evaluation\.inception_weights: .*{message}") as caught:
            check_evaluation(config_class(evaluation=evaluation))
        assert "\n" not in str(caught.value)
        check_evaluation(config_class(evaluation=replace(evaluation, every_images=None)))  # never measured


def test_weights_without_the_layer_are_refused_and_with_it_accepted(inception_weights):
    evaluation = EvaluationConfig(every_images=8, fid=True, inception_weights=str(inception_weights))
    with pytest.raises(ConfigError, match="does not hold layer 2048"):
        check_evaluation(DiffusionConfig(evaluation=evaluation))
    check_evaluation(DiffusionConfig(evaluation=replace(evaluation, feature_layer=768)))


def test_an_evaluation_that_measures_nothing_or_too_little_is_refused():
    evaluation = EvaluationConfig(every_images=8)
    check_evaluation(AutoencoderConfig(evaluation=evaluation))
    with pytest.raises(ConfigError, match=r"stage 2 measures nothing without evaluation\.fid"):
        check_evaluation(DiffusionConfig(evaluation=evaluation))
    config = AutoencoderConfig(data=DataConfig(validation_images=1), evaluation=replace(evaluation, fid=True))
    with pytest.raises(ConfigError, match="at least 2, got 1"):
        check_evaluation(config)


# The codebook ---------------------------------------------------------------------------------------------------------


def test_codebook_use_of_known_shares():
    quantizer = LooCQuantizer(4, 8, 2, distance="euclidean")
    assert codebook_use(quantizer) == {"codebook_use": 0, "codebook_perplexity": 1, "dead_codes": 8}  # before training
    quantizer.usage.fill_(1 / 8)
    assert codebook_use(quantizer) == pytest.approx({"codebook_use": 1, "codebook_perplexity": 8, "dead_codes": 0})
    quantizer.usage.copy_(torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0]) * 0.3)  # early: they do not add up to 1 yet
    assert codebook_use(quantizer) == pytest.approx({"codebook_use": 2 / 8, "codebook_perplexity": 2, "dead_codes": 6})


@pytest.mark.parametrize("usage_decay", [0.99, 0.9])
def test_dead_codes_are_those_that_revival_moves_more_than_half_way(usage_decay):
    quantizer = LooCQuantizer(
        2, 32, 2, interpolation_factor=1, distance="euclidean", usage_decay=usage_decay, codebook_update="gradient"
    )
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.randn(32, 2, generator=torch.Generator().manual_seed(0)))
        quantizer.embedding.weight[0] = 100.0
    quantizer.usage.copy_(torch.linspace(0, 4e-3, 32) * (1 - usage_decay) * 2)
    quantizer.usage[0] = 1.0
    before = quantizer.embedding.weight.clone()
    anchor = torch.full((1, 2, 1, 1), 100.0)  # chooses code 0, and is what the others are pulled to
    quantizer.train()(anchor)
    quantizer.revive()
    way = (quantizer.embedding.weight - before).norm(dim=1) / (100 - before).norm(dim=1).clamp_min(1e-9)
    moved = int((way[1:] > 0.5).sum())
    assert 0 < moved < 31
    assert codebook_use(quantizer)["dead_codes"] == moved


# Stage 1 --------------------------------------------------------------------------------------------------------------


class Gone:
    """A set whose images cannot be read."""

    def __init__(self, images):
        self.images, self.content_size = images, images.content_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        raise DataError(f"cannot read image {index}")


class Distance(nn.Module):
    """In the place of LPIPS: any network that compares RGB images."""

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        assert first.shape[1] == 3
        return (first - second).square().mean(dim=(1, 2, 3), keepdim=True)


def test_reconstructions_are_measured_as_the_metrics_do_and_leave_no_trace(sets, untrained_inception):
    _, validation = sets
    model = small_autoencoder()
    model.encoder.train()
    evaluation = EvaluationConfig(images=6, fid=True, feature_layer=64, inception_weights=str(untrained_inception))
    state = torch.get_rng_state()
    figures = reconstruction_figures(model, validation, evaluation, batch_size=4, num_workers=0, lpips=Distance())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.encoder.training
    assert not model.decoder.training
    chosen = spread(len(validation), 6)
    pixels = to_float(torch.stack([validation[int(i)][0] for i in chosen]))
    features = InceptionFeatures("64", untrained_inception)
    expected = evaluate_reconstruction(model, [pixels], validation.content_size, features)
    for name in ("psnr", "ssim", "l1", "codebook_use", "perplexity", "bits_per_pixel", "images", "rfid@64"):
        assert figures.pop(name) == pytest.approx(expected[name], rel=1e-4)
    assert figures.pop("lpips") > 0
    assert not figures


def test_the_grid_shows_originals_averaged_and_live_reconstructions_and_changes_nothing(sets):
    _, validation = sets
    averaged, live = small_autoencoder(0), small_autoencoder(1).train()
    codebook, state = live.quantize.embedding.weight.clone(), torch.get_rng_state()
    grid = reconstruction_grid([averaged, live], validation, 4)
    assert live.quantize.training
    live.quantize.revive()  # nothing has been collected
    assert torch.equal(live.quantize.embedding.weight, codebook)
    assert torch.equal(torch.get_rng_state(), state)
    cells = torch.from_numpy(np.array(grid.convert("L"))).reshape(3, 32, 4, 32).permute(0, 2, 1, 3)
    originals = torch.stack([validation[int(i)][0] for i in spread(len(validation), 4)])
    assert torch.equal(cells[0], originals[:, 0])
    for row, model in ((1, averaged), (2, live.eval())):
        with torch.no_grad():
            expected = to_uint8(model(to_float(originals)).sample)
        assert torch.equal(cells[row], expected[:, 0])
    assert not torch.equal(cells[1], cells[2])


# Stage 2 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [0, 10])
def test_generation_figures_are_those_of_the_metrics_for_samples_of_each_class(
    sets, small_data, untrained_inception, alone, tmp_path, classes
):
    train, _ = sets
    config = small_config(tmp_path, untrained_inception, small_data)
    pipe = small_pipeline(classes)
    state = torch.get_rng_state()
    figures = generation_figures(pipe, train, config, alone)
    assert torch.equal(torch.get_rng_state(), state)
    # 15 samples of 10 classes: one or two of each.
    labels = [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9] if classes else [None] * 15
    samples = list(sample_images(pipe, labels, seed=config.seed, num_inference_steps=2, progress=False))
    known = [train[int(i)][0] for i in spread(len(train), 15)]
    expected = fid_and_kid(samples, known, InceptionFeatures("64", untrained_inception))
    assert figures["fid@64"] == pytest.approx(expected["fid@64"], rel=1e-3)
    assert figures["kid@64"] == pytest.approx(expected["kid@64"], rel=1e-3)
    said = {"samples": 15, "reference_images": 15, "steps": 2, "guidance_scale": 1.0}
    assert figures.items() >= said.items()


def test_the_reference_is_read_once_and_anew_where_something_else_is_asked(
    sets, small_data, untrained_inception, alone, tmp_path
):
    train, _ = sets
    config, pipe = small_config(tmp_path, untrained_inception, small_data), small_pipeline()
    figures = generation_figures(pipe, train, config, alone)
    gone = Gone(train)
    assert generation_figures(pipe, gone, config, alone) == figures
    for other in (replace(config.evaluation, images=14), replace(config.evaluation, feature_layer=192)):
        with pytest.raises(DataError, match="cannot read image"):
            generation_figures(pipe, gone, replace(config, evaluation=other), alone)


@pytest.mark.slow
def test_two_processes_have_the_figures_of_one(sets, small_data, untrained_inception, alone, tmp_path):
    train, _ = sets
    launch(__file__, tmp_path / "two", untrained_inception, small_data.path)
    expected = generation_figures(
        small_pipeline(), train, small_config(tmp_path / "one", untrained_inception, small_data), alone
    )
    for process in range(2):
        found = json.loads((tmp_path / "two" / f"{process}.json").read_text())
        assert found == pytest.approx(expected, rel=1e-3)


if __name__ == "__main__":
    processes = Accelerator()
    assert processes.num_processes == 2
    folder, weights, path = sys.argv[1:]
    Path(folder).mkdir(exist_ok=True)
    data = DataConfig(path=path, validation_images=16, resolution=32, fit="pad", num_workers=0)
    settings = small_config(Path(folder), Path(weights), data)
    for _ in range(2):  # the second time with the reference that the first one has left
        found = generation_figures(small_pipeline(), load_image_sets(data, 1)[0], settings, processes)
    (Path(folder) / f"{processes.process_index}.json").write_text(json.dumps(found))
    processes.end_training()
