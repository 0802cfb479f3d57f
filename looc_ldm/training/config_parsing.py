"""Parse settings from the command line and YAML."""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

from looc_ldm import configs
from looc_ldm.utils.errors import ConfigError, one_line

T = TypeVar("T")

# Settings of earlier versions that stored configs may still contain, with the only value that is accepted.
WITHDRAWN = {
    "data.validation_labels": None,
    "loss.adversarial_ramp_images": 0,
    "loss.lecam_weight": 0.0,
    "model.contrastive_weight": 0.0,
    "model.revive_first_batch_only": False,
}


def parse_config(config_class: type[T], arguments: list[str], prog: str) -> T:
    """Return the config that command-line arguments describe: `--config NAME_OR_FILE` and dotted flags, in their order.

    Raises:
        ConfigError: One line that names the wrong setting and what is allowed, or the nearest known name.
        SystemExit: After `--help`.
    """
    parser = ArgumentParser(
        prog=prog,
        description=inspect.getdoc(config_class).splitlines()[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="Name of a bundled config, or a YAML file.")
    parser.add_class_arguments(config_class)
    try:
        config = parser.instantiate(parser.parse_args(_prepare(config_class, arguments)))
    except argparse.ArgumentError as error:
        raise ConfigError(_one_line(error)) from None
    values = {f.name: _unrestricted(getattr(config, f.name)) for f in fields(config_class)}
    return config_class(**values)


def parse_command_line(config_class: type[T], arguments: list[str], prog: str) -> T:
    """Parse as `parse_config`, but require `--config`: the defaults alone do not describe a useful run."""
    config = parse_config(config_class, arguments, prog)
    if not any(argument.split("=")[0] == "--config" for argument in arguments):
        raise ConfigError(f"--config is required: a YAML file, or one of {', '.join(configs.names())}.")
    return config


def load_config(config_class: type[T], name: str, **overrides) -> T:
    """Return the bundled config `name` (such as `fashion_mnist/autoencoder`) or the YAML file `name`.

    Overrides are dotted names with `.` written as `__`: `load_config(C, "x.yaml", data__path="images")`.
    """
    flags = [f"--{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return parse_config(config_class, ["--config", name, *flags], prog="looc-ldm")


def to_dict(config) -> dict:
    """Return the config as nested dicts and lists of plain values, ready for YAML and JSON."""
    return _plain(asdict(config))


def config_text(config) -> str:
    """Return the resolved config as YAML, which `--config` reads."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def construct(cls, arguments: dict[str, Any], what: str):
    """Return `cls(**arguments)` after a check of the names. Lists become tuples, as in diffusers' configs.

    Raises:
        ConfigError: The constructor does not have an argument (the message names the nearest one), or rejects it.
    """
    known = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs")]
    for name in arguments:
        if name not in known:
            raise ConfigError(f"{what} has no argument {name!r}{_nearest(name, known)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    try:
        return cls(**values)
    except Exception as error:  # any exception of a constructor means that its arguments are wrong
        raise ConfigError(f"{what}: {one_line(error)}") from error


def read_settings(file: Path) -> dict:
    """Read a config file, without withdrawn settings.

    Raises:
        ConfigError: The file is not a YAML mapping, or a withdrawn setting differs from the only value that remains.
    """
    try:
        settings = yaml.safe_load(file.read_bytes())  # UTF-8 or UTF-16, with or without a mark
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config {str(file)!r}, YAML in UTF-8: {one_line(error)}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"the config {str(file)!r} is not a YAML mapping of settings.")
    for name, only in WITHDRAWN.items():
        section, key = name.split(".")
        if isinstance(settings.get(section), dict) and key in settings[section]:
            value = settings[section].pop(key)
            if value != only:
                raise ConfigError(f"{str(file)!r}: {name}={value!r} was withdrawn; only {only!r} is accepted.")
    return settings


def _prepare(config_class: type, arguments: list[str]) -> list[str]:
    """Check the names of settings in flags and files. Replace hyphens by underscores, and files by their content."""
    prepared, after_config = [], False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if after_config:
            argument = _read_config(config_class, argument)
        elif argument.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
            if flag == "--config":
                value = _read_config(config_class, value) if equals else value
            elif flag not in ("--help", "--print_config"):
                _refuse_unknown(config_class, flag[2:])
            argument = flag + equals + value
        after_config = argument == "--config"
        prepared.append(argument)
    return prepared


def _read_config(config_class: type, name: str) -> str:
    """Return the YAML of a bundled config or a file, without withdrawn settings, with known names only."""
    file = Path(name)
    if not file.is_file():
        if name not in configs.names():
            raise ConfigError(f"no config {name!r}: not a file, and not one of {', '.join(configs.names())}.")
        file = configs.path(name)
    settings = read_settings(file)
    defaults = to_dict(config_class())
    for group, default in defaults.items():
        if isinstance(default, dict) and not isinstance(settings.get(group, {}), dict):
            raise ConfigError(f"{group} must be a mapping of settings in {str(file)!r}, got {settings[group]!r}.")
    defaults = flatten(defaults)
    for name, value in flatten(settings).items():
        _refuse_unknown(config_class, name)
        if value is None and defaults.get(name) is not None:
            raise ConfigError(f"{name} has no value in {str(file)!r}.")
    return yaml.safe_dump(settings)


def _refuse_unknown(config_class: type, name: str) -> None:
    known = _setting_names(config_class)
    section = name.split(".")[0]
    free = section in known and isinstance(getattr(config_class(), section), dict)  # a constructor's arguments
    if name not in known and not free:
        raise ConfigError(f"unknown setting {name!r}{_nearest(name, known)}")


def _one_line(error: Exception) -> str:
    """Return a parser's message on one line, without its remarks on the other types of a setting."""
    noise = ("Does not validate", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value type:")
    lines = [line.strip(" -") for line in str(error).splitlines()]
    message = " ".join(line for line in lines if not line.startswith(noise))
    return message.replace("typing.", "").replace("<class 'bool'>", "bool")


def _unrestricted(value):
    """Convert the parser's restricted types to plain numbers and strings, which YAML and pickle support.

    In strings, a leading `~` is replaced by the path of the user's home folder.
    """
    if is_dataclass(value):
        return replace(value, **{f.name: _unrestricted(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, tuple):
        return tuple(map(_unrestricted, value))
    if isinstance(value, str):
        return os.path.expanduser(str(value))
    return next((kind(value) for kind in (bool, int, float) if isinstance(value, kind)), value)


def _setting_names(config_class: type) -> list[str]:
    names = []
    for name, value in asdict(config_class()).items():
        names += [name, *(f"{name}.{inner}" for inner in value)] if isinstance(value, dict) else [name]
    return names


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}."


def flatten(values: dict, prefix: str = "") -> dict:
    """Return nested settings as one dict of dotted names."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _plain(value):
    """Turn tuples, at any depth, into lists."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
