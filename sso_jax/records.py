"""Files of records in and out: the kinds of record of the chain, and the reading and writing of their JSON Lines."""

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etils import epath

from sso_jax.errors import InputError

CONTEXTS = ("plain", "positive", "negative")
"""The prompts x, x+ and x-."""
RESPONSES = ("chosen", "rejected", "original")
"""The responses y+, y- and y_o."""


Dropped = dict[str, str]
"""Records that are left out: the reason by id."""


@dataclass(frozen=True)
class Query:
    """One user turn, x."""

    id: str
    query: str


@dataclass(frozen=True)
class Question:
    """Something to ask a model, and the id that its answer is kept under."""

    id: str
    text: str


@dataclass(frozen=True)
class Answer:
    """What a model said: a text, or None with the reason why there is none."""

    text: str | None
    lost: str | None = None


@dataclass(frozen=True)
class PrincipledQuery:
    """A query with the features that steer it, and for each feature the adjective and the principle of both sides."""

    id: str
    query: str
    features: tuple[str, ...]
    good_adjectives: tuple[str, ...]
    bad_adjectives: tuple[str, ...]
    good_principles: tuple[str, ...]
    bad_principles: tuple[str, ...]
    features_text: str | None = None
    """What was written when features were asked for; None where nothing was asked or came back."""
    num_random_features: int = 0
    """How many of the features were drawn at random because not enough were named."""
    num_fallbacks: int = 0
    """How many of the features have the table's principles because none could be read from what was written."""


@dataclass(frozen=True)
class SteeredQuery:
    """A query with what steers it: features, and the system messages p+ and p-."""

    id: str
    query: str
    features: tuple[str, ...]
    good_system: str
    bad_system: str
    features_text: str | None = None
    """What was written when features were asked for; None where nothing was asked or came back."""
    num_random_features: int = 0
    """How many of the features were drawn at random because not enough were named."""
    num_fallbacks: int = 0
    """How many of the features have the table's principles because none could be read from what was written."""


@dataclass(frozen=True)
class Triple:
    """A query with its two system messages and its responses y+, y- and y_o: a line of `pairs.jsonl`.

    A plain preference pair is a triple without system messages and without y_o.
    """

    id: str
    query: str
    good_system: str | None
    bad_system: str | None
    chosen: str
    rejected: str
    original: str | None
    features: tuple[str, ...] = ()
    response_ids: dict[str, list[int]] | None = None
    """Sampled token ids by response, end of turn included; None where only texts are known."""
    tokens_hash: str | None = None
    """Hash of the tokenizer and template that `response_ids` belong to."""
    log_probs: dict[str, dict[str, float]] | None = None
    """Reference log-probs, sums in nats, by context and response."""
    swapped: bool = False
    """Whether a control put chosen and rejected in the other order."""
    history: tuple[dict[str, str], ...] = ()
    """Messages (`role`, `content`) before the query, a system message of the plain prompt first where there is one."""
    scores: dict[str, float] | None = None
    """What somebody gave the responses, by response, where the source has it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of the source file that the chain does not use; they are written back."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt with a response to learn."""

    id: str
    query: str
    response: str
    history: tuple[dict[str, str], ...] = ()
    """Messages (`role`, `content`) before the query."""


def to_json(record) -> dict:
    """The record as a JSON object; `extra` keys stand beside the record's own."""
    fields = dataclasses.asdict(record)
    extra = fields.pop("extra", {})
    return {**fields, **extra}


def from_json(kind: type, fields: dict):
    """The record of class `kind` that `to_json` wrote."""
    known = {f.name: f for f in dataclasses.fields(kind) if f.name != "extra"}
    own = {name: tuple(value) if _is_tuple(known[name]) else value for name, value in fields.items() if name in known}
    if not any(f.name == "extra" for f in dataclasses.fields(kind)):
        return kind(**own)
    return kind(**own, extra={name: value for name, value in fields.items() if name not in known})


def _is_tuple(declared: dataclasses.Field) -> bool:
    return getattr(declared.type, "__origin__", None) is tuple


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

    Not by `walk`, which names an object store's folders without the store (etils 1.15); nor is the empty object that some stores keep in
    place of a folder a file in it.
    """
    folder, found = epath.Path(folder), []
    for path in folder.iterdir():
        if path != folder:
            found += [f"{path.name}/{below}" for below in files_below(path)] if path.is_dir() else [path.name]
    return sorted(found)


def read_json_lines(path: str | Path) -> list[dict]:
    """Objects of a JSON Lines file, empty lines skipped."""
    return [row for _, row in read_numbered_lines(path)]


def read_numbered_lines(path: str | Path) -> list[tuple[int, dict]]:
    """(line number, object) of a JSON Lines file, empty lines skipped.

    Raises:
      InputError: names the file and the line that is not a JSON object.
    """
    rows = []
    for number, line in enumerate(epath.Path(path).read_bytes().split(b"\n"), start=1):
        place = f"{path}, line {number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{place}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
        if text.strip():
            rows.append((number, _parse_object(text, place)))
    return rows


def _parse_object(text: str, place: str) -> dict:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # beside malformed JSON, numbers of thousands of digits and endless nesting
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{place}: not valid JSON ({why}); give one JSON object a line") from error
    if not isinstance(row, dict):
        raise InputError(f"{place}: {type(row).__name__} instead of a JSON object; give one JSON object a line")
    return row


def read_records(kind: type, path: str | Path) -> list:
    """Records of class `kind` from a stage file that `write_records` wrote."""
    return [from_json(kind, row) for row in read_json_lines(path)]


def write_records(records: Iterable, path: str | Path) -> None:
    """Writes records or dictionaries as JSON Lines, whole or not at all."""
    rows = (record if isinstance(record, dict) else to_json(record) for record in records)
    write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), path)


def write_text(text: str, path: str | Path) -> None:
    """Writes a text file whole or not at all: a temporary file is synced, then renamed; an object store writes whole objects anyway.

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
