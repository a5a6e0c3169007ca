"""Parses a command line and YAML files into the command's frozen config."""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jsonargparse
import yaml

from sso_jax.config.help import help_text, topic_of
from sso_jax.config.null_values import file_with_null, optional_fields, with_null
from sso_jax.config.refusals import refusal
from sso_jax.config.shipped import with_config_files
from sso_jax.config.values import HUB_REMEDY, KEY_REMEDY, require
from sso_jax.runtime.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)
Parsed = TypeVar("Parsed", bound="DataclassInstance")
_KEY_FIELD = re.compile(r"(?:^|[._-])(?:key|token|secret|password|authorization|bearer)$|apikey$", re.IGNORECASE)
"""Field names under which people put an API key into a config."""
_HUB_FIELD = re.compile(r"hub|hf_|hugging", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")
"""A value with a token of the Hugging Face hub in it."""


def without_tokens(text: str) -> str:
    """Returns a text with tokens of the Hugging Face hub struck out, for messages."""
    return _HUB_TOKEN.sub("hf_***", text)


def _fields_of_file(rows: object, prefix: str = "") -> dict[str, object]:
    """Flattens the contents of a YAML file into values by dotted name."""
    if not isinstance(rows, dict):
        return {prefix.rstrip("."): rows}
    return {
        field: value for key, part in rows.items() for field, value in _fields_of_file(part, f"{prefix}{key}.").items()
    }


def _load_config_file(file: str) -> dict[str, Any]:
    """Reads a config file; a missing file, which the parser reports, is empty.

    Raises:
      InputError: for a file that is not YAML with fields.
    """
    if not Path(file).is_file():
        return {}
    try:
        rows: Any = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        fields: dict[str, Any] = rows if isinstance(rows, dict) else {}
        _fields_of_file(fields)  # raises a RecursionError if a value contains itself
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{file}: not valid YAML ({' '.join(str(error).split())[:200]}); fix the file") from error
    if not fields:
        raise InputError(
            f"{file}: {str(rows)[:60]!r} is not a table of fields; give sections with fields, as in configs/tiny.yaml"
        )
    return fields


def _read_config_file(file: str) -> dict[str, object]:
    """Reads the values of a config file by dotted name; see `_load_config_file`."""
    rows = _load_config_file(file)
    return _fields_of_file(rows) if rows else {}


def _check_files(config_class: type, files: list[str]) -> None:
    """Raises `InputError` for a config file that cannot be read, a section without fields, or a field without value."""
    declared = {field.name: field for field in dataclasses.fields(config_class)}
    for file in files:
        for name, value in _read_config_file(file).items():
            section, _, field = name.partition(".")
            default = declared[section].default if section in declared else None
            if dataclasses.is_dataclass(default) and not field:
                raise InputError(f"{file}: {section} is {value!r}; it is a section: give its fields below it")
            if value is None and getattr(default, field, default if not field else None) is not None:
                raise InputError(f"{file}: {name} has no value; give one, or remove the line")


RENAMED = {"train.microbatch_size": "train.tokens_per_step, the tokens of a device step"}
"""Fields of earlier versions, and what took their place."""


def _refuse_renamed(argv: list[str], files: list[str]) -> None:
    """Raises `InputError` for a field of an earlier version, with its new name."""
    given = [(part[2:].split("=")[0], "the command line") for part in argv if part.startswith("--")]
    given += [(name, file) for file in files for name in _read_config_file(file)]
    for name, place in given:
        if name in RENAMED:
            raise InputError(f"{name}: no longer a field ({place}); give {RENAMED[name]}, or remove it")


def _refuse_keys(argv: list[str], files: list[str]) -> None:
    """Raises `InputError` for an API key on the command line or in a config file, without repeating its value."""
    options = [(part.lstrip("-").partition("="), value) for part, value in _with_next(argv) if part.startswith("--")]
    given = [(name, own if equals else value, "the command line") for (name, equals, own), value in options]
    given += [(name, str(value), file) for file in files for name, value in _read_config_file(file).items()]
    for name, value, place in given:
        has_token = bool(_HUB_TOKEN.search(value))
        if has_token or _KEY_FIELD.search(name):
            of_hub = has_token or _HUB_FIELD.search(name)
            kind, remedy = ("token", HUB_REMEDY) if of_hub else ("key", KEY_REMEDY.format("endpoint.key_variable"))
            raise InputError(
                f"{name}: an API {kind} does not belong on the command line or in a config ({place}); {remedy}"
            )


def _name_kept_beta(argv: list[str], files: list[str]) -> None:
    """Logs a beta that a config file has for another base loss than the command line gives."""
    given = {part[2:].split("=")[0]: part.partition("=")[2] or value for part, value in _with_next(argv)}
    base = given.get("objective.base")
    for file in files if base is not None and "objective.beta" not in given else ():
        fields = _read_config_file(file)
        if "objective.beta" in fields and fields.get("objective.base") not in (None, base):
            log.warning(
                "%s: objective.beta %s was set there for base %r and is kept for %r; give --objective.beta, or null "
                "for that base's own default",
                *(file, fields["objective.beta"], fields["objective.base"], base),
            )


def _config_files(argv: list[str]) -> list[str]:
    """Returns the files that `--config` names."""
    return [part.partition("=")[2] or value for part, value in _with_next(argv) if part.split("=")[0] == "--config"]


def _with_next(argv: list[str]) -> list[tuple[str, str]]:
    """Returns each argument with the one after it, or an empty string."""
    return list(pairwise([*argv, ""]))


def _with_nulls(config_class: type, argv: list[str]) -> list[str]:
    """Returns the arguments with null for texts that mean it; a config file with such texts is replaced by its text."""
    optional = optional_fields(config_class)
    written = with_null(argv, optional)
    for at, (part, value) in enumerate(_with_next(argv)):
        name, equals, file = part.partition("=")
        text = file_with_null(_load_config_file(file or value), optional) if name == "--config" else None
        if text is not None:
            written[at if equals else at + 1] = f"--config={text}" if equals else text
    return written


def parse(
    config_class: type[Parsed], argv: list[str], program: str, description: str, examples: Sequence[str] = ()
) -> Parsed:
    """Parses `--config FILE_OR_NAME` and dotted overrides into `config_class`, or prints the help that is asked for.

    Args:
      config_class: class of the config.
      argv: arguments.
      program: name of the command.
      description: what the command does, for its help.
      examples: command lines, for its help.

    Raises:
      InputError: one line that names the field, its value and the allowed values.
      SystemExit: after the help.
    """
    topic = topic_of(argv)
    if topic is not None:
        print(help_text(config_class, topic, program, description, examples))
        raise SystemExit(0)
    parser = jsonargparse.ArgumentParser(prog=program, exit_on_error=False, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config_class, as_group=False)
    argv = with_config_files(argv)
    files = _config_files(argv)
    _refuse_keys(argv, files)
    _refuse_renamed(argv, files)
    _check_files(config_class, files)
    _name_kept_beta(argv, files)
    try:
        namespace = parser.instantiate(parser.parse_args(_with_nulls(config_class, argv)))
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise InputError(refusal(" ".join(str(error).split()), config_class)) from error
    except RecursionError as error:
        raise InputError(
            f"{', '.join(files) or 'the command line'}: a value contains itself; fix the reference"
        ) from error
    fields = {field.name: getattr(namespace, field.name) for field in dataclasses.fields(config_class)}
    parsed = config_class(**fields)
    _refuse_infinite(to_dict(parsed))
    return parsed


def _refuse_infinite(fields: dict[str, Any], prefix: str = "") -> None:
    """Raises `InputError` for a number that is not finite."""
    for name, value in fields.items():
        if isinstance(value, dict):
            _refuse_infinite(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            require(math.isfinite(value), prefix + name, value, "a finite number")


def to_dict(config: "DataclassInstance") -> dict[str, Any]:
    """Converts a config to plain nested dictionaries, for YAML and for comparison."""
    return dataclasses.asdict(config)


def to_json_dict(config: "DataclassInstance") -> dict[str, Any]:
    """Converts a config like `to_dict`, with JSON types: tuples become lists."""
    fields: dict[str, Any] = json.loads(json.dumps(to_dict(config)))
    return fields


def with_value(config: Parsed, path: list[str], value: Any) -> Parsed:
    """Returns a copy of the config with the field at `path` set; lists become tuples."""
    name, *rest = path
    if rest:
        return dataclasses.replace(config, **{name: with_value(getattr(config, name), rest, value)})
    return dataclasses.replace(config, **{name: tuple(value) if isinstance(value, list) else value})
