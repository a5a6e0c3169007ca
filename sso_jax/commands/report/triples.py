"""The triples on the report page: kept and dropped ones, with principles, log-probs and judgments."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from sso_jax.commands.preference_dataset import DROPPED_FILE
from sso_jax.data.records import RESPONSES, Triple
from sso_jax.runtime.json_lines import each_line_if_any, each_record

MAX_ROWS, MAX_CHARACTERS, MAX_PAGE_CHARACTERS = 2000, 3000, 16_000_000
"""Maximum triples of a page and characters of a response or principle, and about the characters of a page, which keep
the page responsive. Prompts are whole: query and messages before it."""


def page_rows(directory: Path, iterations: list[int]) -> list[dict]:
    """Returns the rows of the page, newest round first; an even selection if there are too many, or too long ones."""
    newest_first = sorted(iterations, reverse=True)

    def rows() -> Iterator[dict]:
        return (row for k in newest_first for row in _round_rows(directory / f"iteration_{k}", k))

    lengths = [_num_characters(row) for row in rows()]
    step = max(1, -(-len(lengths) // MAX_ROWS), -(-sum(lengths) // MAX_PAGE_CHARACTERS))
    return list(islice(rows(), 0, None, step))  # read twice, so that only rows of the page are held


def _num_characters(row: dict) -> int:
    """Returns the length of all texts of a row."""
    texts = [row.get(name) for name in ("query", "good_system", "bad_system", *RESPONSES)]
    return sum(len(text) for text in (*texts, *(text for _, text in row.get("history", []))) if text)


def script_json(value) -> str:
    """Returns JSON that is safe inside a <script> element: no character can end the element or start another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _round_rows(folder: Path, iteration: int) -> Iterator[dict]:
    """Yields the kept pairs of a round, then the dropped ones whose responses are known."""
    if not (folder / "pairs.jsonl").is_file():
        return
    judged = {row["id"]: row["outcome"] for row in each_line_if_any(folder / "judgments.jsonl")}
    for triple in each_record(Triple, folder / "pairs.jsonl"):
        yield _row(triple, iteration, "kept", judged.get(triple.id))
    reasons = {row["id"]: row["reason"] for row in each_line_if_any(folder / DROPPED_FILE)}
    responses = folder / "responses.jsonl"
    for triple in each_record(Triple, responses) if reasons and responses.is_file() else ():
        if triple.id in reasons:
            yield _row(triple, iteration, reasons[triple.id], None)


def _row(triple: Triple, iteration: int, status: str, judged: str | None) -> dict:
    texts = {name: _cut(getattr(triple, name)) for name in ("good_system", "bad_system", *RESPONSES)}
    lengths = {name: len(ids) for name, ids in (triple.response_ids or {}).items()}
    means = {
        name: {
            context: round(row[name] / lengths[name], 3)
            for context, row in (triple.log_probs or {}).items()
            if name in row
        }
        for name in lengths
        if lengths[name]
    }
    said = {
        "iteration": iteration,
        "id": triple.id,
        "status": status,
        "query": triple.query,
        "features": list(triple.features),
        "tokens": lengths,
    }
    history = [[message["role"], message["content"]] for message in triple.history]
    extra = {"history": history, "swapped": triple.swapped, "judged": judged, "scores": triple.scores}
    extra["log_probs"] = means
    return {**said, **texts, **{name: value for name, value in extra.items() if value}}


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} [{len(text) - MAX_CHARACTERS} more characters]"
