"""Stages of a round in, their files and markers out: a stage is done when its marker is written, and is never done
twice.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sso_jax.runtime.checksums import checksum, checksums, damage
from sso_jax.runtime.files import write_text
from sso_jax.runtime.hosts import broadcast_from_first, is_first, on_first_process
from sso_jax.runtime.json_lines import read_records, write_records

log = logging.getLogger(__name__)


def _marker(folder: Path, name: str) -> Path:
    return folder / "done" / f"{name}.json"


def _read_marker(folder: Path, name: str) -> dict | None:
    """What the marker holds, the checksums of the stage's files among it; one answer for all processes."""
    marker = _marker(folder, name)

    def read() -> dict | None:
        try:
            return json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None
        except ValueError:
            log.warning("%s is damaged; stage %s is done again", marker, name)
            return None

    return on_first_process(read)


def _without_files(marked: dict) -> dict:
    return {field: value for field, value in marked.items() if field != "files"}


def finished(folder: Path, name: str) -> dict | None:
    """What a finished stage left to be said (counts, seconds), or None where it is still to do; one answer for all
    processes.
    """
    marked = _read_marker(folder, name)
    return None if marked is None else _without_files(marked)


def finish(folder: Path, name: str, stats: dict, files: list[str] | None = None) -> dict:
    """Marks a stage as done, with the checksums of these files of its folder; what is said of it is what the first
    process says.
    """
    stats = broadcast_from_first(stats)
    digests = on_first_process(lambda: {file: checksum(folder / file) for file in files or []})
    marker = _marker(folder, name)
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps({**stats, "files": digests} if digests else stats, indent=2), marker)
    return stats


def record_stage(
    folder: Path, name: str, kind: type, make: Callable[[], tuple[list, dict]], beside: Sequence[str] = ()
) -> tuple[list, dict]:
    """Records and statistics of a stage: read from `folder/name.jsonl` where it is done, else made, written and marked.

    `make` returns the records and the statistics; `seconds` is added to these. `beside` names files that it may write
    itself.
    """
    path = folder / f"{name}.jsonl"
    stats = read_verified(folder, name)
    if stats is not None:
        return read_records(kind, path), stats
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    records, stats = make()
    write_records(records, path)
    files = [path.name, *on_first_process(lambda: [file for file in beside if (folder / file).exists()])]
    return records, finish(folder, name, {**stats, "seconds": time.perf_counter() - start}, files)


def file_stage(folder: Path, name: str, make: Callable[[], dict], output: str | None = None) -> dict:
    """Statistics of a stage that writes its own `folder/output`, a file or a folder, if anything; as `record_stage`
    otherwise.
    """
    stats = read_verified(folder, name)
    if stats is not None:
        return stats
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    stats = make()
    files = on_first_process(lambda: _files_of(folder, output)) if output else []
    return finish(folder, name, {**stats, "seconds": time.perf_counter() - start}, files)


def _files_of(folder: Path, output: str) -> list[str]:
    path = folder / output
    return [f"{output}/{file}" for file in checksums(path)] if path.is_dir() else [output] if path.exists() else []


def damaged(folder: Path) -> list[str]:
    """Stages that are marked as done and have a file that is gone or damaged, which the log then says; one answer for
    all processes.
    """
    done = folder / "done"
    names = on_first_process(lambda: sorted(marker.stem for marker in done.glob("*.json")) if done.is_dir() else [])
    return [name for name in names if read_verified(folder, name) is None]


def reopen(folder: Path, name: str) -> None:
    """Takes the mark of a stage back."""
    if is_first():
        _marker(folder, name).unlink()


def read_verified(folder: Path, name: str) -> dict | None:
    """As `finished`, but None also where a file of the stage is gone or damaged, which the log then says: it is to be
    done again.
    """
    marked = _read_marker(folder, name)
    harm = None if marked is None else on_first_process(lambda: damage(folder, marked.get("files", {})))
    if harm is not None:
        log.warning("%s; stage %s is done again", harm, name)
    return None if marked is None or harm is not None else _without_files(marked)
