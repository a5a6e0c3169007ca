"""Judgments of pairs asked twice with positions swapped, from questions to accuracy."""

import pytest

from sso_jax.data.records import Answer, Triple
from sso_jax.preferences.judging import (
    ORDERS,
    draw_pairs,
    judging_questions,
    judgments,
    parse_verdict,
    summarize_judgments,
)


def triple(number: int, **texts) -> Triple:
    texts = {name: texts.get(name, f"{name} {number}") for name in ("query", "chosen", "rejected", "original")}
    return Triple(id=str(number), good_system="g", bad_system="b", **texts)


def test_each_pair_is_asked_in_both_orders():
    first, second = judging_questions(
        [triple(1, query="Why {second}?", chosen="because {first}", rejected="no {query}")]
    )
    assert (first.id, second.id) == ("1/chosen_first", "1/rejected_first")
    for question, answers in ((first, ("because {first}", "no {query}")), (second, ("no {query}", "because {first}"))):
        assert "[query]\nWhy {second}?\n[end of query]" in question.text  # texts are put in as they are, once
        assert f"[answer A]\n{answers[0]}\n[end of answer A]" in question.text
        assert f"[answer B]\n{answers[1]}\n[end of answer B]" in question.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"better": "A"}', "A"),
        ("```json\n{'better': 'B'}\n```", "B"),
        ('{"better": "tie"', "tie"),
        ("Answer B is better.", "B"),
        ("A", "A"),
        ("<think>A is long, B is short</think> **A**", "A"),
        ("It is a tie.", "tie"),
        ("Both A and B are fine", None),
        ("a better answer than any", None),
        ('{"better": "both"}', None),
        ("", None),
    ],
)
def test_verdicts_are_read_from_json_or_a_few_words(text, expected):
    assert parse_verdict(text) == expected


def answers(*verdicts: str | None) -> list[Answer]:
    return [Answer(None, "timeout") if verdict is None else Answer(verdict) for verdict in verdicts]


def test_accuracy_takes_a_pair_whose_orders_disagree_for_a_tie():
    """Six pairs: won twice over, lost twice over, always A (a tie), a tie and a win (a tie), one verdict lost, one
    unread.
    """
    said = answers("A", "B", "B", "A", "A", "A", "tie", "B", None, "A", "A", "hm")
    rows = judgments([triple(i) for i in range(6)], said)
    assert [row["outcome"] for row in rows] == ["chosen", "rejected", "tie", "tie", None, None]
    assert rows[2][ORDERS[0]] == "chosen" and rows[2][ORDERS[1]] == "rejected"
    assert rows[4]["chosen_first_text"] == "[timeout]" and rows[5]["rejected_first_text"] == "hm"
    numbers = summarize_judgments(rows)
    assert numbers["accuracy"] == (1 + 0 + 0.5 + 0.5) / 4 and numbers["ties"] == 0.5
    assert numbers["consistency"] == 2 / 4 and (numbers["num_judged"], numbers["num_unread"]) == (4, 2)
    assert numbers["first_position"] == 4 / 7  # A, B, B, A, A, A, and B of the tie's other order


def test_nothing_judged_gives_no_numbers():
    assert summarize_judgments(judgments([triple(0)], answers(None, None)))["accuracy"] is None


def test_the_pairs_are_drawn_by_the_seed():
    triples = [triple(i) for i in range(50)]
    drawn = draw_pairs(triples, 10, "0/1")
    assert len({t.id for t in drawn}) == 10 and drawn == draw_pairs(triples, 10, "0/1") != draw_pairs(
        triples, 10, "0/2"
    )
    assert draw_pairs(triples, 80, "0/1") == triples
