"""Reads the questions of a benchmark: the user turns and the unchanged id of each."""

from dataclasses import dataclass
from typing import Any

from sso_jax.data.conversations import ROLES
from sso_jax.data.tables import ID_FIELDS, check_characters, read_rows
from sso_jax.runtime.errors import InputError

TEXT_FIELDS = ("instruction", "prompt", "query", "question", "input")
TURN_FIELDS = ("turns", "messages", "conversations")


@dataclass(frozen=True)
class BenchmarkQuestion:
    """A question's user turns; `id` keeps its type, because the benchmark's tools look answers up by it."""

    id: int | str
    turns: tuple[str, ...]


def load_questions(path: str, split: str = "train") -> list[BenchmarkQuestion]:
    """Reads questions from a file or data set, in order; duplicates stay, as a benchmark needs an answer to each.

    Raises:
      InputError: names the row that has no text, or whose id was used before.
    """
    rows = read_rows(path, split, "queries.path")
    if not rows:
        raise InputError(f"queries.path: {path!r} contains no questions; give a file with at least one")
    questions, used = [], set()
    for number, (place, row) in enumerate(rows):
        name = next((row[field] for field in ("uid", *ID_FIELDS) if isinstance(row.get(field), int | str)), number)
        if name in used:
            raise InputError(f"{place}: id {name!r} was used before; give each question its own id")
        used.add(name)
        questions.append(BenchmarkQuestion(name, _turns(row, place)))
    return questions


def _turns(row: dict[str, Any], place: str) -> tuple[str, ...]:
    found = next((row[field] for field in (*TURN_FIELDS, *TEXT_FIELDS) if row.get(field)), None)
    listed = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    texts = [turn if isinstance(turn, str) else _user_text(turn) for turn in listed]
    turns = tuple(check_characters(text, place) for text in texts if text is not None)
    if not turns or not all(turn.strip() for turn in turns):
        raise InputError(f"{place}: no text; put the question under one of {', '.join((*TURN_FIELDS, *TEXT_FIELDS))}")
    return turns


def _user_text(turn: object) -> str | None:
    """Returns the text of a user message; None for other messages."""
    if not isinstance(turn, dict):
        return None
    role, text = turn.get("role", turn.get("from", "user")), turn.get("content", turn.get("value"))
    return text if isinstance(role, str) and ROLES.get(role) == "user" and isinstance(text, str) else None
