"""Reads files of preference pairs in common formats as `Triple` records, with p+, p- and y_o where the file has them.

Supports this project's own records, those of the SSO releases (`p_system, n_system, raw`), and plain preferences:
`prompt, chosen, rejected`; `question, response_j, response_k` (j is the better one); and `input, output_1, output_2,
label` (1 or 2, the better one). Responses are texts, single turns or whole conversations; the turns of a conversation
before its last one are the prompt.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from sso_jax.data.conversations import PROMPT_FIELDS, Messages, check_query, read_prompt, read_turns, with_system
from sso_jax.data.records import RESPONSES, Cell, Triple
from sso_jax.data.tables import ID_FIELDS, check_characters, given_id, read_rows
from sso_jax.runtime.errors import InputError

SCORE_FIELDS = ("{}_score", "score_{}", "{}_rating", "{}-rating", "{}-score", "rating_{}")
SYSTEMS = (("good_system", "p_system"), ("bad_system", "n_system"))
ORIGINALS = ("original", "raw")
OWN_FIELDS = ("features", "response_ids", "tokens_hash", "log_probs", "swapped", "history", "scores")
"""Fields of our own records besides texts; a field of another file with such a name is kept as `source_NAME`."""


@dataclass(frozen=True)
class _Conversation:
    """The turns before a response, as messages (`role`, `content`), and the response."""

    turns: Messages
    response: str = ""


def load_pairs(path: str, split: str = "train", field: str = "pairs.path") -> list[Triple]:
    """Reads pairs from a JSON, JSON Lines or Parquet file, or from a data set that `datasets` loads, in order.

    A repeated id gets a number (`7`, `7#2`), because one prompt may have several pairs.

    Args:
      path: file or data set.
      split: split of a data set.
      field: config field that gave the path, for errors.

    Raises:
      InputError: names the file and line (or row) that has no prompt, lacks a response, or whose responses answer
        different prompts.
    """
    rows = read_rows(path, split, field)
    if not rows:
        raise InputError(f"{field}: {path!r} contains no pairs; give a file with at least one")
    seen: Counter[str] = Counter()
    pairs = []
    for number, (place, row) in enumerate(rows):
        name = given_id(row) or str(number)
        seen[name] += 1
        pairs.append(_read_pair(row, place, name if seen[name] == 1 else f"{name}#{seen[name]}"))
    return pairs


def _read_pair(row: dict[str, Any], place: str, name: str) -> Triple:
    responses, used = _responses(row, place)
    turns = _prompt(row, responses, used, place)
    good_system, bad_system = (_text_under(row, keys, used, place) for keys in SYSTEMS)
    own = "query" in row and ("good_system" in row or "response_ids" in row)
    known = {*used, *ID_FIELDS, *(OWN_FIELDS if own else ())}
    extra = {(f"source_{key}" if key in OWN_FIELDS else key): value for key, value in row.items() if key not in known}
    parts: dict[str, Any] = _own_parts(row, place) if own else {"scores": _scores(row, place)}
    return Triple(
        id=name,
        query=turns[-1]["content"],
        good_system=good_system,
        bad_system=bad_system,
        chosen=responses["chosen"].response,
        rejected=responses["rejected"].response,
        original=responses["original"].response if "original" in responses else None,
        history=turns[:-1],
        extra=extra,
        **parts,
    )


def _responses(row: dict[str, Any], place: str) -> tuple[dict[str, _Conversation], set[str]]:
    """Returns the row's responses by our names, and the keys under which they were found."""
    if "output_1" in row and "output_2" in row:
        label = row.get("label")
        if str(label) not in ("1", "2"):
            raise InputError(f"{place}: label {label!r}; give 1 or 2, the number of the better output")
        other = "2" if str(label) == "1" else "1"
        keys = {"chosen": f"output_{label}", "rejected": f"output_{other}"}
        used = {"output_1", "output_2", "label"}
    elif "response_j" in row:
        keys = {"chosen": "response_j", "rejected": "response_k"}
        used = set(keys.values())
    else:
        original = next((key for key in ORIGINALS if row.get(key) is not None), "original")
        keys = {"chosen": "chosen", "rejected": "rejected", "original": original}
        used = set(keys.values())
    missing = [keys[response] for response in ("chosen", "rejected") if row.get(keys[response]) is None]
    if missing:
        raise InputError(f"{place}: no {' and no '.join(missing)}; give both responses of the pair")
    found = {response: _response(row[key], key, place) for response, key in keys.items() if row.get(key) is not None}
    return found, used


def _response(value: Any, key: str, place: str) -> _Conversation:
    if isinstance(value, str):
        return _Conversation((), check_characters(value, place))
    turns = read_turns(value, key, place)
    if not turns or turns[-1]["role"] != "assistant":
        raise InputError(
            f"{place}: {key} does not end with an assistant turn; give the response as its last turn, or as text"
        )
    return _Conversation(turns[:-1], turns[-1]["content"])


def _prompt(row: dict[str, Any], responses: dict[str, _Conversation], used: set[str], place: str) -> Messages:
    """Returns the messages up to the query, included: those of the conversations, else those under the prompt's key."""
    spoken = {_hashable(conversation.turns) for conversation in responses.values()} - {()}
    key = next((key for key in PROMPT_FIELDS if row.get(key)), None)
    used |= {"system", "history"} | ({key} if key is not None else set())
    if len(spoken) > 1:
        raise InputError(
            f"{place}: the responses answer different prompts; give conversations that differ in their last turn only"
        )
    turns = tuple(dict(turn) for turn in spoken.pop()) if spoken else read_prompt(row, key, place)
    return check_query(with_system(turns, row, place), place)


def _hashable(turns: Messages) -> tuple[tuple[tuple[str, str], ...], ...]:
    return tuple(tuple(sorted(turn.items())) for turn in turns)


def _text_under(row: dict[str, Any], keys: tuple[str, ...], used: set[str], place: str) -> str | None:
    """Returns the first non-empty text under these keys, or None."""
    key = next((key for key in keys if row.get(key)), None)
    used |= set(keys)
    if key is not None and not isinstance(row[key], str):
        raise InputError(f"{place}: {key} is {type(row[key]).__name__}; give a text")
    return None if key is None else check_characters(row[key], place)


def _scores(row: dict[str, Any], place: str) -> dict[str, float] | None:
    """Returns the scores of chosen and rejected if the row has both under one of the usual names, else None."""
    given = row.get("scores")
    found: dict[str, Any] | None
    if isinstance(given, dict) and {"chosen", "rejected"} <= given.keys():
        found = {response: given[response] for response in RESPONSES if given.get(response) is not None}
    else:
        named = ({r: row.get(field.format(r)) for r in ("chosen", "rejected")} for field in SCORE_FIELDS)
        found = next((scores for scores in named if None not in scores.values()), None)
    if found is None:
        return None
    for response, score in found.items():
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise InputError(f"{place}: score {score!r} of {response}; give a number")
    return {response: float(score) for response, score in found.items()}


def _own_parts(row: dict[str, Any], place: str) -> dict[str, Any]:
    """Reads the fields of our own records besides texts. Log-probs are skipped, as they belong to another policy."""
    ids, features = row.get("response_ids"), row.get("features") or []
    if ids is not None and not (isinstance(ids, dict) and all(map(_is_ids, ids.values()))):
        raise InputError(f"{place}: response_ids does not map responses to lists of token ids; give that, or omit it")
    if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
        raise InputError(f"{place}: features is {features!r}; give a list of names, or omit it")
    return {
        "features": tuple(features),
        "response_ids": ids,
        "tokens_hash": row.get("tokens_hash"),
        "swapped": bool(row.get("swapped")),
        "scores": _scores(row, place),
    }


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_id, value))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_parts(pairs: list[Triple], cells: list[Cell], path: str, needed_by: str, field: str = "pairs.path") -> None:
    """Raises `InputError` with ids if pairs lack a system message, response or scores that the `cells` need.

    Args:
      pairs: pairs of a file.
      cells: (context, response) log-probs that the objective uses.
      path: the file, for errors.
      needed_by: name of what needs the cells, for errors.
      field: config field that gave the path, for errors.
    """
    parts = {
        "positive": "good_system",
        "negative": "bad_system",
        "score_conditioned_chosen": "scores",
        "score_conditioned_rejected": "scores",
    }
    wanted = {parts[context] for context, _ in cells if context in parts} | {response for _, response in cells}
    lacking = {part: [pair.id for pair in pairs if getattr(pair, part) is None] for part in sorted(wanted)}
    lacking = {part: ids for part, ids in lacking.items() if ids}
    if lacking:
        ids = list(dict.fromkeys(name for names in lacking.values() for name in names))
        shown = ", ".join(map(repr, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
        raise InputError(
            f"{field}: {len(ids)} of {len(pairs)} pairs of {path} lack {', '.join(lacking)}, which {needed_by} needs: "
            f"ids {shown}; give pairs that have it, or an objective on the plain pair alone (objective.form pairwise "
            "with a pairwise base)"
        )
