"""Bundled configs, one YAML file per run: `<data set>/autoencoder` and `<data set>/diffusion`."""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """Return the names of all bundled configs, sorted."""
    return sorted(str(file.relative_to(_FOLDER).with_suffix("")) for file in _FOLDER.glob("*/*.yaml"))


def path(name: str) -> Path:
    """Return the file of a bundled config. Raises KeyError for an unknown name."""
    if name not in names():
        raise KeyError(f"no bundled config {name!r}: it must be one of {', '.join(names())}.")
    return _FOLDER / f"{name}.yaml"
