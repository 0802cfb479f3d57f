"""What is known of a trained model: read from the files beside it, from its run and from its evaluations."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import yaml

from looc_ldm.errors import ModelError, UserError
from looc_ldm.registration import AUTOENCODERS
from looc_ldm.stored_fingerprints import stored_fingerprints

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
    "codebook_scalars",
    "parameters",
    "class_fid_classes",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "batch_size",
)
# The settings in the config.yaml of a run, as `looc_ldm.training.config` defines them: a file with any other is not
# ours, whatever lies beside it.
SETTINGS_OF_BOTH = {
    "output_dir",
    "init_from",
    "seed",
    "total_images",
    "batch_size",
    "gradient_accumulation_steps",
    "mixed_precision",
    "channels_last",
    "compile",
    "gradient_checkpointing",
    "ema_halflife_images",
    "log_every_images",
    "preview_every_images",
    "checkpoint_every_images",
    "keep_last",
    "keep_every_images",
    "max_skipped_steps",
    "push_to_hub",
    "push_private",
    "tracker",
    "data",
    "loss",
    "optimizer",
    "evaluation",
}
SETTINGS_OF_STAGE = {
    "model": {"model"},  # by the folder of the result
    "pipeline": {
        "autoencoder",
        "cache_latents",
        "latents",
        "latent_scaling",
        "class_conditional",
        "class_dropout",
        "unet",
        "class_embedding_dim",
        "scheduler",
        "loss_weighting",
        "min_snr_gamma",
        "timestep_sampling",
        "preview_steps",
        "preview_guidance_scale",
    },
}
DATA_SETTINGS = {
    "path",
    "split",
    "validation_split",
    "validation_images",
    "image_column",
    "label_column",
    "num_classes",
    "streaming",
    "shuffle_images",
    "resolution",
    "fit",
    "flip",
    "num_workers",
    "max_unreadable_share",
}


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
            size = f" of {record['width']}x{record['height']} pixels" if {"width", "height"} <= record.keys() else ""
            words.append(f"{record['images']:,} images{size}{of}")
        elif "images_second" in record:
            words.append(f"{record['images_first']:,} samples against {record['images_second']:,} images{of}")
        elif "images_first" in record:  # only the mean and covariance of the others are known
            words.append(f"{record['images_first']:,} samples against statistics{of}")
        if "class_fid_classes" in record:
            words.append(f"{record['class_fid_classes']:,} classes")
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
    run_folder: Path | None  # of the training run whose result it is
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
    source, settings = folder / "training.json", {}
    if source.is_file():
        facts.training = read_training(source)
    facts.run_folder, settings = run_of(folder)
    facts.run = shareable(settings)
    training = facts.training
    if "validation" not in training and facts.is_pipeline and facts.run_folder is not None:
        source, training = _training_of_first_stage(facts, settings)
    if training.get("validation"):
        data = training.get("data", {})
        # Without a split of its own, validation images are held out from the training split.
        split = data.get("validation_split") or f"{data.get('split')}, held out"
        facts.measurements.append(_measurement(source, training["validation"], shareable(data.get("path")), split))
    facts.measurements += _read_metrics(metrics, facts)
    facts.samples, facts.samples_caption = _picture(facts, samples)
    return facts


def run_of(folder: Path) -> tuple[Path | None, dict]:
    """The folder and the settings of the training run whose result a folder is; None and nothing if it is of no run.

    It is of one if training.json lies in it, and beside it a config.yaml with settings of ours and no others.

    Raises:
        UserError: A config.yaml that cannot be read, or one of ours with a value of another type.
    """
    name, run_folder = folder.resolve().name, folder.resolve().parent
    file = run_folder / "config.yaml"
    if name not in SETTINGS_OF_STAGE or not (folder / "training.json").is_file() or not file.is_file():
        return None, {}
    settings = read_yaml(file)
    foreign = settings.keys() - SETTINGS_OF_BOTH - SETTINGS_OF_STAGE[name]
    data = settings.get("data")
    if foreign or not {"output_dir", "total_images", "data"} <= settings.keys():
        return None, {}
    if isinstance(data, dict) and data.keys() - DATA_SETTINGS:
        return None, {}
    kinds = {"data": dict, "optimizer": dict, "autoencoder": str, "preview_guidance_scale": (int, float)}
    _check_kinds(file, settings, kinds)
    return run_folder, settings


def read_json(file: Path) -> dict:
    """A JSON object. Raises UserError if it is none."""
    return _read_mapping(file, json.loads, "a JSON object")


def read_yaml(file: Path) -> dict:
    """A YAML mapping. Raises UserError if it is none."""
    return _read_mapping(file, yaml.safe_load, "a YAML mapping")


def read_training(file: Path) -> dict:
    """The training.json of a model. Raises UserError if it is not as the trainers write it."""
    training = read_json(file)
    _check_kinds(file, training, {"data": dict, "validation": dict, "transform": str, "images_seen": int})
    _check_kinds(file, training.get("data", {}), {"path": str, "split": str, "validation_split": (str, type(None))})
    return training


def _read_mapping(file: Path, parse: Callable, what: str) -> dict:
    try:
        value = parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {str(file)!r}: {error.strerror}.") from None
    except (ValueError, yaml.YAMLError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{str(file)!r} is not {what}.")
    return value


def _check_kinds(file: Path, values: dict, kinds: dict) -> None:
    for name, kind in kinds.items():
        if name in values and not isinstance(values[name], kind):
            raise UserError(f"{str(file)!r}: {name} is {values[name]!r}.")


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
        return Facts(folder, True, None, configs, index)
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        if config.get("_class_name") not in AUTOENCODERS:
            kinds = " or ".join(AUTOENCODERS)
            raise ModelError(f"{str(folder)!r} holds a {config.get('_class_name')}, not a {kinds} or a pipeline.")
        return Facts(folder, False, None, {"vqvae": config}, {})
    result = next((folder / name for name in ("pipeline", "model") if (folder / name).is_dir()), None)
    hint = "" if result is None else f"; give {str(result)!r}"
    raise ModelError(f"no model in {str(folder)!r}: it holds neither a model_index.json nor a config.json{hint}.")


def _measurement(file: Path, record: dict, data: str | None, split: str | None) -> Measurement:
    figures = {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in CIRCUMSTANCES
    }
    _check_kinds(file, record, dict.fromkeys(CIRCUMSTANCES, (int, float)))
    for name, value in figures.items():
        if not math.isfinite(value):
            raise UserError(f"{str(file)!r}: {name} is {value}.")
    measurement = Measurement(figures, record, data, split)
    needed = ("images",) if measurement.is_reconstruction else ("images_first",)
    missing = [name for name in (*needed, "bits_per_pixel") if name not in record]
    if missing:
        raise UserError(f"{str(file)!r} states no {missing[0]}: figures without it cannot be compared.")
    return measurement


def _read_metrics(files: Sequence[Path | str], facts: Facts) -> Iterator[Measurement]:
    for file in map(Path, files):
        record = read_json(file)
        if "command" not in record or "protocol" not in record:
            raise UserError(f"{str(file)!r} holds no figures that `looc-ldm evaluate ... --output FILE` wrote.")
        _check_kinds(file, record, {"data": (str, type(None)), "split": (str, type(None))})
        measurement = _measurement(file, record, shareable(record.get("data")), record.get("split"))
        if not facts.is_pipeline and not measurement.is_reconstruction:
            raise UserError(f"{str(file)!r} holds figures of samples: they belong to a pipeline.")
        if "fingerprints" not in record:
            raise UserError(f"{str(file)!r} does not say of which model the figures are: measure them again.")
        if record["fingerprints"] != stored_fingerprints(facts.folder, not measurement.is_reconstruction):
            raise UserError(f"{str(file)!r} holds figures of another model than {str(facts.folder)!r}: measure again.")
        yield measurement


def _training_of_first_stage(facts: Facts, settings: dict) -> tuple[Path | None, dict]:
    """The training.json of a pipeline's first stage, if its weights are still the same, and what is in it."""
    name = settings.get("autoencoder")
    weights = "diffusion_pytorch_model.safetensors"
    if not name or not (facts.folder / "vqvae" / weights).is_file():
        return None, {}
    for base in (Path.cwd(), *facts.run_folder.parents):
        first_stage = base / name
        if not ((first_stage / weights).is_file() and (first_stage / "training.json").is_file()):
            continue
        if _digest(first_stage / weights) == _digest(facts.folder / "vqvae" / weights):
            return first_stage / "training.json", read_training(first_stage / "training.json")
    return None, {}


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _picture(facts: Facts, samples: Path | str | None) -> tuple[Path | None, str]:
    if samples is not None:
        samples = Path(samples)
        if not samples.is_file() or samples.suffix.lower() not in IMAGES:
            raise UserError(f"--samples {str(samples)!r} must be an image file ({', '.join(IMAGES)}).")
        return samples, ""
    files = [] if facts.run_folder is None else (facts.run_folder / "previews").glob("*.png")
    previews = [file for file in files if file.stem.isdecimal()]
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
