"""A config in, its run directory claimed: begun, continued, or refused because another run lies there."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import filelock
import yaml

from sso_jax.config import Config, to_dict
from sso_jax.errors import InputError
from sso_jax.hosts import is_first
from sso_jax.records import is_remote, write_text

MAY_CHANGE = (
    "mesh", "hosts", "sampling.mesh", "dry_run", "logging", "run.compilation_cache", "run.directory", "run.on_changed_config",
)  # fmt: skip
"""Fields in which a continued run may differ from its start."""
CONFIG_FILE, LOCK_FILE = "config.yaml", "lock"
REMEDY_FOR_FILE = "restore it, or delete it if the values given now are those of the run"
REMEDY = "give those, or another folder, or say which to take with run.on_changed_config"
log = logging.getLogger(__name__)


def _plain(config: Config) -> dict:
    return json.loads(json.dumps(to_dict(config)))


def settle(directory: Path, config: Config) -> Config:
    """The config to go on with where a run lies in the directory: the one given, or with the values of the start where these are asked for.

    Raises:
      InputError: with the fields that differ, unless `run.on_changed_config` says which values to take.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        return config
    changed = _changed_fields(_filled(_read_config(path), _plain(Config())), _plain(config))
    if not changed:
        return config
    told = ", ".join(f"{field} ({old!r}, now {new!r})" for field, (old, new) in changed.items())
    if config.run.on_changed_config == "refuse":
        raise InputError(f"run.directory: {directory} was started with other values of {told}; {REMEDY}")
    log.warning("%s was started with other values of %s: %s", directory, told, config.run.on_changed_config)
    if config.run.on_changed_config == "take_old":
        for field, (old, _) in changed.items():
            config = _with_value(config, field.split("."), old)
    return config


def _read_config(path: Path) -> dict:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())[:100]}); {REMEDY_FOR_FILE}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds no fields; {REMEDY_FOR_FILE}")
    return fields


def _filled(fields: dict, defaults: dict) -> dict:
    """The fields, and at its default whatever they do not name: what came after the version that wrote them."""
    both = lambda name: isinstance(fields.get(name), dict) and isinstance(defaults.get(name), dict)  # noqa: E731
    return {**defaults, **{name: _filled(value, defaults[name]) if both(name) else value for name, value in fields.items()}}


def _changed_fields(old: dict, new: dict, prefix: str = "") -> dict[str, tuple]:
    """(value of the start, value now) of every field that differs and may not."""
    changed = {}
    for name in sorted(old.keys() | new.keys()):
        field = prefix + name
        if field in MAY_CHANGE or old.get(name) == new.get(name):
            continue
        if isinstance(old.get(name), dict) and isinstance(new.get(name), dict):
            changed |= _changed_fields(old[name], new[name], field + ".")
        else:
            changed[field] = (old.get(name), new.get(name))
    return changed


def _with_value(config, path: list[str], value):
    """The config with the field at `path` set; one that it does not have (the run is of another version) is left out."""
    name, *rest = path
    if not hasattr(config, name):
        return config
    if rest:
        return dataclasses.replace(config, **{name: _with_value(getattr(config, name), rest, value)})
    return dataclasses.replace(config, **{name: tuple(value) if isinstance(value, list) else value})


@contextmanager
def claim(directory: Path, config: Config) -> Iterator[None]:
    """Makes the directory, writes the config as resolved, and keeps other runs out; the lock dies with its process.

    An object store has no locks: there the only guard is the config.

    Raises:
      InputError: if the directory cannot be written, or another run works in it.
    """
    lock = nullcontext()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if is_first() and not is_remote(directory):
            lock = filelock.FileLock(directory / LOCK_FILE, timeout=0)
            lock.acquire()
    except filelock.Timeout as error:
        raise InputError(f"run.directory: another run works in {directory}; wait for it, or give another folder") from error
    except OSError as error:
        raise _unwritable(directory, error) from error
    with lock:
        _write_config(directory, config)
        yield


def _unwritable(directory: Path, error: OSError) -> InputError:
    return InputError(f"run.directory: {directory} cannot be written ({error.strerror}); give another folder")


def _write_config(directory: Path, config: Config) -> None:
    try:
        write_text(yaml.safe_dump(_plain(config), sort_keys=False), directory / CONFIG_FILE)
    except OSError as error:
        raise _unwritable(directory, error) from error
