"""Facts about a trained model, read from the files beside its weights and from its evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from looc_ldm.models.loading import stored_fingerprints
from looc_ldm.models.registration import AUTOENCODERS
from looc_ldm.utils.errors import ModelError, UserError
from looc_ldm.utils.files import read_json

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
# Numbers in a record of figures that describe how they were measured.
CIRCUMSTANCES = (
    *("images", "images_first", "images_second", "height", "width", "num_codevectors", "codevector_dim"),
    *("codebook_scalars", "parameters", "class_fid_classes", "seed", "num_inference_steps", "guidance_scale"),
    "batch_size",
)


@dataclass(frozen=True)
class Measurement:
    """The record of one evaluation: figures, circumstances, data set and split."""

    record: dict

    @property
    def figures(self) -> dict[str, float]:
        """Figures by name."""
        return {
            name: value
            for name, value in self.record.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name not in CIRCUMSTANCES
        }

    @property
    def is_reconstruction(self) -> bool:
        return "images" in self.record


@dataclass(frozen=True)
class Facts:
    """Facts about a model folder.

    Attributes:
        configs: Configs by component; an autoencoder's is "vqvae".
        index: `model_index.json` of a pipeline, else None.
        training: `training.json`, with absolute paths cut to their last part.
        measurements: Figures from the training, then from the files given.
        picture: A picture for the card, with its caption.
    """

    configs: dict[str, dict]
    index: dict | None
    training: dict
    measurements: list[Measurement]
    picture: Path | None
    caption: str


def gather(folder: Path, metrics: Sequence[Path | str] = (), samples: Path | str | None = None) -> Facts:
    """Read the facts about a model folder and its evaluations; see `hub.card.write_card` for the arguments."""
    index = None
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        files = {name: (folder / name / "config.json", folder / name / "scheduler_config.json") for name in index}
        configs = {name: read_json(file) for name, choice in files.items() for file in choice if file.is_file()}
    elif (folder / "config.json").is_file():
        configs = {"vqvae": read_json(folder / "config.json")}
        kind = configs["vqvae"].get("_class_name")
        if kind not in AUTOENCODERS:
            raise ModelError(f"{str(folder)!r} holds a {kind}, not a {' or '.join(AUTOENCODERS)} or a pipeline.")
    else:
        result = next((folder / name for name in ("pipeline", "model") if (folder / name).is_dir()), None)
        hint = "" if result is None else f"; give {str(result)!r}"
        raise ModelError(f"no model in {str(folder)!r}: it holds neither a model_index.json nor a config.json{hint}.")
    has_training = (folder / "training.json").is_file()
    training = shareable(read_json(folder / "training.json")) if has_training else {}
    measured = training.get("validation") or training.get("first_stage")
    measurements = [Measurement(measured)] if measured else []
    measurements += _read_metrics(metrics, folder, is_pipeline=index is not None)
    return Facts(configs, index, training, measurements, *_picture(folder, training, samples))


def shareable(value):
    """Return settings with every absolute path cut to its last part, to hide the folders of this machine."""
    if isinstance(value, dict):
        return {key: shareable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shareable(entry) for entry in value]
    for kind in (PurePosixPath, PureWindowsPath):
        if isinstance(value, str) and kind(value).is_absolute():
            return kind(value).name
    return value


def _read_metrics(files: Sequence[Path | str], folder: Path, is_pipeline: bool) -> Iterator[Measurement]:
    for file in map(Path, files):
        measurement = Measurement(shareable(read_json(file)))
        if not {"command", "protocol", "fingerprints"} <= measurement.record.keys():
            raise UserError(f"{str(file)!r} holds no figures that `looc-ldm evaluate ... --output FILE` wrote.")
        if not is_pipeline and not measurement.is_reconstruction:
            raise UserError(f"{str(file)!r} holds figures of samples, but {str(folder)!r} holds no pipeline.")
        if measurement.record["fingerprints"] != stored_fingerprints(folder, not measurement.is_reconstruction):
            raise UserError(f"{str(file)!r} holds figures of a different model than {str(folder)!r}: measure again.")
        yield measurement


def _picture(folder: Path, training: dict, samples: Path | str | None) -> tuple[Path | None, str]:
    """Return the picture for the card, and its caption.

    If `samples` is not given, take the run's preview at the number of images that these weights have seen. If there is
    no picture, return None and "".
    """
    if samples is not None:
        samples = Path(samples)
        if not samples.is_file() or samples.suffix.lower() not in IMAGES:
            raise UserError(f"--samples {str(samples)!r} must be an image file ({', '.join(IMAGES)}).")
        return samples, ""
    preview = folder.resolve().parent / "previews" / f"{training.get('images_seen', 0):09d}.png"
    return (preview, training["preview"]) if "preview" in training and preview.is_file() else (None, "")
