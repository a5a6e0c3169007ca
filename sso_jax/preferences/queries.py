"""A file or a data set of prompts in, distinct `Query` records out, dealt to the rounds without overlap."""

import json
import logging
import random
from pathlib import Path

from sso_jax.errors import InputError
from sso_jax.records import Query, read_numbered_lines

TEXT_FIELDS = ("query", "prompt", "instruction", "question", "input")
TURN_FIELDS = ("messages", "turns", "conversations")
ID_FIELDS = ("id", "uuid", "idx", "question_id", "key")
TABLES = {".parquet": "parquet", ".csv": "csv"}
"""Files that `datasets` reads, by the name of its reader."""
log = logging.getLogger(__name__)


def load_queries(path: str, split: str = "train") -> list[Query]:
    """Queries of a JSON, JSON Lines or Parquet file, or of a data set that `datasets` loads; later copies of a text are left out.

    Raises:
      InputError: names the file and line (or row) without a text, with an id used twice, or which is not JSON.
    """
    rows = _read_rows(path, split)
    if not rows:
        raise InputError(f"queries.path: {path!r} holds no queries; give a file with at least one")
    given = {_given_id(row) for _, row in rows}
    numbered = "{}" if given == {None} else "row-{}"
    queries: dict[str, Query] = {}
    used: set[str] = set()
    for number, (place, row) in enumerate(rows):
        query = Query(_given_id(row) or numbered.format(number), _text(row, place))
        if query.query in queries:
            continue
        if query.id in used:
            raise InputError(f"{place}: id {query.id!r} was used before; give each query its own id, or none")
        used.add(query.id)
        queries[query.query] = query
    if len(queries) < len(rows):
        log.info("%s: %d of %d queries are copies of others and left out", path, len(rows) - len(queries), len(rows))
    return list(queries.values())


def _read_rows(path: str, split: str) -> list[tuple[str, dict]]:
    """(place, row) of every row; the place is what an error message names."""
    file = Path(path)
    if file.is_file() and file.suffix == ".jsonl":
        return [(f"{path}, line {number}", row) for number, row in read_numbered_lines(file)]
    if file.is_file() and file.suffix == ".json":
        return _read_json(file)
    if not file.exists() and (file.suffix in (".json", ".jsonl", *TABLES) or file.is_absolute() or path.startswith(".")):
        raise InputError(f"queries.path: no file {path!r}; give JSON, JSON Lines, Parquet or the id of a data set")
    if file.is_file() and file.suffix not in TABLES:
        raise InputError(
            f"queries.path: {path!r} is of no kind that can be read; give .json, .jsonl, {', '.join(TABLES)} or the id of a data set"
        )
    import datasets  # slow to load, and most runs need none of it

    try:
        if file.is_file():
            table = datasets.load_dataset(TABLES[file.suffix], data_files=str(file), split="train")
        else:
            table = datasets.load_dataset(path, split=split)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"queries.path: {path!r} is no data set that can be read ({reason}); check the name, the split or the network"
        ) from error
    return [(f"{path}, row {i}", row) for i, row in enumerate(table)]


def _read_json(file: Path) -> list[tuple[str, dict]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}, line {error.lineno}: not valid JSON ({error.msg}); give a list of objects") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f'{file}: not a list of JSON objects; give [{{"query": ...}}, ...]')
    return [(f"{file}, record {i}", row) for i, row in enumerate(rows, start=1)]


def _first_user_turn(turns) -> str | None:
    """First turn of a list of texts, or first user turn of a list of messages (`role`/`content` or `from`/`value`)."""
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, str):
            return turn
        if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("user", "human"):
            return turn.get("content", turn.get("value"))
    return None


def _given_id(row: dict) -> str | None:
    return next((str(row[field]) for field in ID_FIELDS if row.get(field) is not None), None)


def _text(row: dict, place: str) -> str:
    found = next((row[field] for field in TEXT_FIELDS + TURN_FIELDS if row.get(field)), None)
    text = found if isinstance(found, str) else _first_user_turn(found)
    if not isinstance(text, str) or not text.strip():
        fields = ", ".join(TEXT_FIELDS + TURN_FIELDS)
        raise InputError(f"{place}: no text; put the query under one of {fields}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{place}: half of a surrogate pair, which is no character; mend the text")
    return text


def deal(queries: list[Query], per_iteration: int, num_iterations: int, seed: int) -> list[list[Query]]:
    """Queries of each round: shuffled by the seed, no query in two rounds. Too few are spread evenly, which the log says.

    Raises:
      InputError: if there is not one query for each round.
    """
    if len(queries) < num_iterations:
        raise InputError(
            f"queries.path: {len(queries)} usable queries for {num_iterations} rounds; give more queries or lower run.iterations"
        )
    share = min(per_iteration, len(queries) // num_iterations)
    if share < per_iteration:
        log.warning("%d usable queries give %d a round, not queries.per_iteration %d", len(queries), share, per_iteration)
    order = list(queries)
    random.Random(f"{seed}/queries").shuffle(order)
    return [order[k * share : (k + 1) * share] for k in range(num_iterations)]
