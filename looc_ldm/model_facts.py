"""What is known of a trained model: read from the files beside it, from its run and from its evaluations."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import yaml

from looc_ldm.errors import ModelError, UserError

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
# What a file of figures says about how they were measured.
CIRCUMSTANCES = (
    "images",
    "images_first",
    "images_second",
    "height",
    "width",
    "num_codevectors",
    "codevector_dim",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "batch_size",
)


@dataclass
class Measurement:
    """Figures of one evaluation, by name, and what else its record says."""

    figures: dict[str, float]
    record: dict
    data: str | None
    split: str | None

    @property
    def is_reconstruction(self) -> bool:
        return "images" in self.record

    def circumstances(self) -> list[str]:
        """On what and how it was measured, in words."""
        record, words = self.record, []
        of = "" if self.data is None else f" of `{self.data}`"
        if self.split is not None:
            of += f", split `{self.split}`"
        if self.is_reconstruction:
            size = f" of {record['width']}x{record['height']} pixels" if "width" in record else ""
            words.append(f"{record['images']:,} images{size}{of}")
        elif "images_first" in record:
            words.append(f"{record['images_first']:,} samples against {record['images_second']:,} images{of}")
        if "protocol" in record:
            words.append(f"protocol `{record['protocol']}`")
        for key, unit in (("num_inference_steps", "denoising steps"), ("guidance_scale", "guidance scale")):
            if key in record:
                words.append(f"{record[key]:g} {unit}" if "steps" in key else f"{unit} {record[key]:g}")
        words += [f"{key} {record[key]}" for key in ("seed", "dtype") if key in record]
        return words


@dataclass
class Facts:
    """What is known of a model folder."""

    folder: Path
    is_pipeline: bool
    configs: dict[str, dict]  # of the components by name; of an autoencoder under "vqvae"
    index: dict
    training: dict = field(default_factory=dict)
    run: dict = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    samples: Path | None = None
    samples_caption: str = ""


def gather(folder: Path, metrics: Sequence[Path | str] = (), samples: Path | str | None = None) -> Facts:
    """Read what is known of a model folder, of the run it came from, and of its evaluations; see `write_card`."""
    facts = _read_configs(folder)
    run_folder = run_folder_of(folder)
    if (folder / "training.json").is_file():
        facts.training = read_json(folder / "training.json")
    if run_folder is not None:
        facts.run = shareable(yaml.safe_load((run_folder / "config.yaml").read_text()))
    validation = facts.training.get("validation")
    data = facts.training.get("data", {})
    if validation is None and facts.is_pipeline and run_folder is not None:
        validation, data = _validation_of_first_stage(facts, run_folder)
    if validation:
        # Without a split of its own, validation images are held out from the training split.
        split = data.get("validation_split") or f"{data.get('split')}, held out"
        facts.measurements.append(_measurement(validation, shareable(data.get("path")), split))
    facts.measurements += [_read_metrics(Path(file), facts) for file in metrics]
    facts.samples, facts.samples_caption = _picture(facts, run_folder, samples)
    return facts


def run_folder_of(folder: Path) -> Path | None:
    """The training run whose result a folder is."""
    parent = folder.resolve().parent
    return parent if folder.resolve().name in ("model", "pipeline") and (parent / "config.yaml").is_file() else None


def read_json(file: Path) -> dict:
    """A JSON object. Raises UserError if it is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {str(file)!r}: {error.strerror}.") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{str(file)!r} is not a JSON object.")
    return value


def shareable(value):
    """Settings without the folders of the machine they were used on: of an absolute path only its last part."""
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
        return Facts(folder, True, configs, index)
    if (folder / "config.json").is_file():
        return Facts(folder, False, {"vqvae": read_json(folder / "config.json")}, {})
    result = next((folder / name for name in ("pipeline", "model") if (folder / name).is_dir()), None)
    hint = "" if result is None else f"; give {str(result)!r}"
    raise ModelError(f"no model in {str(folder)!r}: it holds neither a model_index.json nor a config.json{hint}.")


def _measurement(record: dict, data: str | None, split: str | None) -> Measurement:
    figures = {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in CIRCUMSTANCES
    }
    return Measurement(figures, record, data, split)


def _read_metrics(file: Path, facts: Facts) -> Measurement:
    record = read_json(file)
    if "command" not in record or "protocol" not in record:
        raise UserError(f"{str(file)!r} holds no figures that `looc-ldm evaluate ... --output FILE` wrote.")
    measurement = _measurement(record, shareable(record.get("data")), record.get("split"))
    for name, value in measurement.figures.items():
        if not math.isfinite(value):
            raise UserError(f"{str(file)!r}: {name} is {value}.")
    vqvae = facts.configs.get("vqvae", {})
    for theirs, ours in (("num_codevectors", "num_vq_embeddings"), ("codevector_dim", "codevector_dim")):
        if theirs in record and record[theirs] != vqvae.get(ours):
            raise UserError(
                f"{str(file)!r} holds figures of another model: {theirs} is {record[theirs]}, here {vqvae.get(ours)}."
            )
    if not facts.is_pipeline and not measurement.is_reconstruction:
        raise UserError(f"{str(file)!r} holds figures of samples: they belong to a pipeline, not to an autoencoder.")
    return measurement


def _validation_of_first_stage(facts: Facts, run_folder: Path) -> tuple[dict | None, dict]:
    """What was measured on the first stage of a pipeline when it was trained, if its weights are still the same."""
    name = (yaml.safe_load((run_folder / "config.yaml").read_text()) or {}).get("autoencoder")
    weights = "diffusion_pytorch_model.safetensors"
    if not name or not (facts.folder / "vqvae" / weights).is_file():
        return None, {}
    for base in (Path.cwd(), *run_folder.parents):
        first_stage = base / name
        if not ((first_stage / weights).is_file() and (first_stage / "training.json").is_file()):
            continue
        if _digest(first_stage / weights) == _digest(facts.folder / "vqvae" / weights):
            training = read_json(first_stage / "training.json")
            return training.get("validation"), training.get("data", {})
    return None, {}


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _picture(facts: Facts, run_folder: Path | None, samples: Path | str | None) -> tuple[Path | None, str]:
    if samples is not None:
        samples = Path(samples)
        if not samples.is_file() or samples.suffix.lower() not in IMAGES:
            raise UserError(f"--samples {str(samples)!r} must be an image file ({', '.join(IMAGES)}).")
        return samples, ""
    previews = [] if run_folder is None else [p for p in (run_folder / "previews").glob("*.png") if p.stem.isdecimal()]
    newest = max(previews, key=lambda preview: int(preview.stem), default=None)
    if newest is None or int(newest.stem) != facts.training.get("images_seen"):
        return None, ""  # of other weights than these
    if not facts.is_pipeline:
        return newest, "Held-out images above, their reconstructions below."
    caption = "Samples"
    if "preview_steps" in facts.run:
        caption += f", {facts.run['preview_steps']} denoising steps"
    if facts.run.get("preview_guidance_scale") is not None and facts.index.get("null_class_label") is not None:
        caption += f", guidance scale {facts.run['preview_guidance_scale']:g}"
    return newest, f"{caption}; a column a class." if facts.index.get("id2label") else f"{caption}."
