"""Settings of a run: typed dataclasses, filled from YAML, overridden by dotted flags.

The dataclasses are the only definition of a setting. Models and schedulers are given as the arguments of their
constructors, which are checked against the constructor's own signature. Amounts of training are counted in images.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from looc_ldm import configs
from looc_ldm.errors import ConfigError

T = TypeVar("T")


@dataclass
class DataConfig:
    """Where the images come from and how they are brought to one size.

    Args:
        path: A bundled set (`fashion_mnist`), a folder of images (one sub-folder per class, or none), of parquet files,
            of WebDataset shards (.tar) or of LSUN's LMDBs, or the id of a data set on the hub.
        split: The split to train on. Sub-folders named train, val, validation or test are splits; a folder without
            them is all `train`.
        validation_split: The split to measure on; if not given, `validation_images` of the training split are held out.
        validation_images: Images measured during and after training.
        image_column: The column that holds the image.
        label_column: The column that holds the class; if the data has none, there are no classes.
        num_classes: Number of classes where the label column holds numbers without names.
        streaming: Read parquet files, WebDataset shards or a hub data set as they come, without preparing them on the
            disk first. Needs a `validation_split`.
        shuffle_images: Images of a shard that are shuffled together when streaming; shards are shuffled, too.
        resolution: Side in pixels of the square images the networks see.
        fit: How an image becomes square. `crop`: the shorter side is resized (Lanczos), then the centre is cropped.
            `random_crop`: the same, cropped at a random place in training and at the centre elsewhere. `adm`: halved by
            box filters while the shorter side is at least twice the resolution, resized (bicubic), cropped at the
            centre.
            `pad`: an image that is smaller than the resolution is put in the centre of a black one.
        flip: Mirror every second image, at random. Training only.
        num_workers: Processes that load images, for each training process.
        max_unreadable_share: Share of the images that may be unreadable. They are named in `unreadable.txt` and
            skipped; when there are more, the run stops.
    """

    path: str = "fashion_mnist"
    split: str = "train"
    validation_split: str | None = None
    validation_images: int = 1000
    image_column: str = "image"
    label_column: str = "label"
    num_classes: int | None = None
    streaming: bool = False
    shuffle_images: int = 4096
    resolution: int = 256
    fit: Literal["crop", "random_crop", "adm", "pad"] = "crop"
    flip: bool = True
    num_workers: int = 4
    max_unreadable_share: float = 0.001


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate, counted in images so that another batch size keeps the schedule.

    Args:
        learning_rate: Peak learning rate, for the batch size of the config (not scaled).
        betas: Decay of the two moments.
        weight_decay: Decoupled weight decay.
        schedule: `constant`, or `cosine` from the end of the warm-up to 0 at the last image.
        warmup_images: Images over which the rate rises from 0.
        max_grad_norm: Norm that gradients are clipped to; 0 does not clip.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_images: int = 0
    max_grad_norm: float = 1.0


@dataclass
class EvaluationConfig:
    """Measuring while training runs. Figures go to the log with the prefix `val_`.

    Args:
        every_images: Interval; not at all if not given.
        images: Held-out images that are reconstructed (stage 1), or samples that are drawn (stage 2).
        fid: Measure rFID (stage 1, between the images and their reconstructions) or FID (stage 2, between the samples
            and the training images). Needs at least 2 images.
        inception_weights: File of torch-fidelity's Inception network; if not given, torch-fidelity downloads it.
        feature_layer: Its features; only 2048 compares with published figures.
    """

    every_images: int | None = None
    images: int = 1000
    fid: bool = False
    inception_weights: str | None = None
    feature_layer: Literal[64, 192, 768, 2048] = 2048


@dataclass
class RunConfig:
    """What both stages share.

    Args:
        output_dir: Folder of checkpoints, logs, grids and the final model.
        init_from: Folder or hub id of a finished model of this stage to start from, instead of random weights. The
            networks are those of that model.
        seed: Seed of initial weights and of all randomness in training.
        total_images: Images to train on, repeats counted.
        batch_size: Images per optimizer step, over all processes and accumulation steps.
        gradient_accumulation_steps: Forward passes per optimizer step.
        mixed_precision: `auto` is bf16 where the hardware computes in it, else `no`. A run keeps to what that was.
        channels_last: Keep the trained network's convolution weights in the layout that is faster on most hardware.
        compile: Compile the trained network with `torch.compile`; the first steps take minutes.
        gradient_checkpointing: Compute activations anew in the backward pass: less memory, about a third more time.
        ema_halflife_images: Images after which a weight counts half in the average; it rises with 5 % of the images
            seen, so that early averages follow.
        log_every_images: Interval of log lines.
        preview_every_images: Interval of image grids.
        checkpoint_every_images: Interval of checkpoints; one more is written at the end.
        keep_last: Newest checkpoints that are kept.
        keep_every_images: Interval of checkpoints that are kept for good, a multiple of `checkpoint_every_images`.
        max_skipped_steps: Steps in a row that may be skipped because a gradient is not finite; one more stops the run.
        push_to_hub: Repository (`user/name`) that the averaged model is uploaded to at every checkpoint, in the
            background. A failing upload is logged and does not stop the run.
        push_private: Make that repository a private one.
        tracker: Where scalars and grids go besides the run's folder: `tensorboard`, `wandb` or `none`.
    """

    output_dir: str = "runs/looc-ldm"
    init_from: str | None = None
    seed: int = 0
    total_images: int = 1_000_000
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    channels_last: bool = True
    compile: bool = False
    gradient_checkpointing: bool = False
    ema_halflife_images: int = 100_000
    log_every_images: int = 10_000
    preview_every_images: int = 100_000
    checkpoint_every_images: int = 100_000
    keep_last: int = 2
    keep_every_images: int | None = None
    max_skipped_steps: int = 10
    push_to_hub: str | None = None
    push_private: bool = True
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"


# Settings that may differ when a run is resumed: the length of the run, and how it is reported.
RESUMABLE = {
    "mixed_precision",  # `auto` may become the value that it stood for; checkpoints are compared by that
    "total_images",
    "log_every_images",
    "preview_every_images",
    "checkpoint_every_images",
    "keep_last",
    "keep_every_images",
    "max_skipped_steps",
    "push_to_hub",
    "push_private",
    "tracker",
    "data.num_workers",
    "data.max_unreadable_share",
    "evaluation.every_images",
    "evaluation.images",
    "evaluation.fid",
    "evaluation.inception_weights",
    "evaluation.feature_layer",
    "preview_steps",
    "preview_guidance_scale",
    "output_dir",
    "latents",  # which are compared with the autoencoder and the data
}
# Settings that say where something lies, which may have moved since.
MOVABLE = {"data.path", "autoencoder", "loss.lpips_weights"}
# Settings of earlier versions that stored configs hold, with the value that is now the only one.
WITHDRAWN = {
    "data.validation_labels": None,
    "loss.adversarial_ramp_images": 0,
    "loss.lecam_weight": 0.0,
    "model.contrastive_weight": 0.0,
    "model.revive_first_batch_only": False,
}


@dataclass
class LossConfig:
    """Terms of the autoencoder's loss (VQGAN, taming-transformers).

    Args:
        reconstruction: `l1` or `l2`, on images in [-1, 1].
        reconstruction_weight: Its weight.
        quantizer_weight: Weight of the codebook and commitment terms.
        lpips_weight: Weight of the perceptual term; 0 leaves it out.
        lpips_network: `vgg` or `alex`.
        lpips_weights: Local file (.safetensors or .pth, torchvision's names) of that network's convolutions; if not
            given, torchvision downloads them.
        adversarial_weight: Weight of the PatchGAN term; 0 leaves it out.
        adversarial_start_images: Images seen before the PatchGAN counts; it is not trained before that.
        adaptive_weight: Scale the PatchGAN term so that its gradient at the last layer is as large as the
            reconstruction's.
        discriminator_channels: Channels of the PatchGAN's first layer.
        discriminator_layers: Its strided layers; 3 see patches of 70x70 pixels.
    """

    reconstruction: Literal["l1", "l2"] = "l1"
    reconstruction_weight: float = 1.0
    quantizer_weight: float = 1.0
    lpips_weight: float = 0.0
    lpips_network: Literal["vgg", "alex"] = "vgg"
    lpips_weights: str | None = None
    adversarial_weight: float = 0.0
    adversarial_start_images: int = 0
    adaptive_weight: bool = True
    discriminator_channels: int = 64
    discriminator_layers: int = 3


@dataclass
class AutoencoderConfig(RunConfig):
    """Stage 1: a `LooCVQModel`.

    Args:
        data: The images.
        model: Arguments of `LooCVQModel`.
        loss: Terms of the loss.
        optimizer: Of the autoencoder, and with the same settings of the PatchGAN.
        evaluation: Measuring while it runs.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=dict)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass
class DiffusionConfig(RunConfig):
    """Stage 2: a UNet on the latents of a trained `LooCVQModel`.

    Args:
        autoencoder: Folder or hub id of the first stage, or of a pipeline that holds one. If not given, that of
            `init_from`.
        data: The images.
        cache_latents: Encode all images once, before training. Otherwise they are encoded in the loop, which data that
            is streamed or cropped at random needs.
        latents: Folder of the cached latents; made before training where it does not hold them yet.
        latent_scaling: How latents are brought to unit variance. `scalar`: by the first stage's `scaling_factor`,
            measured where it has none. `channel`: each channel by its own mean and deviation over the training images;
            diffusers' LDMPipeline does not know these.
        class_conditional: Train with the labels of the data.
        class_dropout: Share of images, drawn one by one, whose label is replaced by the null class, which
            classifier-free guidance needs. 0 leaves the null class out.
        unet: `type`, one of `UNet2DModel`, `UNet2DConditionModel` and `FixedHeadsUNet2DModel`, and the arguments of its
            constructor. What the data decides (`sample_size`, channels, `num_class_embeds`) is filled in, and refused
            where the config says something else.
        class_embedding_dim: Channels of the learned class token that a `UNet2DConditionModel` attends to.
        scheduler: `type`, the scheduler saved with the pipeline, and its arguments, the noise schedule and
            `prediction_type` (`epsilon`, `v_prediction` or `sample`) among them. `FlowMatchEulerDiscreteScheduler` is
            flow matching. `rescale_betas_zero_snr` is for `v_prediction` and `sample`.
        loss: `l2` or `l1` between the prediction and its target.
        loss_weighting: `min_snr` weighs timesteps by min(SNR, gamma), as a loss on the latents; not for flow matching.
        min_snr_gamma: Its gamma.
        timestep_sampling: `uniform`, or `logit_normal` (the logistic function of a standard normal variable, as a share
            of the timesteps), which is usual for flow matching.
        optimizer: Of the UNet.
        evaluation: Measuring while it runs.
        preview_steps: Denoising steps of the sample grids.
        preview_guidance_scale: Their guidance scale, on conditional models with a null class.
    """

    autoencoder: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    cache_latents: bool = True
    latents: str | None = None
    latent_scaling: Literal["scalar", "channel"] = "scalar"
    class_conditional: bool = False
    class_dropout: float = 0.1
    unet: dict[str, Any] = field(default_factory=dict)
    class_embedding_dim: int | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)
    loss: Literal["l1", "l2"] = "l2"
    loss_weighting: Literal["uniform", "min_snr"] = "uniform"
    min_snr_gamma: float = 5.0
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    preview_steps: int = 50
    preview_guidance_scale: float = 1.0


def parse_config(config_class: type[T], arguments: list[str], prog: str) -> T:
    """The config that command-line arguments describe: `--config NAME_OR_FILE` and dotted flags, in their order.

    Raises:
        ConfigError: One line that names the wrong setting and what is allowed, or the nearest known name.
        SystemExit: After `--help`.
    """
    parser = _make_parser(config_class, prog)
    try:
        namespace = parser.parse_args(_with_config_files(_with_underscores(arguments)))
        config = parser.instantiate(namespace)
    except argparse.ArgumentError as error:
        raise ConfigError(_one_line(error, config_class)) from None
    values = {f.name: getattr(config, f.name) for f in fields(config_class)}
    return check_config(config_class(**values))


def parse_command_line(config_class: type[T], arguments: list[str], prog: str) -> T:
    """`parse_config`, where `--config` must be given: the defaults alone describe no run that anybody wants."""
    config = parse_config(config_class, arguments, prog)
    if not any(argument.split("=")[0] == "--config" for argument in arguments):
        raise ConfigError(f"--config is required: a YAML file, or one of {', '.join(configs.names())}.")
    return config


def load_config(config_class: type[T], name: str, **overrides) -> T:
    """The bundled config `name` (such as `fashion_mnist/autoencoder`) or the YAML file `name`.

    Overrides are dotted names with `.` written as `__`: `load_config(C, "x.yaml", data__path="images")`.
    """
    flags = [f"--{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return parse_config(config_class, ["--config", name, *flags], prog="looc-ldm")


def check_config(config: T) -> T:
    """Refuse values that no run could use. Returns the config."""
    positive = ("total_images", "batch_size", "gradient_accumulation_steps", "keep_last", "ema_halflife_images")
    intervals = ("log_every_images", "preview_every_images", "checkpoint_every_images")
    for name in (*positive, *intervals):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(config, name)}.")
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed must be in [0, 2**32), got {config.seed}.")
    if config.keep_every_images is not None and (
        config.keep_every_images < 1 or config.keep_every_images % config.checkpoint_every_images
    ):
        raise ConfigError(
            f"keep_every_images must be a multiple of checkpoint_every_images={config.checkpoint_every_images}, "
            f"got {config.keep_every_images}."
        )
    if config.max_skipped_steps < 0:
        raise ConfigError(f"max_skipped_steps must not be negative, got {config.max_skipped_steps}.")
    if config.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", config.push_to_hub):
        raise ConfigError(f"push_to_hub must be a repository (user/name), got {config.push_to_hub!r}.")
    least = {"resolution": 1, "validation_images": 1, "num_workers": 0, "shuffle_images": 1, "num_classes": 2}
    for name, minimum in least.items():
        value = getattr(config.data, name)
        if value is not None and value < minimum:
            raise ConfigError(f"data.{name} must be at least {minimum}, got {value}.")
    if not 0 <= config.data.max_unreadable_share <= 1:
        raise ConfigError(f"data.max_unreadable_share must be in [0, 1], got {config.data.max_unreadable_share}.")
    evaluation = config.evaluation
    for name, minimum in (("every_images", 1), ("images", 2 if evaluation.fid else 1)):
        value = getattr(evaluation, name)
        if value is not None and value < minimum:
            raise ConfigError(f"evaluation.{name} must be at least {minimum}, got {value}.")
    optimizer = config.optimizer
    if not optimizer.learning_rate > 0:
        raise ConfigError(f"optimizer.learning_rate must be above 0, got {optimizer.learning_rate}.")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ConfigError(f"optimizer.betas must be in [0, 1), got {list(optimizer.betas)}.")
    for name in ("weight_decay", "warmup_images", "max_grad_norm"):
        if getattr(optimizer, name) < 0:
            raise ConfigError(f"optimizer.{name} must not be negative, got {getattr(optimizer, name)}.")
    if config.batch_size % config.gradient_accumulation_steps:
        raise ConfigError(
            f"batch_size={config.batch_size} must be a multiple of "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}."
        )
    if isinstance(config, AutoencoderConfig) and config.loss.adversarial_start_images < 0:
        start = config.loss.adversarial_start_images
        raise ConfigError(f"loss.adversarial_start_images must not be negative, got {start}.")
    if isinstance(config, DiffusionConfig):
        if not config.min_snr_gamma > 0:
            raise ConfigError(f"min_snr_gamma must be above 0, got {config.min_snr_gamma}.")
        if config.cache_latents and (config.data.streaming or config.data.fit == "random_crop"):
            raise ConfigError("cache_latents must be false for data that is streamed or cropped at random.")
        if not 0 <= config.class_dropout < 1:
            raise ConfigError(f"class_dropout must be in [0, 1), got {config.class_dropout}.")
        num_timesteps = config.scheduler.get("num_train_timesteps", 1000)
        if not 1 <= config.preview_steps <= num_timesteps:
            raise ConfigError(f"preview_steps must be in [1, {num_timesteps}], got {config.preview_steps}.")
    if config.tracker == "wandb" and find_spec("wandb") is None:
        raise ConfigError("tracker=wandb needs the package wandb: pip install wandb.")
    return config


def to_dict(config) -> dict:
    """The config as plain values, as YAML and JSON hold them."""
    return _plain(asdict(config))


def config_text(config) -> str:
    """The resolved config as YAML, which `--config` reads."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(old: dict, new: dict) -> list[str]:
    """Settings that differ and may not differ when a run is resumed, each as `name: old -> new`."""
    old, new = _flatten(old), _flatten(new)
    names = [name for name in {**old, **new} if name not in RESUMABLE | MOVABLE and old.get(name) != new.get(name)]
    return [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names]


def moves(old: dict, new: dict) -> list[str]:
    """Settings that say where something lies, and say now that it lies elsewhere, each as `name: old -> new`."""
    old, new = _flatten(old), _flatten(new)
    names = [name for name in {**old, **new} if name in MOVABLE and old.get(name) != new.get(name)]
    return [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names]


def construct(cls, arguments: dict[str, Any], what: str):
    """`cls(**arguments)` after a check of the names; lists become tuples as diffusers' configs have them.

    Raises:
        ConfigError: An argument that the constructor does not have, with the nearest one that it has.
    """
    known = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs")]
    for name in arguments:
        if name not in known:
            raise ConfigError(f"{what} has no argument {name!r}{_nearest(name, known)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{what}: {' '.join(str(error).split())}") from error


def read_settings(file: Path) -> dict:
    """Read a config file, without withdrawn settings.

    Raises:
        ConfigError: It is not a YAML mapping, or a withdrawn setting has another value than the one that remains.
    """
    try:
        settings = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config {str(file)!r}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"the config {str(file)!r} is not a YAML mapping of settings.")
    for name, only in WITHDRAWN.items():
        section, key = name.split(".")
        if isinstance(settings.get(section), dict) and key in settings[section]:
            value = settings[section].pop(key)
            if value != only:
                raise ConfigError(
                    f"{file}: {name}={value!r} was withdrawn; only {only!r} is left, which is the default."
                )
    return settings


def find_config_file(name: str) -> Path:
    """The file of a bundled config or of a path. Raises ConfigError where there is none."""
    if Path(name).is_file():
        return Path(name)
    bundled = configs.names()
    if name in bundled:
        return configs.path(name)
    raise ConfigError(f"no config {name!r}: not a file, and not one of {', '.join(bundled)}.")


def _make_parser(config_class: type, prog: str):
    from jsonargparse import ArgumentParser

    summary = inspect.getdoc(config_class).splitlines()[0]
    parser = ArgumentParser(prog=prog, description=summary, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="Name of a bundled config, or a YAML file.")
    parser.add_class_arguments(config_class)
    return parser


def _with_underscores(arguments: list[str]) -> list[str]:
    """`--init-from x` as `--init_from x`: both are understood."""
    return [
        re.sub(r"^--[^=]+", lambda flag: "--" + flag.group()[2:].replace("-", "_"), argument) for argument in arguments
    ]


def _with_config_files(arguments: list[str]) -> list[str]:
    """Replace names of configs and of their files by what is in them."""
    resolved, after_flag = [], False
    for argument in arguments:
        if after_flag:
            argument = yaml.safe_dump(read_settings(find_config_file(argument)))
        elif argument.startswith("--config="):
            file = find_config_file(argument.removeprefix("--config="))
            argument = f"--config={yaml.safe_dump(read_settings(file))}"
        after_flag = argument == "--config"
        resolved.append(argument)
    return resolved


def _one_line(error: Exception, config_class: type) -> str:
    """A parser's message on one line, with the nearest known name where a name is unknown."""
    message = re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(error).split()).replace("typing.", ""))
    unknown = re.search(r"Option '([\w.]+)' is not accepted|[Uu]nrecognized arguments: --([\w.]+)", message)
    nested = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if nested is not None:
        name = f"{nested.group(1)}.{nested.group(2)}"
    elif unknown is not None:
        name = unknown.group(1) or unknown.group(2)
    else:
        return message
    return f"unknown setting {name!r}{_nearest(name, _setting_names(config_class))}"


def _setting_names(config_class: type) -> list[str]:
    names = []
    for name, value in vars(config_class()).items():
        nested = _setting_names(type(value)) if is_dataclass(value) else []
        names += [name, *(f"{name}.{inner}" for inner in nested)]
    return names


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}."


def _flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _plain(value):
    """Tuples, at any depth, as lists."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
