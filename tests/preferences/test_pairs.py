"""Pairs: the controls that reorder them, the filter held to METHOD.md by hand and by a plain second writing, and their
numbers.
"""

import dataclasses
import math
import random
from collections import Counter
from fractions import Fraction

import pytest

from sso_jax.data.records import Cell, Triple
from sso_jax.preferences.filters import FILTER_CELLS, filter_pairs
from sso_jax.preferences.pairs import (
    drop_empty_contrasts,
    fits,
    judge_order,
    mean_log_probs,
    random_order,
    summarize,
    swap,
    with_log_probs,
)

CONTEXT = {"o": "plain", "p": "positive", "n": "negative"}


def triple(name: str, **changes) -> Triple:
    ids = {"chosen": [1, 2, 9], "rejected": [3, 9], "original": [4, 5, 6, 9]}
    return Triple(
        name,
        f"query {name}",
        "good",
        "bad",
        "yes",
        "no",
        "perhaps",
        **{"response_ids": ids, "tokens_hash": "h", **changes},
    )


def scored(name: str, means: dict[str, float], lengths: tuple[int, int] = (4, 2)) -> Triple:
    """A triple with these mean log-probs, written as `oc` for the chosen response in the plain context and so on."""
    length = dict(zip(("chosen", "rejected", "original"), (*lengths, 3), strict=True))
    table: dict[str, dict[str, float]] = {context: {} for context in CONTEXT.values()}
    for cell, value in means.items():
        response = {"c": "chosen", "r": "rejected"}[cell[1]]
        table[CONTEXT[cell[0]]][response] = value * length[response]
    return triple(name, response_ids={response: list(range(n)) for response, n in length.items()}, log_probs=table)


def test_swapping_exchanges_texts_and_ids_and_twice_is_nothing():
    one = triple("a")
    swapped = swap(one)
    assert (swapped.chosen, swapped.rejected, swapped.original, swapped.swapped) == ("no", "yes", "perhaps", True)
    assert swapped.response_ids == {"chosen": [3, 9], "rejected": [1, 2, 9], "original": [4, 5, 6, 9]}
    assert (swapped.good_system, swapped.bad_system, swapped.tokens_hash) == ("good", "bad", "h")
    assert swap(swapped) == one
    assert swap(triple("a", response_ids=None)).chosen == "no"


def test_random_order_is_a_fair_coin_of_seed_and_id():
    triples = [triple(str(number)) for number in range(4000)]
    mixed = random_order(triples, "0/1")
    assert abs(sum(t.swapped for t in mixed) - 2000) < 160  # five standard deviations of sqrt(4000)/2 = 32
    assert [t.id for t in mixed] == [t.id for t in triples]
    assert all(
        after == (swap(before) if after.swapped else before) for before, after in zip(triples, mixed, strict=True)
    )
    assert random_order(triples[::-3], "0/1") == mixed[::-3]  # whatever else is in the list, in whatever order
    assert (
        abs(sum(a.swapped == b.swapped for a, b in zip(mixed, random_order(triples, "0/2"), strict=True)) - 2000) < 160
    )


def test_judge_order_puts_the_better_response_first_and_leaves_ties():
    scores = {
        "worse": {"chosen": 0.2, "rejected": 0.7},
        "tie": {"chosen": 0.5, "rejected": 0.5},
        "better": {"chosen": 0.7, "rejected": 0.2},
    }
    ordered = judge_order([triple(name) for name in scores], lambda t, response: scores[t.id][response])
    assert {t.id: t.swapped for t in ordered} == {"worse": True, "tie": False, "better": False}
    assert ordered[0] == swap(triple("worse"))


def test_a_response_that_no_cell_compares_does_not_count_as_equal():
    cells = [Cell("negative", "original"), Cell("negative", "chosen")]  # generator form without its positive part
    good = dataclasses.replace(triple("good"), rejected="yes")
    same = dataclasses.replace(triple("same"), original="yes")
    assert drop_empty_contrasts([good, same], cells) == ([good], {"same": "original_is_chosen_or_rejected"})


def test_a_pair_fits_when_prompt_and_response_of_every_needed_cell_do():
    prompts = {"plain": [0] * 3, "positive": [0] * 7, "negative": [0] * 5}
    ids = {"chosen": [0] * 2, "rejected": [0] * 4, "original": [0] * 6}
    assert fits(prompts, ids, [("plain", "chosen"), ("plain", "rejected")], limit=7)
    assert not fits(prompts, ids, [("plain", "chosen"), ("plain", "rejected")], limit=6)
    assert fits(prompts, ids, [("positive", "rejected"), ("negative", "original")], limit=11)
    assert not fits(prompts, ids, [("positive", "rejected"), ("negative", "original")], limit=10)


def test_mean_log_probs_divide_by_all_tokens_of_the_response():
    cells = [("plain", "chosen"), ("plain", "rejected"), ("negative", "original")]
    one = with_log_probs(triple("a"), cells, [-6.0, -5.0, -2.0])
    assert one.log_probs == {"plain": {"chosen": -6.0, "rejected": -5.0}, "negative": {"original": -2.0}}
    assert mean_log_probs(one) == {"plain": {"chosen": -2.0, "rejected": -2.5}, "negative": {"original": -0.5}}


def test_the_filter_on_a_table_made_by_hand():
    """Two rounds of means by hand: rule 2 over A to F, rule 3 over A to D.

    o_chosen of A..F: -1, -1, -1, -1, -2, 0, mean -1: E falls below it, the others are at or above it; o_rejected: -2,
    -2, -2, -2, 0, -4, mean -2: F falls. Gaps of A..D: chosen 4, 2, 4, 2 with mean 3, rejected 4, 4, 2, 2 with mean 3: A
    alone is above both.
    """
    rows = {
        "A": dict(pc=-0.5, oc=-1, nc=-4.5, nr=-1, **{"or": -2}, pr=-5),
        "B": dict(pc=-0.5, oc=-1, nc=-2.5, nr=-1, **{"or": -2}, pr=-5),
        "C": dict(pc=-0.5, oc=-1, nc=-4.5, nr=-1, **{"or": -2}, pr=-3),
        "D": dict(pc=-0.5, oc=-1, nc=-2.5, nr=-1, **{"or": -2}, pr=-3),
        "E": dict(pc=-0.5, oc=-2, nc=-9, nr=2, **{"or": 0}, pr=-9),
        "F": dict(pc=0.5, oc=0, nc=-9, nr=-1, **{"or": -4}, pr=-9),
    }
    good = rows["A"]
    unordered = {
        "p_chosen = o_chosen": {**good, "pc": -1},
        "o_chosen = n_chosen": {**good, "nc": -1},
        "o_chosen > p_chosen": {**good, "oc": 0},
        "n_rejected = o_rejected": {**good, "nr": -2},
        "o_rejected = p_rejected": {**good, "pr": -2},
        "p_rejected > o_rejected": {**good, "pr": 0},
    }
    everything = {**unordered, **rows}
    kept, dropped = filter_pairs([scored(name, means) for name, means in everything.items()])
    assert [t.id for t in kept] == ["A"]
    assert set(dropped) == set(everything) - {"A"} and all(dropped[name] == "filter_order" for name in unordered)
    assert Counter(dropped.values()) == {"filter_order": 6, "filter_off_policy": 2, "filter_small_gap": 3}


def second_writing(rows: list[dict[str, Fraction]]) -> tuple[list[int], list[int]]:
    """METHOD.md's filter in exact fractions: (rows kept, how many each rule drops)."""

    def mean(values: list[Fraction]) -> Fraction:
        return sum(values) / len(values)

    first = [i for i, r in enumerate(rows) if r["pc"] > r["oc"] > r["nc"] and r["nr"] > r["or"] > r["pr"]]
    second = [i for i in first if all(rows[i][cell] >= mean([rows[k][cell] for k in first]) for cell in ("oc", "or"))]
    gaps = {i: (rows[i]["pc"] - rows[i]["nc"], rows[i]["nr"] - rows[i]["pr"]) for i in second}
    third = [i for i in second if all(gaps[i][side] > mean([gap[side] for gap in gaps.values()]) for side in (0, 1))]
    return third, [len(rows) - len(first), len(first) - len(second), len(second) - len(third)]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 50, 300])
def test_the_filter_agrees_with_a_second_writing_on_random_log_probs(num_rows):
    draw = random.Random(num_rows)
    cells = ["pc", "oc", "nc", "nr", "or", "pr"]
    for _ in range(20 if num_rows < 300 else 2):
        rows, triples = [], []
        for number in range(num_rows):
            values = [Fraction(draw.randint(-4000, -1), 1024) for _ in cells]
            if draw.random() < 0.7:  # most rows in order, so that the later rules have something to do
                values = sorted(values[:3], reverse=True) + sorted(values[3:], reverse=True)
            rows.append(dict(zip(cells, values, strict=True)))
            lengths = 2 ** draw.randint(0, 6), 2 ** draw.randint(0, 6)  # powers of two: the means come back exactly
            triples.append(scored(str(number), {cell: float(value) for cell, value in rows[-1].items()}, lengths))
        kept, counts = second_writing(rows)
        result, dropped = filter_pairs(triples)
        assert [int(t.id) for t in result] == kept
        assert {t.id for t in result} | set(dropped) == {t.id for t in triples}
        of_reason = Counter(dropped.values())
        assert [of_reason[reason] for reason in ("filter_order", "filter_off_policy", "filter_small_gap")] == counts
        assert all(t == triples[int(t.id)] for t in result)


def test_a_filter_that_leaves_nothing_says_so():
    assert filter_pairs([]) == ([], {})
    wrong = scored("a", dict(pc=-2, oc=-1, nc=-3, nr=-1, pr=-3, **{"or": -2}))
    other = dataclasses.replace(wrong, id="b")
    assert filter_pairs([wrong, other]) == ([], {"a": "filter_order", "b": "filter_order"})


def test_the_filter_reads_exactly_six_cells():
    expected = {
        (context, response) for context in ("plain", "positive", "negative") for response in ("chosen", "rejected")
    }
    assert set(FILTER_CELLS) == expected and len(FILTER_CELLS) == 6


def test_the_summary_averages_probabilities_under_the_plain_prompt_and_tokens():
    a = with_log_probs(
        triple("a"), [("plain", "chosen"), ("plain", "rejected"), ("positive", "chosen")], [-3.0, -4.0, -0.3]
    )
    b = with_log_probs(
        triple("b", response_ids={"chosen": [9], "rejected": [9] * 5, "original": [9] * 6}),
        [("plain", "chosen"), ("plain", "rejected")],
        [-2.0, -10.0],
    )
    assert summarize([a, b]) == pytest.approx(
        {
            "chosen_probability": (math.exp(-1) + math.exp(-2)) / 2,
            "rejected_probability": (math.exp(-2) + math.exp(-2)) / 2,
            "response_tokens": (3 + 2 + 4 + 1 + 5 + 6) / 6,
        }
    )
    assert summarize([]) == {"chosen_probability": None, "rejected_probability": None, "response_tokens": None}
