"""Options of a command, defined by one frozen dataclass: its types are checked, its docstring is the help.

A field without a default is required. `positional()` fields are typed without a name, fields of type list take several
values, bool fields are switches. Each base class is a group in the help.
"""

from __future__ import annotations

import inspect
import re
import shlex
import types
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt, restricted_number_type

from looc_ldm.utils.errors import UserError

Dtype = Literal["float32", "bfloat16", "float16"]
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])

T = TypeVar("T", bound="Options")


def positional(metavar: str) -> dict[str, Any]:
    """Return the metadata of a field that is typed without a name, shown as `metavar`."""
    return {"metavar": metavar, "positional": True}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of any command."""

    command_line: str = ""  # as typed, for records; it has no help and so is no option itself


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Device

    Args:
        device: cpu, cuda, cuda:1, mps, ... If not given, the best there is.
    """

    device: str | None = None


@dataclass(frozen=True, kw_only=True)
class CacheLatents(DeviceOptions):
    """Encode a data set once, for stage 2.

    After an interruption the same command goes on. On several GPUs: accelerate launch -m looc_ldm.training.latents,
    with the same options.

    Args:
        config: Diffusion config: name or file.
        autoencoder: Folder or hub id of the first stage, or starter. If not given, the config's.
        data: Bundled name, folder of images, parquet files, WebDataset shards or LSUN's LMDBs, or hub id. If not given,
            the config's.
        output: Folder. If not given, the config's `latents`, or latents in its output_dir.
        batch_size: Images that a process encodes at a time. If not given, by device and resolution.
    """

    config: str
    autoencoder: str | None = None
    data: str | None = None
    output: str | None = None
    batch_size: PositiveInt | None = None


def parse_options(options_class: type[T], arguments: list[str], prog: str) -> T:
    """Return the options that arguments describe; hyphens and underscores in their names are equal.

    `~/` becomes the home folder in every value, also behind `--name=`, where shells leave it.

    Raises:
        UserError: One line that names the wrong argument and what is allowed.
        SystemExit: After `--help`.
    """
    arguments = list(arguments)
    hyphened = [re.sub("^--[^=]+", lambda name: name.group().replace("_", "-"), argument) for argument in arguments]
    expanded = [re.sub("^(--[^=]+=)?~(?=/)", rf"\g<1>{Path.home()}", argument) for argument in hyphened]
    values = make_parser(options_class, prog).parse_args(expanded).as_dict()
    return options_class(command_line=shlex.join([*prog.split(), *arguments]), **values)


def make_parser(options_class: type[Options], prog: str) -> ArgumentParser:
    """Return the parser of a command."""
    docs = {part: docstring_parser.parse(inspect.getdoc(part)) for part in options_class.__mro__ if part is not object}
    explained = {param.arg_name: (part, param) for part in reversed(docs) for param in docs[part].params}
    own = docs[options_class]
    description = "\n\n".join(filter(None, (own.short_description, own.long_description)))
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    groups = {own.short_description: parser}
    for doc in docs.values():
        if doc.params and doc.short_description not in groups:
            group = parser.add_argument_group(doc.short_description, doc.long_description)
            groups[doc.short_description] = group
    hints = get_type_hints(options_class)
    for item in fields(options_class):
        if item.name in explained:
            part, param = explained[item.name]
            group = parser if item.metadata.get("positional") else groups[docs[part].short_description]
            _add_argument(group, item, hints[item.name], " ".join(param.description.split()))
    return parser


def _add_argument(group, item: Field, hint: Any, help: str) -> None:
    names = ["--" + name.replace("_", "-") for name in (item.name, *item.metadata.get("aliases", ()))]
    if get_origin(hint) in (Union, types.UnionType):  # X | None: not given
        hint = next(part for part in get_args(hint) if part is not types.NoneType)
    settings: dict[str, Any] = {"help": help, "type": hint}
    if get_origin(hint) is list:
        settings |= {"type": get_args(hint)[0], "nargs": "+"}
    if item.metadata.get("positional"):
        names = [item.name]
        settings["metavar"] = item.metadata["metavar"]
    elif hint is bool:
        settings = {"help": help, "action": "store_true"}
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
        raise UserError(f"{message} (see {self.prog} --help)")

    def format_help(self) -> str:
        return re.sub(r"<class\s+'Path'>", "Path", super().format_help())
