"""A row of somebody's file in, its conversation as messages out: `role`/`content` or `from`/`value`, texts or lists of
turns.
"""

from typing import Any

from sso_jax.data.tables import check_characters
from sso_jax.runtime.errors import InputError

PROMPT_FIELDS = ("query", "prompt", "question", "instruction", "input", "messages", "conversations")
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "system": "system",
}

Messages = tuple[dict[str, str], ...]


def read_turns(value: Any, key: str, place: str) -> Messages:
    """Messages of a list of turns, or of a single turn.

    Raises:
      InputError: names the place and the key whose value is no list of turns, or has one by nobody known.
    """
    listed = [value] if isinstance(value, dict) else value
    if not isinstance(listed, list) or not all(isinstance(turn, dict) for turn in listed):
        raise InputError(f"{place}: {key} is {type(value).__name__}; give a text or a list of turns")
    turns = []
    for turn in listed:
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in ROLES or not isinstance(text, str):
            raise InputError(
                f"{place}: {key} has a turn by {role!r} with {type(text).__name__}; give text by one of "
                f"{', '.join(ROLES)}"
            )
        turns.append({"role": ROLES[role], "content": check_characters(text, place)})
    return tuple(turns)


def read_prompt(row: dict, key: str | None, place: str) -> Messages:
    """Messages of the prompt under `key`: a text with the turns of `history` before it, or turns; `system` heads
    them.
    """
    if key is None:
        raise InputError(
            f"{place}: no prompt; put it under one of {', '.join(PROMPT_FIELDS)}, or give whole conversations"
        )
    if isinstance(row[key], str):
        turns = (
            *_earlier_turns(row.get("history"), place),
            {"role": "user", "content": check_characters(row[key], place)},
        )
    else:
        turns = read_turns(row[key], key, place)
    return turns


def with_system(turns: Messages, row: dict, place: str) -> Messages:
    """The turns headed by the row's `system` message, where it has one and they do not."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or any(turn["role"] == "system" for turn in turns):
        return turns
    return ({"role": "system", "content": check_characters(system, place)}, *turns)


def check_query(turns: Messages, place: str) -> Messages:
    """The turns themselves, which must end with a user's text."""
    if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise InputError(
            f"{place}: the prompt does not end with a user's text; give the turn that the responses answer"
        )
    return turns


def _earlier_turns(history: Any, place: str) -> Messages:
    """Turns before the query: messages, or lists of a question and its answer."""
    if not history:
        return ()
    if isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        pairs = [turn for question, answer in history for turn in (("user", question), ("assistant", answer))]
        history = [{"role": role, "content": text} for role, text in pairs]
    return read_turns(history, "history", place)
