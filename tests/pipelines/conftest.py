"""Tiny pipelines of every kind, with random weights: what they draw is noise, but it is drawn as it should be."""

import pytest
from diffusers import DiffusionPipeline

from looc_ldm import LooCLDMPipeline
from tiny import tiny_autoencoder, tiny_pipeline

CLASSES = ["T-shirt", "sandal, flip-flop", "ankle boot"]  # 3 is the null class


@pytest.fixture(autouse=True)
def _no_progress_bars(monkeypatch):
    """No pipeline shows a bar, unless it is told to."""
    monkeypatch.setattr(DiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False)


@pytest.fixture
def make_pipeline():
    """Builds a pipeline, "unconditional", "num_class_embeds" or "cross_attention": 16x16 images, 4x8x8 latents."""

    def make(kind: str = "num_class_embeds", channels: int = 3, **arguments) -> LooCLDMPipeline:
        # Euclidean distance: to it, unlike to the cosine, the scale of the latents matters.
        vqvae = tiny_autoencoder(channels, distance="euclidean", interpolation_factor=2, scaling_factor=0.7)
        return tiny_pipeline(kind, CLASSES, vqvae, **arguments)

    return make
