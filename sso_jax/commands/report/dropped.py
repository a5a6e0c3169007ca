"""What a run dropped, by reason: numbers of summary.json, and the rows that `dropped.jsonl` names."""

from pathlib import Path
from typing import NamedTuple

from sso_jax.commands.preference_dataset import DROPPED_FILE
from sso_jax.runtime.json_lines import each_line_if_any

MAX_LISTED, MAX_CHARACTERS = 1000, 200
"""Maximum rows listed for a reason, and maximum characters of their queries, which keep the page responsive."""


class Dropped(NamedTuple):
    """The rows that a run dropped for one reason."""

    reason: str
    counts: dict[int, int]
    """Number of rows by iteration; iteration 0 is before the first round."""
    rows: list[tuple[int, str, str]]
    """(iteration, id, head of the query) of at most `MAX_LISTED` rows; the query is empty if it is unknown."""

    @property
    def total(self) -> int:
        """Number of rows dropped for this reason in all iterations."""
        return sum(self.counts.values())


def dropped_by_reason(directory: Path, summary: list[dict]) -> list[Dropped]:
    """Returns all that the run dropped, by reason in alphabetical order."""
    counts: dict[str, dict[int, int]] = {}
    rows: dict[str, list[tuple[int, str, str]]] = {}
    for row in summary:
        iteration, numbers = row["iteration"], row.get("dropped") or {}
        named: dict[str, int] = {}
        listed: dict[str, str] = {}
        for own in each_line_if_any(directory / f"iteration_{iteration}" / DROPPED_FILE):
            name, reason = str(own["id"]), own["reason"]
            named[reason] = named.get(reason, 0) + 1
            if len(rows.setdefault(reason, [])) < MAX_LISTED:
                rows[reason].append((iteration, name, ""))
                listed[name] = ""
        for own in each_line_if_any(directory / f"iteration_{iteration}" / "queries.jsonl") if listed else ():
            if own["id"] in listed:
                listed[own["id"]] = _head(own["query"])
        for reason, own_rows in rows.items():
            rows[reason] = [(k, name, listed[name] if k == iteration else text) for k, name, text in own_rows]
        for reason, count in {**named, **numbers}.items():
            counts.setdefault(reason, {})[iteration] = count
    return [Dropped(reason, counts[reason], rows.get(reason, [])) for reason in sorted(counts)]


def _head(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."
