"""Reads files of prompts with responses as `Demonstration` records, one for each assistant turn."""

from sso_jax.data.chat import Chat, encode_response
from sso_jax.data.conversations import (
    RESPONSE_FIELDS,
    Turn,
    check_query,
    fields_present,
    messages,
    read_prompt,
    read_text_or_turns,
    read_turns,
    with_system,
)
from sso_jax.data.records import Demonstration
from sso_jax.data.rows import Records, Row, Table, read_records
from sso_jax.data.tables import read_rows
from sso_jax.data.verdicts import is_desirable, is_labelled

CONVERSATION_FIELDS = ("messages", "conversations", "conversation")


def load_demonstrations(table: Table) -> Records[Demonstration]:
    """Reads conversations, or prompts with responses, from a file, folder or data set.

    Every assistant turn of a conversation is a demonstration, except those of weight 0, which are counted in the log.

    Raises:
      InputError: if there are none or too many bad rows; names the file and line (or row) without prompt or response.
    """

    def read(row: Row, number: int) -> list[Demonstration]:
        if is_labelled(row) and not is_desirable(row):
            raise row.error("undesirable", f"the completion's label is {row.fields['label']!r}")
        return _demonstrations(row, row.given_id() or str(number))

    return read_records(read_rows(table), table, "demonstrations", read)


def _demonstrations(row: Row, name: str) -> list[Demonstration]:
    """Returns the demonstrations of a row; those after the first have the number of their answer in the id."""
    key, turns, first = _conversation(row)
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant" and i >= first]
    taught = [(k, i) for k, i in enumerate(answers) if turns[i].weight]
    if any(not turns[i].text.strip() for _, i in taught):
        raise row.error("empty_response", "empty response; give a response to learn")
    if len(taught) < len(answers):
        row.left_out[f"{key}: assistant turns of weight 0"] += 1
    if not taught:
        raise row.error("nothing_to_learn", "no assistant turn of weight 1; give a response to learn")
    if taught[-1][1] + 1 < len(turns):
        row.left_out[f"{key}: turns after the last response to learn"] += 1
    return [
        Demonstration(
            f"{name}/{k}" if k else name,
            check_query(row, turns[:i])[-1].text,
            turns[i].text,
            messages(turns[: i - 1]),
        )
        for k, i in taught
    ]


def _conversation(row: Row) -> tuple[str, list[Turn], int]:
    """Returns the field of a row's responses, its turns, and the index of the first one that may be learned."""
    key = row.first(CONVERSATION_FIELDS)
    turns = [] if key is None else read_turns(row, key, row.fields[key])
    if key is not None and any(turn.role == "assistant" for turn in turns):
        row.used.add(key)
        return key, with_system(row, turns), 0
    name = row.first(RESPONSE_FIELDS)
    if name is None:
        raise row.error(
            "no_response",
            f"no response, and no assistant turn in {key or 'a conversation'}; put the response under one of "
            f"{', '.join(RESPONSE_FIELDS)}, or give a conversation under messages{fields_present(row)}",
        )
    read = read_text_or_turns(row, name, row.take(name))
    answer = [Turn("assistant", read)] if isinstance(read, str) else read
    if len(answer) > 1 and answer[-1].role == "assistant":
        return name, with_system(row, answer), len(answer) - 1
    prompt = read_prompt(row)
    return name, [*prompt, *answer], len(prompt)


def demonstration_ids(chat: Chat, record: Demonstration) -> tuple[list[int], list[int]]:
    """Returns the token ids of the prompt and of the response, end of turn included."""
    return chat.prompt_ids(record.query, None, record.history), encode_response(chat.tokenizer, record.response)
