"""Checks numbers of the JSON files of a model folder."""

import math
from pathlib import Path
from typing import Any

from sso_jax.runtime.errors import InputError


def positive_number(value: Any, name: str, path: Path) -> Any:
    """Returns the value of a field; raises `InputError` unless it is a finite number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InputError(f"{path}: {name} {value!r} is not a positive number; fix it, or fetch the file again")
    return value


def positive_integer(value: Any, name: str, path: Path) -> Any:
    """Returns the value of a field; raises `InputError` unless it is an integer above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{path}: {name} {value!r} is not a positive integer; fix it, or fetch the file again")
    return value
