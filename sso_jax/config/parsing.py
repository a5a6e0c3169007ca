"""A command line and YAML files in, the command's frozen config out."""

import dataclasses
import difflib
import json
import math
import re
from pathlib import Path

import jsonargparse
import yaml

from sso_jax.config.values import KEY_REMEDY, require
from sso_jax.runtime.errors import InputError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

_KEY_FIELD = re.compile(r"(?:^|[._-])(?:key|token|secret|password|authorization|bearer)$|apikey$", re.IGNORECASE)
"""Names under which people put a key into a config."""


def _nearest(message: str, known: list[str]) -> str:
    """`; did you mean ...?` for the unknown field that an error message of the parser names, or nothing."""
    unknown = re.search(r"(?:unrecognized arguments: --|Option ')([\w.]+)|does not accept option '([\w.]+)'", message)
    if not unknown:
        return ""
    group = re.search(r"Group '([\w.]+)'", message)
    name = unknown.group(1) or ((group.group(1) + ".") if group else "") + unknown.group(2)
    near = difflib.get_close_matches(name, known, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else "; --help lists every field"


def _fields_of_file(rows, prefix: str = "") -> dict[str, object]:
    """Values of all fields of a YAML file's contents, by dotted name."""
    if not isinstance(rows, dict):
        return {prefix.rstrip("."): rows}
    return {
        field: value for key, part in rows.items() for field, value in _fields_of_file(part, f"{prefix}{key}.").items()
    }


def _read_config_file(file: str) -> dict[str, object]:
    """Values of the fields of a config file, by dotted name; nothing of one that is not there, of which the parser
    tells.

    Raises:
      InputError: for a file that is no table of fields.
    """
    if not Path(file).is_file():
        return {}
    try:
        rows = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        fields = _fields_of_file(rows) if isinstance(rows, dict) else None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(
            f"{file}: not YAML that can be read ({' '.join(str(error).split())[:200]}); mend the file"
        ) from error
    if not fields:
        raise InputError(
            f"{file}: {str(rows)[:60]!r} is no table of fields; give sections with fields, as configs/tiny.yaml has "
            "them"
        )
    return fields


def _check_files(config_class: type, files: list[str]) -> None:
    """Raises `InputError` for a config file that cannot be read, a section without fields, or a field without a
    value.
    """
    declared = {field.name: field for field in dataclasses.fields(config_class)}
    for file in files:
        for name, value in _read_config_file(file).items():
            section, _, field = name.partition(".")
            default = declared[section].default if section in declared else None
            if dataclasses.is_dataclass(default) and not field:
                raise InputError(f"{file}: {section} is {value!r}; it is a section, give its fields below it")
            if value is None and getattr(default, field, default if not field else None) is not None:
                raise InputError(f"{file}: {name} has no value; give one, or take the line out")


def _refuse_keys(argv: list[str], files: list[str]) -> None:
    """Raises `InputError` for a key on the command line or in a config file; its value is not repeated."""
    given = [(part.lstrip("-").split("=")[0], "the command line") for part in argv if part.startswith("--")]
    given += [(name, file) for file in files for name in _read_config_file(file)]
    for name, place in given:
        if _KEY_FIELD.search(name):
            raise InputError(
                f"{name}: a key does not belong on the command line or in a config ({place}); {KEY_REMEDY}"
            )


def _config_files(argv: list[str]) -> list[str]:
    """What `--config` names."""
    pairs = zip(argv, [*argv[1:], ""], strict=True)
    return [part.partition("=")[2] or following for part, following in pairs if part.split("=")[0] == "--config"]


def parse(config_class: type, argv: list[str], program: str, description: str):
    """Parses `--config FILE` and dotted overrides into `config_class`.

    Raises:
      InputError: one line that names the field, the value and what it may be.
    """
    parser = jsonargparse.ArgumentParser(prog=program, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of fields; later arguments override it.")
    parser.add_class_arguments(config_class, as_group=False)
    known = [action.dest for action in parser._actions]
    files = _config_files(argv)
    _refuse_keys(argv, files)
    _check_files(config_class, files)
    try:
        namespace = parser.instantiate(parser.parse_args(argv))
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        message = " ".join(str(error).split())
        raise InputError(message + _nearest(message, known)) from error
    except RecursionError as error:
        raise InputError(
            f"{', '.join(files) or 'the command line'}: a value holds itself without end; mend it"
        ) from error
    fields = {field.name: getattr(namespace, field.name) for field in dataclasses.fields(config_class)}
    parsed = config_class(**fields)
    _refuse_infinite(to_dict(parsed))
    return parsed


def _refuse_infinite(fields: dict, prefix: str = "") -> None:
    """Raises `InputError` for a number that is not finite."""
    for name, value in fields.items():
        if isinstance(value, dict):
            _refuse_infinite(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            require(math.isfinite(value), prefix + name, value, "a finite number")


def to_dict(config) -> dict:
    """The config as plain nested dictionaries, for YAML and for comparison."""
    return dataclasses.asdict(config)


def to_json_dict(config) -> dict:
    """`to_dict` in JSON's types: tuples are lists."""
    return json.loads(json.dumps(to_dict(config)))


def with_value(config, path: list[str], value):
    """The config with the field at `path` set; lists become tuples."""
    name, *rest = path
    if rest:
        return dataclasses.replace(config, **{name: with_value(getattr(config, name), rest, value)})
    return dataclasses.replace(config, **{name: tuple(value) if isinstance(value, list) else value})
