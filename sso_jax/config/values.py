"""Checks of the values of config fields."""

import re
import urllib.parse

from sso_jax.runtime.errors import InputError

KEY_REMEDY = "set the key in the environment ({} names the variable) and nowhere else"

HUB_REMEDY = "set HF_TOKEN in the environment, or log in with `hf auth login`, and give it nowhere else"


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raises `InputError("name: value is ...; remedy")` unless `condition` holds."""
    if not condition:
        raise InputError(f"{name}: {value!r} is out of range; give {remedy}")


def require_address(name: str, url: str | None, key_variable: str) -> None:
    """Raises `InputError` unless a URL, if given, is an HTTP address without a user name, password or query.

    Args:
      name: field of the URL.
      url: its value.
      key_variable: field that names the environment variable of the server's key.
    """
    if url is None:
        return
    parts = urllib.parse.urlsplit(url)
    require(parts.scheme in ("http", "https") and bool(parts.hostname), name, url, "http(s)://HOST[:PORT]/v1")
    if parts.username or parts.password or parts.query:
        raise InputError(
            f"{name}: contains a user name, password or query besides the address ({parts.hostname}); "
            f"{KEY_REMEDY.format(key_variable)}"
        )


def require_variable(name: str, variable: str | None) -> None:
    """Raises `InputError` unless the value of a field, if given, can be the name of an environment variable."""
    if variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise InputError(f"{name}: not the name of an environment variable; {KEY_REMEDY.format(name)}")
