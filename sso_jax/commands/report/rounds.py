"""The numbers of a run's rounds on the report page: headline and table."""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

from sso_jax.commands.report.tables import format_number


class Headline(NamedTuple):
    """A number at the head of the page, and what it is to be compared with."""

    label: str
    value: str
    note: str = ""


def count_of_pairs(row: dict) -> str:
    """Returns `pairs / queries` of a round; the pairs alone without queries, and a dash without pairs."""
    pairs, queries = row.get("num_pairs"), row.get("num_queries")
    if pairs is None:
        return "-"
    return str(pairs) if queries is None else f"{pairs} / {queries}"


def _demonstrations(row: dict) -> str:
    """Returns the number of demonstrations of a round of recipe sft, which has no pairs; else a dash."""
    given = row.get("num_queries")
    return "-" if given is None or row.get("num_pairs") is not None else str(given)


def _number(field: str, digits: int = 3) -> Callable[[dict], str]:
    return lambda row: format_number(row.get(field), digits)


def _held_out(field: str) -> Callable[[dict], str]:
    return lambda row: format_number((row.get("held_out") or {}).get(field))


def _held_out_accuracy(row: dict) -> str:
    """Returns the accuracy of the reward model, or of the policy's loss, on held-out pairs."""
    reward = (row.get("reward") or {}).get("held_out_accuracy")
    return format_number((row.get("held_out") or {}).get("accuracy") if reward is None else reward)


def _answers(*path: str, digits: int = 3) -> Callable[[dict], str]:
    """Returns the text of a number of the held-out answers, which may be nested."""
    return lambda row: format_number(
        reduce(lambda part, name: (part or {}).get(name), path, row.get("held_out_answers")), digits
    )


COLUMNS: dict[str, Callable[[dict], str]] = {
    "iteration": lambda row: str(row["iteration"]),
    "policy quality": _number("policy_quality"),
    "held-out loss": _held_out("loss"),
    "held-out accuracy": _held_out_accuracy,
    "pairs / queries": count_of_pairs,
    "demonstrations": _demonstrations,
    "pair accuracy": _number("pair_accuracy"),
    "ties": _number("pair_ties"),
    "p(chosen)": _number("chosen_probability"),
    "p(rejected)": _number("rejected_probability"),
    "tokens": _number("response_tokens", 1),
    "answer tokens": _answers("mean_tokens", digits=1),
    "answers, 90th percentile": _answers("p90_tokens", digits=1),
    "answers cut": _answers("cut"),
    "repeated 4-grams": _answers("repeated_4grams"),
    "compressed size": _answers("compressed"),
    "empty answers": _answers("empty"),
    "refusals": _answers("refused"),
    "relevance": _answers("relevance"),
    "instructions, strict": _answers("instructions", "instruction_strict"),
    "instructions, loose": _answers("instructions", "instruction_loose"),
    "log p(start) - log p": _answers("start_log_ratio", digits=2),
    "steerability, y+": _answers("steerability", "chosen"),
    "steerability, y-": _answers("steerability", "rejected"),
}
"""Columns of the table by heading: the text of a round's cell, a dash if it has no value."""


def round_table(summary: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Returns headings and rows of the table of rounds; columns without a value are left out."""
    cells = {heading: [text(row) for row in summary] for heading, text in COLUMNS.items()}
    headings = [heading for heading in COLUMNS if set(cells[heading]) != {"-"}]
    return headings, [[cells[heading][i] for heading in headings] for i in range(len(summary))]


def headlines(summary: list[dict], metrics: list[dict]) -> list[Headline]:
    """Returns the numbers of the last round that a reader looks for first, and its last loss."""
    first, last = summary[0], summary[-1]
    own = ("policy quality", "held-out accuracy", "pair accuracy", "pairs / queries", "demonstrations", "p(chosen)")
    has_start = first["iteration"] == 0 and len(summary) > 1
    found = []
    for heading in own:
        before = COLUMNS[heading](first) if has_start else "-"
        note = "" if before == "-" else f"{before} before any update"
        found.append(Headline(heading, COLUMNS[heading](last), note))
    losses = [row["loss"] for row in metrics if row.get("loss") is not None]
    if losses:
        note = f"{format_number(losses[0])} in the first update" if len(losses) > 1 else ""
        found.append(Headline("loss", format_number(losses[-1]), note))
    return [headline for headline in found if headline.value != "-"]
