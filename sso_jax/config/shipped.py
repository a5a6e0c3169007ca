"""Finds the configs that ship with the package by their names, as in `--config tiny`."""

from pathlib import Path

from sso_jax.runtime.errors import InputError

PACKAGE = Path(__file__).resolve().parents[1]
PLACES = (PACKAGE / "configs", PACKAGE.parent / "configs")
"""Where they are in an installed package, and in a checkout."""
CHECKOUT = PACKAGE.parent / "pyproject.toml"


def shipped_configs() -> dict[str, Path]:
    """Returns the configs that ship with the package, by name."""
    installed, checkout = PLACES
    folder = checkout if CHECKOUT.is_file() and not installed.is_dir() else installed
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(given: str) -> str:
    """Returns the file that a value of `--config` means: that path, or else the shipped config of that name.

    Raises:
      InputError: for a name that is neither.
    """
    if Path(given).exists() or Path(given).name != given or not given:
        return given
    known = shipped_configs()
    name = given.removesuffix(".yaml")
    if name not in known:
        raise InputError(
            f"--config: no file {given!r}, and no config of that name; give a file or one of {', '.join(known)}"
        )
    return str(known[name])


def with_config_files(argv: list[str]) -> list[str]:
    """Returns the arguments with files in place of names of shipped configs."""
    found = list(argv)
    for at, part in enumerate(argv):
        name, equals, value = part.partition("=")
        if name == "--config" and equals:
            found[at] = f"--config={find_config(value)}"
        elif name == "--config" and at + 1 < len(argv) and not argv[at + 1].startswith("--"):
            found[at + 1] = find_config(argv[at + 1])
    return found
