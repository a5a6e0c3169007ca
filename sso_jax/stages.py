"""Stages of a round in, their files and markers out: a stage is done when its marker is written, and is never done twice."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from sso_jax.hosts import agree, once
from sso_jax.records import read_records, write_records, write_text


def _marker(folder: Path, name: str) -> Path:
    return folder / "done" / f"{name}.json"


def finished(folder: Path, name: str) -> dict | None:
    """What a finished stage left to be said (counts, seconds), or None where it is still to do; one answer for all processes."""
    marker = _marker(folder, name)
    return once(lambda: json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None)


def finish(folder: Path, name: str, stats: dict) -> dict:
    """Marks a stage as done, after its files were written; what is said of it is what the first process says."""
    stats = agree(stats)
    marker = _marker(folder, name)
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(stats, indent=2), marker)
    return stats


def record_stage(folder: Path, name: str, kind: type, make: Callable[[], tuple[list, dict]]) -> tuple[list, dict]:
    """Records and statistics of a stage: read from `folder/name.jsonl` where it is done, else made, written and marked.

    `make` returns the records and the statistics; `seconds` is added to these.
    """
    path = folder / f"{name}.jsonl"
    stats = finished(folder, name)
    if stats is not None:
        return read_records(kind, path), stats
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    records, stats = make()
    write_records(records, path)
    return records, finish(folder, name, {**stats, "seconds": time.perf_counter() - start})


def plain_stage(folder: Path, name: str, make: Callable[[], dict]) -> dict:
    """Statistics of a stage that writes its own files; as `record_stage` otherwise."""
    stats = finished(folder, name)
    if stats is not None:
        return stats
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    return finish(folder, name, {**make(), "seconds": time.perf_counter() - start})
