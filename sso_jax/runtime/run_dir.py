"""The run directory: the config that it was started with, and a lock that keeps other runs out."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import filelock
import yaml
from etils import epath

from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import is_remote, write_text
from sso_jax.runtime.hosts import is_first

CONFIG_FILE, LOCK_FILE = "config.yaml", "lock"
FILE_REMEDY = "restore it, or delete it if the present values are those of the run"
REMEDY = "give those, or another folder, or choose between the two with run.on_changed_config"
log = logging.getLogger(__name__)


def changed_fields(
    directory: Path, fields: dict[str, Any], defaults: dict[str, Any], may_change: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """Compares a config with that of the run in `directory`: (stored value, present value) by dotted field name.

    Args:
      fields: the present config, as nested dictionaries of JSON values.
      defaults: the default config in the same form; fields missing from the stored config are taken to have these.
      may_change: dotted names of fields and sections that may differ when a run is resumed.

    Raises:
      InputError: if the stored config cannot be read, or has unknown fields, because another version wrote it.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        return {}
    stored = _read_config(path)
    unknown = sorted(_names(stored) - _names(fields))
    if unknown:
        raise InputError(
            f"run.directory: {directory} was started by another version of sso_jax, whose config has "
            f"{', '.join(unknown[:3])}; give another folder, or resume the run with that version"
        )
    return _differences(_with_defaults(stored, defaults), fields, may_change)


def refuse_changes(directory: Path, changed: dict[str, tuple[Any, Any]]) -> None:
    """Raises an `InputError` that names the changed fields with both values."""
    raise InputError(
        f"run.directory: {directory} was started with other values of {describe_changes(changed)}; {REMEDY}"
    )


def describe_changes(changed: dict[str, tuple[Any, Any]]) -> str:
    """Formats each changed field as `field (old, now new)`."""
    return ", ".join(f"{field} ({old!r}, now {new!r})" for field, (old, new) in changed.items())


def _read_config(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())[:100]}); {FILE_REMEDY}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: contains no fields; {FILE_REMEDY}")
    return fields


def _names(fields: dict[str, Any], prefix: str = "") -> set[str]:
    """Returns the dotted names of all sections and their fields, two levels deep."""
    names = set()
    for name, value in fields.items():
        names.add(prefix + name)
        if isinstance(value, dict) and not prefix:
            names |= _names(value, f"{name}.")
    return names


def _with_defaults(fields: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Fills missing fields in with their defaults."""
    filled = dict(defaults)
    for name, value in fields.items():
        nested = isinstance(value, dict) and isinstance(defaults.get(name), dict)
        filled[name] = _with_defaults(value, defaults[name]) if nested else value
    return filled


def _differences(
    old: dict[str, Any], new: dict[str, Any], may_change: Sequence[str], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    changed: dict[str, tuple[Any, Any]] = {}
    for name in sorted(old.keys() | new.keys()):
        field = prefix + name
        if field in may_change or old.get(name) == new.get(name):
            continue
        if isinstance(old.get(name), dict) and isinstance(new.get(name), dict):
            changed |= _differences(old[name], new[name], may_change, f"{field}.")
        else:
            changed[field] = (old.get(name), new.get(name))
    return changed


@contextmanager
def claim(directory: Path, fields: dict[str, Any]) -> Iterator[None]:
    """Creates and locks the run directory and writes the resolved config; the lock is released with the process.

    An object store has no locks: there only the stored config guards against a second run.

    Args:
      directory: the run directory.
      fields: the config as nested dictionaries of JSON values.

    Raises:
      InputError: if the directory cannot be written, or another run uses it.
    """
    lock: filelock.BaseFileLock | nullcontext[None] = nullcontext()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if is_first() and not is_remote(directory):
            lock = filelock.FileLock(directory / LOCK_FILE, timeout=0)
            lock.acquire()
    except filelock.Timeout as error:
        raise InputError(
            f"run.directory: another run is using {directory}; wait for it to end, or give another folder"
        ) from error
    except OSError as error:
        raise _unwritable(directory, error) from error
    with lock:
        try:
            write_text(yaml.safe_dump(fields, sort_keys=False), directory / CONFIG_FILE)
        except OSError as error:
            raise _unwritable(directory, error) from error
        yield


def _unwritable(directory: Path, error: OSError) -> InputError:
    return InputError(f"run.directory: {directory} cannot be written ({error.strerror}); give another folder")


def newest_folder(path: str, name: str) -> str:
    """Returns the folder `name` of the newest round that has one if `path` is a run directory, else `path` itself."""
    rounds = epath.Path(path).glob(f"iteration_*/{name}")
    found = sorted(rounds, key=lambda folder: int(folder.parent.name.split("_")[1]))
    return str(found[-1]) if found else path
