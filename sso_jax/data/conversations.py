"""Converts rows of third-party files to messages: texts, or turns with `role`/`content` or `from`/`value`."""

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
    """Converts a turn or a list of turns to messages.

    Args:
      value: the turn or turns.
      key: name of the field, for errors.
      place: file and line, for errors.

    Raises:
      InputError: names the place and the key whose value is not a list of turns, or has a turn of an unknown role.
    """
    listed = [value] if isinstance(value, dict) else value
    if not isinstance(listed, list) or not all(isinstance(turn, dict) for turn in listed):
        raise InputError(f"{place}: {key} is {type(value).__name__}; give a text or a list of turns")
    turns = []
    for turn in listed:
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise InputError(
                f"{place}: {key} has a turn of role {role!r} with {type(text).__name__}; give text of one of the roles "
                f"{', '.join(ROLES)}"
            )
        turns.append({"role": ROLES[role], "content": check_characters(text, place)})
    return tuple(turns)


def read_prompt(row: dict[str, Any], key: str | None, place: str) -> Messages:
    """Reads the prompt under `key`: either turns, or a text preceded by the turns of `history`.

    Raises:
      InputError: if there is no prompt, or it is neither a text nor turns.
    """
    if key is None:
        raise InputError(
            f"{place}: no prompt; put it under one of {', '.join(PROMPT_FIELDS)}, or give whole conversations"
        )
    if not isinstance(row[key], str):
        return read_turns(row[key], key, place)
    earlier = _earlier_turns(row.get("history"), place)
    return (*earlier, {"role": "user", "content": check_characters(row[key], place)})


def with_system(turns: Messages, row: dict[str, Any], place: str) -> Messages:
    """Prepends the row's `system` message, if it has one and the turns do not."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or any(turn["role"] == "system" for turn in turns):
        return turns
    return ({"role": "system", "content": check_characters(system, place)}, *turns)


def check_query(turns: Messages, place: str) -> Messages:
    """Returns the turns unchanged; raises `InputError` if they do not end with a non-empty user turn."""
    if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise InputError(f"{place}: the prompt does not end with a user turn; give the turn that the responses answer")
    return turns


def _earlier_turns(history: Any, place: str) -> Messages:
    """Returns the turns before the query, given as messages or as lists of a question and its answer."""
    if not history:
        return ()
    if isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        pairs = [turn for question, answer in history for turn in (("user", question), ("assistant", answer))]
        history = [{"role": role, "content": text} for role, text in pairs]
    return read_turns(history, "history", place)
