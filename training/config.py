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
        path: A bundled set (`fashion_mnist`), a folder of images (one sub-folder a class, or none), a folder of parquet
            files, or the id of a data set on the hub.
        split: The split to train on. Sub-folders named train, val, validation or test are splits; a folder without
            them is all `train`.
        validation_split: The split to measure on; if not given, `validation_images` of the training split are held out.
        validation_images: Images measured during and after training.
        image_column: The column that holds the image.
        label_column: The column that holds the class; if the data has none, there are no classes.
        resolution: Side in pixels of the square images the networks see.
        fit: How an image becomes square. `crop`: the shorter side is resized, then the centre is cropped. `pad`: an
            image that is smaller than the resolution is put in the centre of a black one.
        flip: Mirror every second image, at random. Training only.
        num_workers: Processes that load images, for each training process.
    """

    path: str = "fashion_mnist"
    split: str = "train"
    validation_split: str | None = None
    validation_images: int = 1000
    image_column: str = "image"
    label_column: str = "label"
    resolution: int = 256
    fit: Literal["crop", "pad"] = "crop"
    flip: bool = True
    num_workers: int = 4


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
        mixed_precision: `auto` is bf16 where the hardware computes in it, else `no`.
        channels_last: Keep convolution weights in the layout that is faster on most hardware.
        ema_halflife_images: Images after which a weight counts half in the average; it rises with 5 % of the images
            seen, so that early averages follow.
        log_every_images: Interval of log lines.
        preview_every_images: Interval of image grids.
        checkpoint_every_images: Interval of checkpoints; one more is written at the end.
        keep_checkpoints: Newest checkpoints that are kept.
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
    ema_halflife_images: int = 100_000
    log_every_images: int = 10_000
    preview_every_images: int = 100_000
    checkpoint_every_images: int = 100_000
    keep_checkpoints: int = 2
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"


# Settings that may differ when a run is resumed: the length of the run, and how it is reported.
RESUMABLE = {
    "total_images",
    "log_every_images",
    "preview_every_images",
    "checkpoint_every_images",
    "keep_checkpoints",
    "tracker",
    "data.num_workers",
    "output_dir",
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
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=dict)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class DiffusionConfig(RunConfig):
    """Stage 2: a UNet on the latents of a trained `LooCVQModel`.

    Args:
        autoencoder: Folder or hub id of the first stage, or of a pipeline that holds one. If not given, that of
            `init_from`.
        data: The images.
        latents: Folder of the cached latents; made before training where it does not hold them yet.
        latent_scaling: How latents are brought to unit variance. `scalar`: by the first stage's `scaling_factor`,
            measured where it has none. `channel`: each channel by its own mean and deviation over the training images;
            diffusers' LDMPipeline does not know these.
        class_conditional: Train with the labels of the data.
        class_dropout: Share of images, drawn one by one, whose label is replaced by the null class, which
            classifier-free guidance needs. 0 leaves the null class out.
        unet: `type`, one of `UNet2DModel`, `UNet2DConditionModel` and `FixedHeadsUNet2DModel`, and the arguments of its
            constructor. What the data decides (`sample_size`, channels, `num_class_embeds`) is filled in.
        class_embedding_dim: Channels of the learned class token that a `UNet2DConditionModel` attends to.
        scheduler: `type`, the scheduler saved with the pipeline, and its arguments, the noise schedule and
            `prediction_type` (`epsilon` or `v_prediction`) among them.
        loss: `l2` or `l1` between the prediction and its target.
        optimizer: Of the UNet.
        preview_steps: Denoising steps of the sample grids.
        preview_guidance_scale: Their guidance scale, on conditional models with a null class.
    """

    autoencoder: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    latents: str | None = None
    latent_scaling: Literal["scalar", "channel"] = "scalar"
    class_conditional: bool = False
    class_dropout: float = 0.1
    unet: dict[str, Any] = field(default_factory=dict)
    class_embedding_dim: int | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)
    loss: Literal["l1", "l2"] = "l2"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
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
    positive = ("total_images", "batch_size", "gradient_accumulation_steps", "keep_checkpoints", "ema_halflife_images")
    intervals = ("log_every_images", "preview_every_images", "checkpoint_every_images")
    for name in (*positive, *intervals):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(config, name)}.")
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed must be in [0, 2**32), got {config.seed}.")
    for name, least in (("resolution", 1), ("validation_images", 1), ("num_workers", 0)):
        if getattr(config.data, name) < least:
            raise ConfigError(f"data.{name} must be at least {least}, got {getattr(config.data, name)}.")
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
    if isinstance(config, DiffusionConfig):
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
    names = [name for name in {**old, **new} if name not in RESUMABLE and old.get(name) != new.get(name)]
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
    """Replace names of bundled configs by their files."""
    resolved, after_flag = [], False
    for argument in arguments:
        if after_flag:
            argument = str(find_config_file(argument))
        elif argument.startswith("--config="):
            argument = f"--config={find_config_file(argument.removeprefix('--config='))}"
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
