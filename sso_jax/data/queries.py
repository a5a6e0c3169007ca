"""Reads prompts from a file or data set as distinct `Query` records, and splits them over the rounds."""

import logging
import random
from typing import Any

from sso_jax.data.records import Query
from sso_jax.data.tables import check_characters, given_id, read_rows
from sso_jax.runtime.errors import InputError

TEXT_FIELDS = ("query", "prompt", "instruction", "question", "input")
TURN_FIELDS = ("messages", "turns", "conversations")
log = logging.getLogger(__name__)


def load_queries(path: str, split: str = "train") -> list[Query]:
    """Reads queries from a JSON, JSON Lines or Parquet file, or a data set of `datasets`; skips duplicate texts.

    Raises:
      InputError: names the file and line (or row) that has no text, repeats an id, or is not JSON.
    """
    rows = read_rows(path, split, "queries.path")
    if not rows:
        raise InputError(f"queries.path: {path!r} contains no queries; give a file with at least one")
    given = {given_id(row) for _, row in rows}
    numbered = "{}" if given == {None} else "row-{}"
    queries: dict[str, Query] = {}
    used: set[str] = set()
    for number, (place, row) in enumerate(rows):
        query = Query(given_id(row) or numbered.format(number), _text(row, place))
        if query.query in queries:
            continue
        if query.id in used:
            raise InputError(f"{place}: id {query.id!r} was used before; give each query its own id, or none")
        used.add(query.id)
        queries[query.query] = query
    if len(queries) < len(rows):
        log.info("%s: skipped %d of %d queries, which duplicate others", path, len(rows) - len(queries), len(rows))
    return list(queries.values())


def _first_user_turn(turns: object) -> object:
    """Returns the first of a list of texts, or the first user turn of messages (`role`/`content` or `from`/`value`)."""
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, str):
            return turn
        if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("user", "human"):
            return turn.get("content", turn.get("value"))
    return None


def _text(row: dict[str, Any], place: str) -> str:
    found = next((row[field] for field in TEXT_FIELDS + TURN_FIELDS if row.get(field)), None)
    text = found if isinstance(found, str) else _first_user_turn(found)
    if not isinstance(text, str) or not text.strip():
        fields = ", ".join(TEXT_FIELDS + TURN_FIELDS)
        raise InputError(f"{place}: no text; put the query under one of {fields}")
    return check_characters(text, place)


def deal(queries: list[Query], per_iteration: int, num_iterations: int, seed: int) -> list[list[Query]]:
    """Shuffles the queries by the seed and assigns them to rounds, no query to two rounds.

    If there are fewer than `per_iteration` per round, every round gets the same lower number, with a warning.

    Raises:
      InputError: if there are fewer queries than rounds.
    """
    if len(queries) < num_iterations:
        raise InputError(
            f"queries.path: {len(queries)} usable queries for {num_iterations} rounds; give more queries or lower "
            "run.iterations"
        )
    share = min(per_iteration, len(queries) // num_iterations)
    if share < per_iteration:
        log.warning(
            "%d usable queries give %d per round, not queries.per_iteration %d", len(queries), share, per_iteration
        )
    order = list(queries)
    random.Random(f"{seed}/queries").shuffle(order)
    return [order[k * share : (k + 1) * share] for k in range(num_iterations)]
