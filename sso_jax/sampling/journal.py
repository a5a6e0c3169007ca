"""Responses as they are sampled in, a file beside the stage's out; read again where the stage was interrupted.

A journal belongs to one list of requests, whose fingerprint heads it: another list starts it anew. Every process of a
run writes what it was given to a part of its own, and reads the parts of all.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from sso_jax.runtime.files import is_remote


@dataclass(frozen=True)
class Journal:
    """Responses by their position in the list of requests."""

    folder: Path
    fingerprint: str
    process: int = 0

    def _part(self, process: int) -> Path:
        return self.folder / f"part_{process}.jsonl"

    def read(self) -> dict[int, list[int]]:
        """Token ids of every response that was written down whole; a line cut short by a kill is left out."""
        found: dict[int, list[int]] = {}
        for part in sorted(self.folder.glob("part_*.jsonl")) if self.folder.is_dir() else ():
            lines = part.read_text().split("\n")
            if lines[0] != self.fingerprint:
                continue
            for line in lines[1:-1]:  # what follows the last newline was not written whole
                row = json.loads(line)
                found.update(zip(row["at"], row["ids"], strict=True))
        return found

    def add(self, responses: dict[int, list[int]]) -> None:
        """Writes responses down, on disk before this returns."""
        if is_remote(self.folder):
            return  # an object store cannot append: there a stage is repeated from its start
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._part(self.process)
        line = json.dumps({"at": list(responses), "ids": list(responses.values())})
        self._mend(path)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _mend(self, path: Path) -> None:
        """Starts the part anew if it is another list's, and cuts off a last line that was not written whole; reads both
        ends only.
        """
        head = f"{self.fingerprint}\n".encode()
        with open(path, "a+b") as file:
            file.seek(0)
            if file.read(len(head)) != head:
                file.truncate(0)
                file.write(head)
                return
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rindex(b"\n") + 1)
