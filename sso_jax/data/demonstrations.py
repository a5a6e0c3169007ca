"""Reads files of prompts with responses as `Demonstration` records, one for each assistant turn."""

from collections.abc import Iterator
from typing import Any

from sso_jax.data.chat import Chat
from sso_jax.data.conversations import PROMPT_FIELDS, Messages, check_query, read_prompt, read_turns, with_system
from sso_jax.data.records import Demonstration
from sso_jax.data.tables import check_characters, given_id, read_rows
from sso_jax.data.tokenizer import encode_text
from sso_jax.runtime.errors import InputError

RESPONSE_FIELDS = ("response", "output", "completion", "answer", "chosen")
CONVERSATION_FIELDS = ("messages", "conversations")


def load_demonstrations(path: str, split: str = "train") -> list[Demonstration]:
    """Reads conversations, or prompts with responses, from a JSON, JSON Lines or Parquet file or a data set.

    An `instruction` and an `input` form one prompt, separated by a blank line.

    Raises:
      InputError: names the file and line (or row) that has no prompt or no response.
    """
    rows = read_rows(path, split, "demonstrations.path")
    found = [
        Demonstration(
            f"{given_id(row) or number}" + (f"/{turn}" if turn else ""), prompt[-1]["content"], response, prompt[:-1]
        )
        for number, (place, row) in enumerate(rows)
        for turn, (prompt, response) in enumerate(_exchanges(row, place))
    ]
    if not found:
        raise InputError(f"demonstrations.path: {path!r} contains no demonstrations; give a file with at least one")
    return found


def _exchanges(row: dict[str, Any], place: str) -> Iterator[tuple[Messages, str]]:
    """Yields the (prompt, response) of every assistant turn."""
    key = next((key for key in CONVERSATION_FIELDS if isinstance(row.get(key), list)), None)
    if key is not None:
        turns = with_system(read_turns(row[key], key, place), row, place)
    else:
        turns = with_system(_prompt(row, place), row, place) + _response(row, place)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    first = 0 if key is not None else len(turns) - 1
    if not answers:
        raise InputError(f"{place}: {key} has no assistant turn; give a conversation with a response to learn")
    for i in answers:
        if i >= first:
            check_query(turns[:i], place)
            if not turns[i]["content"].strip():
                raise InputError(f"{place}: empty response; give a response to learn")
            yield turns[:i], turns[i]["content"]


def _prompt(row: dict[str, Any], place: str) -> Messages:
    if isinstance(row.get("instruction"), str) and isinstance(row.get("input"), str):
        both = [part for part in (row["instruction"], row["input"]) if part.strip()]
        return read_prompt({**row, "instruction": "\n\n".join(both)}, "instruction", place)
    return read_prompt(row, next((key for key in PROMPT_FIELDS if row.get(key)), None), place)


def _response(row: dict[str, Any], place: str) -> Messages:
    key = next((key for key in RESPONSE_FIELDS if row.get(key)), None)
    if key is None:
        raise InputError(
            f"{place}: no response; put it under one of {', '.join(RESPONSE_FIELDS)}, or give a conversation under "
            "messages"
        )
    if isinstance(row[key], str):
        return ({"role": "assistant", "content": check_characters(row[key], place)},)
    return read_turns(row[key], key, place)[-1:]


def demonstration_ids(chat: Chat, record: Demonstration) -> tuple[list[int], list[int]]:
    """Returns the token ids of the prompt and of the response, end of turn included."""
    response = [*encode_text(chat.tokenizer, record.response), chat.tokenizer.eos_token_id]
    return chat.prompt_ids(record.query, None, record.history), response
