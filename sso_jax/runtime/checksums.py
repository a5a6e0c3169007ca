"""SHA-256 checksums that show whether the files of a finished stage are still as they were written."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sso_jax.runtime.files import files_below

READ_AT_ONCE = 16 * 2**20
"""Bytes of a file that are in memory while its checksum is computed."""


def checksum(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(READ_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


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


def json_digest(head: list[Any], rows: Iterable[Any], size: int) -> str:
    """Returns the BLAKE2b digest, of `size` bytes, of the JSON list `[*head, [*rows]]`, without holding its text."""
    digest = hashlib.blake2b(digest_size=size)
    digest.update("".join(["[", *(json.dumps(value) + ", " for value in head), "["]).encode())
    for number, row in enumerate(rows):
        digest.update((", " * (number > 0) + json.dumps(row)).encode())
    digest.update(b"]]")
    return digest.hexdigest()
