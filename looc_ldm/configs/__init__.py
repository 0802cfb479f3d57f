"""Bundled configs, one YAML file a run: `<data set>/autoencoder` and `<data set>/diffusion`."""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """Names of all bundled configs, sorted."""
    return sorted(str(file.relative_to(_FOLDER).with_suffix("")) for file in _FOLDER.glob("*/*.yaml"))


def path(name: str) -> Path:
    """The file of a bundled config. Raises KeyError for an unknown name."""
    if name not in names():
        raise KeyError(name)
    return _FOLDER / f"{name}.yaml"
