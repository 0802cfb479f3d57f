"""Facts about a trained model, read from the files beside its weights and from its evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from looc_ldm.models.loading import stored_fingerprints
from looc_ldm.models.registration import AUTOENCODERS
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


@dataclass
class Facts:
    """Facts about a model folder."""

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
    if (folder / "training.json").is_file():
        facts.training = shareable(read_json(folder / "training.json"))
    measured = facts.training.get("validation") or facts.training.get("first_stage")
    facts.measurements = [Measurement(measured)] if measured else []
    facts.measurements += _read_metrics(metrics, facts)
    facts.samples, facts.samples_caption = _picture(facts, samples)
    return facts


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


def _read_metrics(files: Sequence[Path | str], facts: Facts) -> Iterator[Measurement]:
    for file in map(Path, files):
        measurement = Measurement(shareable(read_json(file)))
        if not {"command", "protocol", "fingerprints"} <= measurement.record.keys():
            raise UserError(f"{str(file)!r} holds no figures that `looc-ldm evaluate ... --output FILE` wrote.")
        if not facts.is_pipeline and not measurement.is_reconstruction:
            raise UserError(f"{str(file)!r} holds figures of samples: they belong to a pipeline.")
        if measurement.record["fingerprints"] != stored_fingerprints(facts.folder, not measurement.is_reconstruction):
            raise UserError(
                f"{str(file)!r} holds figures of a different model than {str(facts.folder)!r}: measure again."
            )
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
