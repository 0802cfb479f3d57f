"""The bundled models, made by benchmarks/starter.py and benchmarks/flowers.py: one folder in data/models for each."""

from __future__ import annotations

from pathlib import Path

from looc_ldm.utils.errors import ModelError

BUNDLED = Path(__file__).resolve().parents[1] / "data" / "models"
DEFAULT = "flowers"


def starter_model(name: str | None = None) -> str:
    """Return the folder of a small class-conditional `LooCLDMPipeline` that comes with the package.

    For `LooCLDMPipeline.from_pretrained(looc_ldm.starter_model())`. Commands take the same names, and `starter` for the
    default. The `README.md` in the folder says how the model was made and gives its measured figures.

    Args:
        name (`str`, *optional*): "flowers" (64x64 pixels, in colour), the default, or "fashion_mnist" (garments, 32x32,
            grey).

    Raises:
        ModelError: There is no bundled model of this name.
    """
    if name is not None and name not in bundled_models():
        raise ModelError(f"no bundled model {name!r}: there are {', '.join(bundled_models())}.")
    return str(BUNDLED / (name or DEFAULT))


def bundled_models() -> list[str]:
    """Return the names of the bundled models."""
    return sorted(file.parent.name for file in BUNDLED.glob("*/model_index.json"))
