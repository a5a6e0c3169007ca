"""Stages of a round in, their files and markers out: a stage is done when its marker is written, and is never done twice."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from sso_jax.checksums import checksum, checksums, damage
from sso_jax.hosts import agree, once
from sso_jax.records import read_records, write_records, write_text

log = logging.getLogger(__name__)


def _marker(folder: Path, name: str) -> Path:
    return folder / "done" / f"{name}.json"


def _read_marker(folder: Path, name: str) -> dict | None:
    """What the marker holds, the checksums of the stage's files among it; one answer for all processes."""
    marker = _marker(folder, name)
    return once(lambda: json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None)


def _without_files(marked: dict) -> dict:
    return {field: value for field, value in marked.items() if field != "files"}


def finished(folder: Path, name: str) -> dict | None:
    """What a finished stage left to be said (counts, seconds), or None where it is still to do; one answer for all processes."""
    marked = _read_marker(folder, name)
    return None if marked is None else _without_files(marked)


def finish(folder: Path, name: str, stats: dict, files: list[str] | None = None) -> dict:
    """Marks a stage as done, with the checksums of these files of its folder; what is said of it is what the first process says."""
    stats = agree(stats)
    digests = once(lambda: {file: checksum(folder / file) for file in files or []})
    marker = _marker(folder, name)
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps({**stats, "files": digests} if digests else stats, indent=2), marker)
    return stats


def record_stage(folder: Path, name: str, kind: type, make: Callable[[], tuple[list, dict]]) -> tuple[list, dict]:
    """Records and statistics of a stage: read from `folder/name.jsonl` where it is done, else made, written and marked.

    `make` returns the records and the statistics; `seconds` is added to these.
    """
    path = folder / f"{name}.jsonl"
    stats = whole(folder, name)
    if stats is not None:
        return read_records(kind, path), stats
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    records, stats = make()
    write_records(records, path)
    return records, finish(folder, name, {**stats, "seconds": time.perf_counter() - start}, [path.name])


def plain_stage(folder: Path, name: str, make: Callable[[], dict], output: str | None = None) -> dict:
    """Statistics of a stage that writes its own files, `folder/output` among them; as `record_stage` otherwise."""
    stats = whole(folder, name)
    if stats is not None:
        return stats
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    stats = make()
    files = [f"{output}/{file}" for file in once(lambda: list(checksums(folder / output)))] if output else []
    return finish(folder, name, {**stats, "seconds": time.perf_counter() - start}, files)


def whole(folder: Path, name: str) -> dict | None:
    """As `finished`, but None also where a file of the stage is gone or damaged, which the log then says: it is to be done again."""
    marked = _read_marker(folder, name)
    harm = None if marked is None else once(lambda: damage(folder, marked.get("files", {})))
    if harm is not None:
        log.warning("%s; stage %s is done again", harm, name)
    return None if marked is None or harm is not None else _without_files(marked)
