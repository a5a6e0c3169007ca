"""Files in, their checksums out, and back: whether the files are still those that were written."""

import hashlib
from pathlib import Path

from sso_jax.runtime.files import files_below, is_remote


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        if is_remote(path):
            return hashlib.sha256(file.read()).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path in it."""
    return {name: checksum(folder / name) for name in files_below(folder)}


def damage(folder: Path, expected: dict[str, str]) -> str | None:
    """What is wrong with a folder that had these checksums, or None: the first file that is gone or not what it was."""
    for name, known in expected.items():
        path = folder / name
        if not path.exists():
            return f"{path} is gone"
        if checksum(path) != known:
            return f"{path} is not what was written"
    return None
