"""Options of a command, defined by one frozen dataclass: a field is an option, and its type is checked.

A field without a default is required. Positional fields are typed without a name, fields of type list take several
values, bool fields are switches. The first line of a base class is the title of its group in the help.
"""

from __future__ import annotations

import inspect
import re
import shlex
import types
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt, restricted_number_type

from looc_ldm.utils.errors import UserError

Dtype = Literal["float32", "bfloat16", "float16"]
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])

Factor = restricted_number_type("Factor", float, [(">", 0), ("<", float("inf"))])

T = TypeVar("T", bound="Options")


def option(help: str, default: Any = MISSING, **metadata: str) -> Any:
    """Return a dataclass field that describes one command-line option.

    Args:
        help: The help; the default is added to it.
        default: The default. Without one the option is required.
        **metadata: Any of these:
            `positional`: the argument is typed without a name; this is its name in the help.
            `alias`: a second name of the option.
            `prefix`: the field is a tuple of flags, which change settings of a config. The user types them as
            `--NAME.KEY VALUE`; this is what stands for KEY in the help.
    """
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of any command."""

    command_line: str = ""  # as typed, for records


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Device"""

    device: str | None = option("cpu, cuda, cuda:1, mps, ... If not given, the best there is.", None)
    threads: PositiveInt | None = option("CPU threads. If not given, PyTorch's, or the fastest in a short test.", None)


@dataclass(frozen=True, kw_only=True)
class CacheLatents(DeviceOptions):
    """Encode a data set once, for stage 2.

    To resume an interrupted run, repeat the command. On several GPUs: accelerate launch -m looc_ldm.training.latents,
    with the same options.
    """

    config: str = option("Diffusion config: name or file.")
    autoencoder: str | None = option("First stage: folder, hub id or bundled name. If not given, the config's.", None)
    data: str | None = option("Bundled name, folder, files or hub id of images. If not given, the config's.", None)
    output: str | None = option("Folder. If not given, the config's `latents`, or latents in its output_dir.", None)
    batch_size: PositiveInt | None = option("Images encoded at a time. If not given, by device and resolution.", None)


@dataclass(frozen=True, kw_only=True)
class InceptionOptions(Options):
    """Inception network"""

    inception_weights: Path | None = option("torch-fidelity's file.", None)
    feature_layer: Literal["64", "192", "768", "2048"] = option("Layer; only 2048 is the published FID.", "2048")


@dataclass(frozen=True, kw_only=True)
class TrainPhotos(InceptionOptions):
    """Train both stages on a folder of photographs within some hours, with a report to look at.

    After an interruption the same command goes on; with more hours, a finished one trains the second stage further.
    Figures that need weights are measured if these are given.
    """

    folder: str = option("Images: a folder, with one sub-folder per class or none.", positional="FOLDER")
    output: Path = option("Folder of all results.")
    resolution: Literal[64, 128, 256] | None = option("Side in pixels. If not given, by device and images.", None)
    hours: Factor = option("Training and evaluation, summed over interruptions.", 2.0)
    classes: Literal["auto", "none"] = option("auto: the sub-folders, if there are any; none: without.", "auto")
    lpips_weights: Path | None = option("torchvision's VGG16. If not given, used if it was downloaded before.", None)
    autoencoder: tuple[str, ...] = option("Setting of `looc-ldm train autoencoder`.", (), prefix="KEY")
    diffusion: tuple[str, ...] = option("Setting of `looc-ldm train diffusion`.", (), prefix="KEY")


def parse_options(options_class: type[T], arguments: list[str], prog: str) -> T:
    """Return the options that arguments describe; hyphens and underscores in their names are equal.

    `~/` becomes the home folder in every value, also behind `--name=`, where shells leave it.

    Raises:
        UserError: One line that names the wrong argument and what is allowed.
        SystemExit: After `--help`.
    """
    arguments, typed = list(arguments), shlex.join([*prog.split(), *arguments])
    arguments, settings = _split_settings(options_class, arguments)
    hyphened = [re.sub("^--[^=]+", lambda name: name.group().replace("_", "-"), argument) for argument in arguments]
    expanded = [re.sub("^(--[^=]+=)?~(?=/)", rf"\g<1>{Path.home()}", argument) for argument in hyphened]
    values = make_parser(options_class, prog).parse_args(expanded).as_dict()
    return options_class(command_line=typed, **{**values, **settings})


def _split_settings(options_class: type, arguments: list[str]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Return the arguments without settings of configs, and these as flags `--KEY=VALUE` by the name of the field."""
    settings: dict[str, tuple] = {item.name: () for item in fields(options_class) if "prefix" in item.metadata}
    others, left = [], iter(arguments)
    for argument in left:
        flag, equals, value = argument.partition("=")
        name, _, key = flag.removeprefix("--").partition(".")
        if not (flag.startswith("--") and key and name in settings):
            others.append(argument)
            continue
        if not equals and (value := next(left, None)) is None:
            raise UserError(f"{flag}: expected a value.")
        settings[name] += (f"--{key.replace('-', '_')}={value}",)
    return others, settings


def make_parser(options_class: type[Options], prog: str) -> ArgumentParser:
    """Return the parser of a command."""
    parser = _Parser(prog=prog, description=inspect.getdoc(options_class), allow_abbrev=False)
    owner = {name: base for base in reversed(options_class.__mro__) for name in vars(base).get("__annotations__", ())}
    groups = {inspect.getdoc(options_class).partition("\n")[0]: parser}
    hints = get_type_hints(options_class)
    for item in fields(options_class):
        if "help" in item.metadata:
            base = options_class if "positional" in item.metadata else owner[item.name]
            title, _, description = inspect.getdoc(base).partition("\n\n")
            if title not in groups:
                groups[title] = parser.add_argument_group(title, description)
            _add_argument(groups[title], item, hints[item.name])
    return parser


def _add_argument(group, item: Field, hint: Any) -> None:
    if get_origin(hint) is types.UnionType:  # X | None: not given
        hint = get_args(hint)[0]
    settings: dict[str, Any] = {"help": item.metadata["help"], "type": hint}
    if get_origin(hint) is list:
        settings |= {"type": get_args(hint)[0], "nargs": "+"}
    if "prefix" in item.metadata:  # for the help: `_split_settings` takes them
        group.add_argument(f"--{item.name}.{item.metadata['prefix']}", metavar="VALUE", help=item.metadata["help"])
        return
    names = ["--" + name.replace("_", "-") for name in (item.name, item.metadata.get("alias")) if name]
    if "positional" in item.metadata:
        names = [item.name]
        settings["metavar"] = item.metadata["positional"]
        if item.default is not MISSING:
            settings |= {"nargs": "?", "default": item.default}
    elif hint is bool:
        settings = {"help": item.metadata["help"], "action": "store_true"}
    else:
        settings |= {"required": True} if item.default is MISSING else {"default": item.default}
    group.add_argument(*names, **settings)


class _Parser(ArgumentParser):
    """A parser that ends at bad arguments as at any other bad input: in one line."""

    def error(self, message: str, ex: Exception | None = None):
        message = " ".join(message.replace("typing.", "").split())
        found = re.match(r'Parser key "(\w+)"(?: element \d+)?: (.*)', message)
        if found:
            message = f"--{found[1].replace('_', '-')}: {found[2]}"
        restricted = re.match(r"(--[\w-]+: )Not of type \w+: (\S+) does not conform to restriction (.+)", message)
        if restricted:
            message = f"{restricted[1]}must be {restricted[3].replace('v', '')}, got {restricted[2]}"
        names = re.match(r"(--[\w-]+: ).*?Literal\[([^]]+)\].* value: (.+)", message)
        if names:
            message = f"{names[1]}must be one of {names[2]}, got {names[3]}"
        raise UserError(f"{message} (see {self.prog} --help)")

    def format_help(self) -> str:
        return re.sub(r"<class\s+'Path'>", "Path", super().format_help())
