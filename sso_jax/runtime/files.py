"""Files of a run: written whole or not at all, local or in an object store."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from etils import epath


@dataclass
class _Writer:
    """Whether this process writes what a run writes once."""

    here: bool = True


_WRITER = _Writer()


def leave_writing_to_another() -> None:
    """From now on this process writes no text: of the processes of a run only the first does."""
    _WRITER.here = False


def is_remote(path: str | Path) -> bool:
    """Whether a path lies in an object store (`gs://...`), which has neither renaming in one step nor appending."""
    return "://" in os.fspath(path)


def files_below(folder: str | Path) -> list[str]:
    """Paths, from the folder on, of all files in it and in the folders in it, sorted.

    Not by `walk`, which names an object store's folders without the store (etils 1.15); nor is the empty object that
    some stores keep in place of a folder a file in it.
    """
    folder, found = epath.Path(folder), []
    for path in folder.iterdir():
        if path != folder:
            found += [f"{path.name}/{below}" for below in files_below(path)] if path.is_dir() else [path.name]
    return sorted(found)


def write_text(text: str, path: str | Path) -> None:
    """Writes a text file whole or not at all: a temporary file is synced, then renamed; an object store writes whole
    objects anyway.

    Only the process that writes for a run does anything (`leave_writing_to_another`).
    """
    path = epath.Path(path)
    if not _WRITER.here:
        return
    if is_remote(path):
        path.write_text(text)
        return
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def append_line(text: str, path: str | Path) -> None:
    """Adds a line to a text file; where nothing can be appended the file is written anew. As `write_text` otherwise."""
    path = epath.Path(path)
    if is_remote(path):
        write_text((path.read_text() if path.exists() else "") + text + "\n", path)
    elif _WRITER.here:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` once the `with` is left without an error.

    In an object store, which renames nothing in one step, its files are copied there one by one. Of several processes
    only the first one's folder is kept.
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
            (folder / name).write_bytes((Path(local) / name).read_bytes())
