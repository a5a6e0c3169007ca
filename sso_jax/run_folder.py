"""A config in, its run directory claimed: begun, continued, or refused because another run lies there."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import filelock
import yaml

from sso_jax.config import Config, to_dict
from sso_jax.errors import InputError
from sso_jax.hosts import is_first
from sso_jax.records import is_remote, write_text

MAY_CHANGE = ("mesh", "hosts", "sampling.mesh", "dry_run", "logging", "run.compilation_cache", "run.directory")
"""Fields in which a continued run may differ from its start."""
CONFIG_FILE, LOCK_FILE = "config.yaml", "lock"


def _plain(config: Config) -> dict:
    return json.loads(json.dumps(to_dict(config)))


def check(directory: Path, config: Config) -> None:
    """Raises `InputError` with the fields that differ if another run lies in the directory."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        return
    changed = _changed_fields(yaml.safe_load(path.read_text(encoding="utf-8")), _plain(config))
    if changed:
        raise InputError(f"run.directory: {directory} was started with other values of {', '.join(changed)}; give those, or another folder")


def _changed_fields(old: dict, new: dict, prefix: str = "") -> list[str]:
    changed = []
    for name in sorted(old.keys() | new.keys()):
        field = prefix + name
        if field in MAY_CHANGE or old.get(name) == new.get(name):
            continue
        if isinstance(old.get(name), dict) and isinstance(new.get(name), dict):
            changed += _changed_fields(old[name], new[name], field + ".")
        else:
            changed.append(f"{field} ({old.get(name)!r}, now {new.get(name)!r})")
    return changed


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
