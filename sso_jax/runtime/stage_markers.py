"""Runs each stage of a round once: a stage is finished when its marker is written, and is then read from its files."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sso_jax.runtime.checksums import checksum, checksums, damage
from sso_jax.runtime.files import write_text
from sso_jax.runtime.hosts import broadcast_from_first, is_first, on_first_process
from sso_jax.runtime.json_lines import Record, each_record, write_records
from sso_jax.runtime.spool import spooled

log = logging.getLogger(__name__)


def _marker(folder: Path, name: str) -> Path:
    return folder / "done" / f"{name}.json"


def _read_marker(folder: Path, name: str) -> dict[str, Any] | None:
    """Reads a stage's marker, which includes the checksums of its files; the result is the same on all processes."""
    marker = _marker(folder, name)

    def read() -> dict[str, Any] | None:
        try:
            return json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None
        except ValueError:
            log.warning("%s is damaged; stage %s runs again", marker, name)
            return None

    return on_first_process(read)


def _without_files(marked: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in marked.items() if field != "files"}


def finished(folder: Path, name: str) -> dict[str, Any] | None:
    """Returns the statistics of a finished stage (counts, seconds), None if unfinished; the same on all processes."""
    marked = _read_marker(folder, name)
    return None if marked is None else _without_files(marked)


def finish(folder: Path, name: str, stats: dict[str, Any], files: list[str] | None = None) -> dict[str, Any]:
    """Marks a stage as finished, with the checksums of `files` in its folder; returns the first process's `stats`."""
    stats = broadcast_from_first(stats)
    digests = on_first_process(lambda: {file: checksum(folder / file) for file in files or []})
    marker = _marker(folder, name)
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps({**stats, "files": digests} if digests else stats, indent=2), marker)
    return stats


def record_stage(
    folder: Path,
    name: str,
    kind: type[Record],
    make: Callable[[], tuple[Iterable[Record], dict[str, Any]]],
    beside: Sequence[str] = (),
) -> tuple[Sequence[Record], dict[str, Any]]:
    """Returns the records and statistics of a stage, which is read from `folder/name.jsonl` if finished, else run.

    Many records are not held in memory (`spooled`).

    Args:
      folder: folder of the round.
      name: name of the stage.
      kind: class of the records.
      make: runs the stage and returns its records, which may be made as they are written, and its statistics, to
        which `seconds` is added.
      beside: names of further files that `make` may write itself.
    """
    path = folder / f"{name}.jsonl"
    stats = read_verified(folder, name)
    if stats is not None:
        return spooled(each_record(kind, path)), stats
    with _timed(folder, name) as seconds:
        made, stats = make()
        records = spooled(made)
        write_records(records, path)
    files = [path.name, *on_first_process(lambda: [file for file in beside if (folder / file).exists()])]
    return records, finish(folder, name, {**stats, "seconds": seconds[0]}, files)


def file_stage(
    folder: Path, name: str, make: Callable[[], dict[str, Any]], output: str | None = None
) -> dict[str, Any]:
    """Like `record_stage`, for a stage without records; `make` itself may write `folder/output`, a file or folder."""
    stats = read_verified(folder, name)
    if stats is not None:
        return stats
    with _timed(folder, name) as seconds:
        stats = make()
    files = on_first_process(lambda: _files_of(folder, output)) if output else []
    return finish(folder, name, {**stats, "seconds": seconds[0]}, files)


@contextmanager
def _timed(folder: Path, name: str) -> Iterator[list[float]]:
    """Yields a list that has the seconds of the stage afterwards; a log without a terminal gets its start and end."""
    folder.mkdir(parents=True, exist_ok=True)
    seconds: list[float] = []
    start, told = time.perf_counter(), is_first() and not sys.stderr.isatty()
    if told:
        log.info("%s: stage %s begins", folder.name, name)
    yield seconds
    seconds.append(time.perf_counter() - start)
    if told:
        log.info("%s: stage %s took %.1f s", folder.name, name, seconds[0])


def _files_of(folder: Path, output: str) -> list[str]:
    path = folder / output
    return [f"{output}/{file}" for file in checksums(path)] if path.is_dir() else [output] if path.exists() else []


def damaged(folder: Path) -> list[str]:
    """Returns the finished stages with a missing or damaged file, which is logged; the same on all processes."""
    done = folder / "done"
    names = on_first_process(lambda: sorted(marker.stem for marker in done.glob("*.json")) if done.is_dir() else [])
    return [name for name in names if read_verified(folder, name) is None]


def reopen(folder: Path, name: str) -> None:
    """Removes the marker of a stage."""
    if is_first():
        _marker(folder, name).unlink()


def read_verified(folder: Path, name: str) -> dict[str, Any] | None:
    """Like `finished`, but returns None, and logs why, if a file of the stage is missing or damaged."""
    marked = _read_marker(folder, name)
    harm = None if marked is None else on_first_process(lambda: damage(folder, marked.get("files", {})))
    if harm is not None:
        log.warning("%s; stage %s runs again", harm, name)
    return None if marked is None or harm is not None else _without_files(marked)
