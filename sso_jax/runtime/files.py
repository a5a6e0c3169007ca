"""Atomic writes of a run's files, on a local disk or in an object store."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from sso_jax.runtime.signals import unsaved_work


@dataclass
class _Writer:
    """Whether this process writes the files that all processes of a run share."""

    here: bool = True


_WRITER = _Writer()
COPIED_AT_ONCE = 16 * 2**20
"""Bytes of a file that are in memory while it is copied to an object store."""


def leave_writing_to_another() -> None:
    """Disables writing in this process; of the processes of a run only the first writes text files."""
    _WRITER.here = False


def is_remote(path: str | Path) -> bool:
    """Returns whether a path is in an object store (`gs://...`), which supports neither atomic rename nor append."""
    return "://" in os.fspath(path)


LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the text file begins that Git stores in place of a large one."""


def is_lfs_pointer(path: Path) -> bool:
    """Returns whether a local file is a Git LFS pointer, which stands in for a file that was not fetched."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def files_below(folder: str | Path) -> list[str]:
    """Returns the paths of all files below a folder, relative to it and sorted.

    Avoids `walk`, which drops the store from the names of an object store's folders (etils 1.15). Skips the empty
    object that some stores keep as a placeholder for a folder.
    """
    root = epath.Path(folder)
    found: list[str] = []
    for path in root.iterdir():
        if path != root:
            found += [f"{path.name}/{below}" for below in files_below(path)] if path.is_dir() else [path.name]
    return sorted(found)


def write_text(text: str, path: str | Path) -> None:
    """Writes a text file atomically: a temporary file is synced, then renamed.

    An object store writes whole objects anyway. Does nothing where writing is disabled (`leave_writing_to_another`).
    """
    _write([text], path)


def write_lines(lines: Iterable[str], path: str | Path) -> None:
    """Like `write_text`, for lines that are made while they are written."""
    _write((f"{line}\n" for line in lines), path)


def _write(parts: Iterable[str], path: str | Path) -> None:
    target = epath.Path(path)
    if not _WRITER.here:
        return
    if is_remote(target):
        with target.open("wb") as stored:
            stored.writelines(part.encode() for part in parts)
        return
    temporary = target.with_name(target.name + ".partial")
    with unsaved_work():
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)


def append_lines(lines: Iterable[str], path: str | Path) -> None:
    """Appends lines to a text file; in an object store, which cannot append, rewrites the whole file.

    Does nothing where writing is disabled (`leave_writing_to_another`).
    """
    if not _WRITER.here:
        return
    target, text = epath.Path(path), "".join(f"{line}\n" for line in lines)
    if is_remote(target):
        write_text((target.read_text() if target.exists() else "") + text, target)
        return
    with open(target, "a", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces `folder` once the `with` block exits without an error.

    In an object store, which has no atomic rename, the files are copied one by one. With several processes only the
    first one's folder is kept.
    """
    if _WRITER.here and not is_remote(folder):
        partial_folder = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        yield partial_folder
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.rename(folder)
        return
    with tempfile.TemporaryDirectory() as local:
        yield Path(local)
        for name in files_below(local) if _WRITER.here else ():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with open(Path(local) / name, "rb") as source, (folder / name).open("wb") as copy:
                shutil.copyfileobj(source, copy, COPIED_AT_ONCE)
