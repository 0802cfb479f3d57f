"""What is known of a trained model: read from the files beside its weights and from its evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from looc_ldm.models.registration import AUTOENCODERS
from looc_ldm.models.stored_fingerprints import stored_fingerprints
from looc_ldm.utils.errors import ModelError, UserError
from looc_ldm.utils.files import read_json

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
# The numbers in a record of figures that say how they were measured.
CIRCUMSTANCES = (
    "images",
    "images_first",
    "images_second",
    "height",
    "width",
    "num_codevectors",
    "codevector_dim",
    "codebook_scalars",
    "parameters",
    "class_fid_classes",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "batch_size",
)


@dataclass
class Measurement:
    """The figures of one evaluation, by name, and its whole record: figures, circumstances, data set and split."""

    figures: dict[str, float]
    record: dict

    @property
    def is_reconstruction(self) -> bool:
        return "images" in self.record


@dataclass
class Facts:
    """What is known of a model folder."""

    folder: Path
    configs: dict[str, dict]  # by component; that of an autoencoder under "vqvae"
    index: dict | None  # model_index.json of a pipeline
    training: dict = field(default_factory=dict)  # training.json
    measurements: list[Measurement] = field(default_factory=list)
    samples: Path | None = None
    samples_caption: str = ""

    @property
    def is_pipeline(self) -> bool:
        return self.index is not None


def gather(folder: Path, metrics: Sequence[Path | str] = (), samples: Path | str | None = None) -> Facts:
    """Read what is known of a model folder and of its evaluations; for the arguments see `hub.card.write_card`."""
    facts = _read_configs(folder)
    source = folder / "training.json"
    if source.is_file():
        facts.training = read_training(source)
    measured = facts.training.get("validation") or facts.training.get("first_stage")
    if measured:
        facts.measurements.append(_measurement(source, measured))
    facts.measurements += _read_metrics(metrics, facts)
    facts.samples, facts.samples_caption = _picture(facts, samples)
    return facts


def read_training(file: Path) -> dict:
    """Return a model's training.json, without folders of the machine. Raises UserError if the trainers write no such.

    Files of older versions have no "facts", "settings" and "preview".
    """
    training = shareable(read_json(file))
    kinds = dict.fromkeys(("facts", "settings", "validation", "first_stage"), dict)
    _check_kinds(file, training, kinds | {"preview": str, "images_seen": int})
    return training


def shareable(value):
    """Return settings without the folders of the machine they were used on: the last part of every absolute path."""
    if isinstance(value, dict):
        return {key: shareable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shareable(entry) for entry in value]
    for kind in (PurePosixPath, PureWindowsPath):
        if isinstance(value, str) and kind(value).is_absolute():
            return kind(value).name
    return value


def _check_kinds(file: Path, values: dict, kinds: dict) -> None:
    for name, kind in kinds.items():
        if name in values and not isinstance(values[name], kind):
            raise UserError(f"{str(file)!r}: {name} is {values[name]!r}.")


def _read_configs(folder: Path) -> Facts:
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        files = {name: (folder / name / "config.json", folder / name / "scheduler_config.json") for name in index}
        configs = {name: read_json(file) for name, choice in files.items() for file in choice if file.is_file()}
        return Facts(folder, configs, index)
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        if config.get("_class_name") not in AUTOENCODERS:
            kinds = " or ".join(AUTOENCODERS)
            raise ModelError(f"{str(folder)!r} holds a {config.get('_class_name')}, not a {kinds} or a pipeline.")
        return Facts(folder, {"vqvae": config}, None)
    result = next((folder / name for name in ("pipeline", "model") if (folder / name).is_dir()), None)
    hint = "" if result is None else f"; give {str(result)!r}"
    raise ModelError(f"no model in {str(folder)!r}: it holds neither a model_index.json nor a config.json{hint}.")


def _measurement(file: Path, record: dict) -> Measurement:
    figures = {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in CIRCUMSTANCES
    }
    text = dict.fromkeys(("data", "split"), (str, type(None)))
    _check_kinds(file, record, text | dict.fromkeys(CIRCUMSTANCES, (int, float)))
    for name, value in figures.items():
        if not math.isfinite(value):
            raise UserError(f"{str(file)!r}: {name} is {value}.")
    measurement = Measurement(figures, record)
    needed = ("images" if measurement.is_reconstruction else "images_first", "bits_per_pixel")
    missing = [name for name in needed if name not in record]
    if missing:
        raise UserError(f"{str(file)!r} states no {missing[0]}: figures without it cannot be compared.")
    return measurement


def _read_metrics(files: Sequence[Path | str], facts: Facts) -> Iterator[Measurement]:
    for file in map(Path, files):
        record = shareable(read_json(file))
        if "command" not in record or "protocol" not in record:
            raise UserError(f"{str(file)!r} holds no figures that `looc-ldm evaluate ... --output FILE` wrote.")
        measurement = _measurement(file, record)
        if not facts.is_pipeline and not measurement.is_reconstruction:
            raise UserError(f"{str(file)!r} holds figures of samples: they belong to a pipeline.")
        if "fingerprints" not in record:
            raise UserError(f"{str(file)!r} does not say of which model the figures are: measure them again.")
        if record["fingerprints"] != stored_fingerprints(facts.folder, not measurement.is_reconstruction):
            raise UserError(f"{str(file)!r} holds figures of another model than {str(facts.folder)!r}: measure again.")
        yield measurement


def _picture(facts: Facts, samples: Path | str | None) -> tuple[Path | None, str]:
    """Return the picture for the card and its caption: a run's newest preview if it shows these weights."""
    if samples is not None:
        samples = Path(samples)
        if not samples.is_file() or samples.suffix.lower() not in IMAGES:
            raise UserError(f"--samples {str(samples)!r} must be an image file ({', '.join(IMAGES)}).")
        return samples, ""
    if "preview" not in facts.training:
        return None, ""
    preview = facts.folder.resolve().parent / "previews" / f"{facts.training.get('images_seen', 0):09d}.png"
    return (preview, facts.training["preview"]) if preview.is_file() else (None, "")
