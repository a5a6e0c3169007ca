"""Checks of config fields that belong to one recipe or need each other."""

import dataclasses
import logging
from typing import Any

from sso_jax.config import Config, ObjectiveConfig
from sso_jax.runtime.errors import InputError

log = logging.getLogger(__name__)


def warn_unused_objective(given: ObjectiveConfig) -> None:
    """Names in the log the fields of the objective that are set though the recipe has a loss of its own."""
    default = ObjectiveConfig()
    names = [declared.name for declared in dataclasses.fields(given)]
    unused = [f"objective.{name}" for name in names if getattr(given, name) != getattr(default, name)]
    if unused:
        log.warning("this recipe does not use %s", ", ".join(unused))


def refuse_fields(config: Config, recipe: str, unused: dict[str, Any]) -> None:
    """Raises `InputError` for a field that is set (`unused` holds its value) though the recipe does not use it."""
    for name, value in unused.items():
        if value not in (None, False, "none"):
            raise InputError(f"{name}: {value!r} is not used by recipe {recipe!r}; remove it")
