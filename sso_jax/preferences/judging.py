"""Measures pairs with an external judge, which is asked about each pair twice with positions swapped.

The verdicts are only reported; nothing is trained on them.
"""

import random
import re
from collections.abc import Sequence
from importlib import resources

import json_repair

from sso_jax.data.records import Answer, Question, Triple
from sso_jax.data.thoughts import spoken_answer
from sso_jax.preferences.principles import asked_text

ORDERS = ("chosen_first", "rejected_first")
VERDICT_TOKENS = 64
"""Maximum tokens of a judge's answer."""


def draw_pairs(triples: Sequence[Triple], count: int, seed: str) -> list[Triple]:
    """Draws `count` pairs by the seed, or all if there are fewer, in their order."""
    chosen = random.Random(f"{seed}/judging").sample(range(len(triples)), min(count, len(triples)))
    return [triples[i] for i in sorted(chosen)]


def judging_questions(triples: list[Triple]) -> list[Question]:
    """Returns two questions per pair: with the chosen response as answer A, then as answer B."""
    template = resources.files(__package__).joinpath("judging_prompt.txt").read_text(encoding="utf-8").rstrip("\n")

    def question(triple: Triple, order: str) -> Question:
        sides = (triple.chosen, triple.rejected) if order == ORDERS[0] else (triple.rejected, triple.chosen)
        answers = [spoken_answer(side) or side for side in sides]
        texts = {"query": asked_text(triple), "first": answers[0], "second": answers[1]}
        text = re.sub(r"\{(query|first|second)\}", lambda found: texts[found.group(1)], template)
        return Question(f"{triple.id}/{order}", text)

    return [question(triple, order) for triple in triples for order in ORDERS]


def parse_verdict(text: str) -> str | None:
    """Parses a judge's answer, JSON or a few words, as `A`, `B` or `tie`; None if it says none or several of them."""
    text = spoken_answer(text) or ""
    start = text.find("{")
    head, brace, _ = text[start:].partition("}")
    read = json_repair.loads(head + brace) if start >= 0 else None
    if isinstance(read, dict) and "better" in read:
        text = str(read["better"])
    said = {word.upper() if len(word) == 1 else "tie" for word in re.findall(r"\b(?:A|B)\b|\b[Tt](?:ie|IE)\b", text)}
    return said.pop() if len(said) == 1 else None


def judgments(triples: list[Triple], answers: list[Answer]) -> list[dict]:
    """Returns one row per pair: the preference in each order, and the `outcome` of both.

    The outcome is chosen, rejected, tie (also if the two orders disagree), or None if a verdict could not be read.

    Args:
      triples: the judged pairs.
      answers: answers to `judging_questions(triples)`, in the same order.
    """
    sides = {ORDERS[0]: {"A": "chosen", "B": "rejected"}, ORDERS[1]: {"A": "rejected", "B": "chosen"}}
    rows = []
    for triple, pair in zip(triples, zip(answers[::2], answers[1::2], strict=True), strict=True):
        row: dict = {"id": triple.id}
        for order, answer in zip(ORDERS, pair, strict=True):
            verdict = None if answer.text is None else parse_verdict(answer.text)
            row[order] = None if verdict is None else sides[order].get(verdict, "tie")
            row[f"{order}_text"] = answer.text if answer.text is not None else f"[{answer.lost}]"
        first, second = row[ORDERS[0]], row[ORDERS[1]]
        row["outcome"] = None if first is None or second is None else first if first == second else "tie"
        rows.append(row)
    return rows


def summarize_judgments(rows: list[dict]) -> dict:
    """Summarizes judgments: accuracy (ties count half), ties, consistency, and the share of verdicts for answer A.

    All are over pairs with two readable verdicts, the last one over verdicts other than ties.
    """
    outcomes = [row["outcome"] for row in rows if row["outcome"] is not None]
    both = [(row[ORDERS[0]], row[ORDERS[1]]) for row in rows if row["outcome"] is not None]
    decided = [(place, preferred) for pair in both for place, preferred in enumerate(pair) if preferred != "tie"]

    def share(hits, total):
        return hits / total if total else None

    return {
        "num_judged": len(outcomes),
        "num_unread": len(rows) - len(outcomes),
        "accuracy": share(outcomes.count("chosen") + 0.5 * outcomes.count("tie"), len(outcomes)),
        "ties": share(outcomes.count("tie"), len(outcomes)),
        "consistency": share(sum(first == second for first, second in both), len(both)),
        "first_position": share(
            sum((preferred == "chosen") == (place == 0) for place, preferred in decided), len(decided)
        ),
    }
