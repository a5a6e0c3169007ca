"""Journals of the results of unfinished stages, from which an interrupted stage resumes.

A journal belongs to one list of items, whose fingerprint is its first line; for another list it is started again.
Every process of a run writes its share to its own file and reads the files of all processes.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sso_jax.runtime.files import is_remote
from sso_jax.runtime.json_lines import load_json


@dataclass(frozen=True)
class Journal:
    """Results, lists of numbers, by their index in the list of items: responses as token ids, or log-probs."""

    folder: Path
    fingerprint: str
    process: int = 0

    def _part(self, process: int) -> Path:
        return self.folder / f"part_{process}.jsonl"

    def read(self) -> Iterator[tuple[int, list[Any]]]:
        """Yields every completely written result with its index; skips a line that was truncated by a kill."""
        for part in sorted(self.folder.glob("part_*.jsonl")) if self.folder.is_dir() else ():
            with part.open("rb") as lines:
                if next(lines, b"").rstrip(b"\n") != self.fingerprint.encode():
                    continue
                for line in lines:
                    if line.endswith(b"\n"):  # a line without is truncated
                        row = load_json(line)
                        yield from zip(row["at"], row["values"], strict=True)

    def add(self, results: dict[int, list[Any]]) -> None:
        """Appends results; they are on disk when this returns."""
        if is_remote(self.folder):
            return  # an object store cannot append: a stage is repeated from its start there
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._part(self.process)
        line = json.dumps({"at": list(results), "values": list(results.values())})
        self._repair(path)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _repair(self, path: Path) -> None:
        """Restarts the file if it belongs to another list, and removes a truncated last line; reads only both ends."""
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
