"""The bundled model, made by benchmarks/starter.py."""

from __future__ import annotations

from pathlib import Path

STARTER = Path(__file__).resolve().parents[1] / "data" / "starter"


def starter_model() -> str:
    """The folder of a small class-conditional `LooCLDMPipeline` for Fashion-MNIST, 32x32 pixels, grey.

    For `LooCLDMPipeline.from_pretrained(looc_ldm.starter_model())`. Commands take it by the name `starter`, where there
    is no folder called so. It was trained on 55,000 of the training images, the bundled `fashion_mnist` among them; its
    `README.md` says how, and what it is worth.
    """
    return str(STARTER)
