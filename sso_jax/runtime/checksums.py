"""SHA-256 checksums that show whether the files of a finished stage are still as they were written."""

import hashlib
from pathlib import Path

from sso_jax.runtime.files import files_below, is_remote


def checksum(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        if is_remote(path):
            return hashlib.sha256(file.read()).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file below a folder, keyed by its path relative to the folder."""
    return {name: checksum(folder / name) for name in files_below(folder)}


def damage(folder: Path, expected: dict[str, str]) -> str | None:
    """Describes the first file that is missing or differs from its expected checksum; None if all match."""
    for name, known in expected.items():
        path = folder / name
        if not path.exists():
            return f"{path} is missing"
        if checksum(path) != known:
            return f"{path} was modified"
    return None
