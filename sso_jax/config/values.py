"""Checks of the values of config fields."""

from sso_jax.runtime.errors import InputError

KEY_REMEDY = "set the key in the environment (endpoint.key_variable names the variable) and nowhere else"

HUB_REMEDY = "set HF_TOKEN in the environment, or log in with `hf auth login`, and give it nowhere else"


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raises `InputError("name: value is ...; remedy")` unless `condition` holds."""
    if not condition:
        raise InputError(f"{name}: {value!r} is out of range; give {remedy}")
