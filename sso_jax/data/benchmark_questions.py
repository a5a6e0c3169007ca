"""A benchmark's file of questions in, the user turns of each with its id as it stands out."""

from dataclasses import dataclass

from sso_jax.data.conversations import ROLES
from sso_jax.data.tables import ID_FIELDS, check_characters, read_rows
from sso_jax.runtime.errors import InputError

TEXT_FIELDS = ("instruction", "prompt", "query", "question", "input")
TURN_FIELDS = ("turns", "messages", "conversations")


@dataclass(frozen=True)
class BenchmarkQuestion:
    """What is asked, turn by turn; `id` keeps its type, by which a benchmark finds its answers."""

    id: int | str
    turns: tuple[str, ...]


def load_questions(path: str, split: str = "train") -> list[BenchmarkQuestion]:
    """Questions of a JSON, JSON Lines or other file, in their order, copies included: a benchmark wants an answer to
    each.

    Raises:
      InputError: names the row without a text, or whose id was used before.
    """
    rows = read_rows(path, split, "queries.path")
    if not rows:
        raise InputError(f"queries.path: {path!r} holds no questions; give a file with at least one")
    questions, used = [], set()
    for number, (place, row) in enumerate(rows):
        name = next((row[field] for field in ("uid", *ID_FIELDS) if isinstance(row.get(field), int | str)), number)
        if name in used:
            raise InputError(f"{place}: id {name!r} was used before; give each question its own")
        used.add(name)
        questions.append(BenchmarkQuestion(name, _turns(row, place)))
    return questions


def _turns(row: dict, place: str) -> tuple[str, ...]:
    found = next((row[field] for field in (*TURN_FIELDS, *TEXT_FIELDS) if row.get(field)), None)
    listed = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    texts = [turn if isinstance(turn, str) else _user_text(turn) for turn in listed]
    turns = tuple(check_characters(text, place) for text in texts if text is not None)
    if not turns or not all(turn.strip() for turn in turns):
        raise InputError(f"{place}: no text; put what is asked under one of {', '.join((*TURN_FIELDS, *TEXT_FIELDS))}")
    return turns


def _user_text(turn) -> str | None:
    """Text of a message by the user; None for others."""
    if not isinstance(turn, dict):
        return None
    role, text = turn.get("role", turn.get("from", "user")), turn.get("content", turn.get("value"))
    return text if ROLES.get(role) == "user" and isinstance(text, str) else None
