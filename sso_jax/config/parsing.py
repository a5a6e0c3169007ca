"""A command line and YAML files in, the command's frozen config out."""

import dataclasses
import difflib
import re
from pathlib import Path

import jsonargparse
import yaml

from sso_jax.config.values import KEY_REMEDY
from sso_jax.errors import InputError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

_KEY_FIELD = re.compile(r"(?:^|[._-])(?:key|token|secret|password|authorization|bearer)$|apikey$", re.IGNORECASE)
"""Names under which people put a key into a config."""


def _nearest(message: str, known: list[str]) -> str:
    """`; did you mean ...?` for the unknown field that an error message of the parser names, or nothing."""
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
    if not unknown:
        return ""
    group = re.search(r"Group '([\w.]+)'", message)
    name = unknown.group(1) or ((group.group(1) + ".") if group else "") + unknown.group(2)
    near = difflib.get_close_matches(name, known, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else "; --help lists every field"


def _fields_of_file(rows, prefix: str = "") -> list[str]:
    """Dotted names of all fields of a YAML file's contents."""
    if not isinstance(rows, dict):
        return [prefix.rstrip(".")]
    return [name for key, value in rows.items() for name in _fields_of_file(value, f"{prefix}{key}.")]


def _refuse_keys(argv: list[str]) -> None:
    """Raises `InputError` for a key on the command line or in a config file; its value is not repeated."""
    given = [(part.lstrip("-").split("=")[0], "the command line") for part in argv if part.startswith("--")]
    files = [
        part.partition("=")[2] or following
        for part, following in zip(argv, [*argv[1:], ""], strict=True)
        if part.split("=")[0] == "--config"
    ]
    for file in files:
        try:
            given += [(name, file) for name in _fields_of_file(yaml.safe_load(Path(file).read_text(encoding="utf-8")))]
        except (OSError, ValueError, yaml.YAMLError):
            continue  # the parser says what is wrong with it
    for name, place in given:
        if _KEY_FIELD.search(name):
            raise InputError(f"{name}: a key does not belong on the command line or in a config ({place}); {KEY_REMEDY}")


def parse(config_class: type, argv: list[str], program: str, description: str):
    """Parses `--config FILE` and dotted overrides into `config_class`.

    Raises:
      InputError: one line that names the field, the value and what it may be.
    """
    parser = jsonargparse.ArgumentParser(prog=program, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of fields; later arguments override it.")
    parser.add_class_arguments(config_class, as_group=False)
    known = [action.dest for action in parser._actions]
    _refuse_keys(argv)
    try:
        namespace = parser.instantiate(parser.parse_args(argv))
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        message = " ".join(str(error).split())
        raise InputError(message + _nearest(message, known)) from error
    fields = {field.name: getattr(namespace, field.name) for field in dataclasses.fields(config_class)}
    return config_class(**fields)


def to_dict(config) -> dict:
    """The config as plain nested dictionaries, for YAML and for comparison."""
    return dataclasses.asdict(config)
