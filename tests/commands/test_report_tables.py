"""The terminal's table of a round says what was measured, and nothing else."""

import copy
import re

from report_runs import NO_JUDGE, ROUND, START, Page, make_run

from sso_jax.commands.report import page as report
from sso_jax.commands.report.rounds import round_table
from sso_jax.commands.report.tables import table


def rows_of(table: str) -> dict[str, str]:
    """Name and value of each line below the title."""
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in table.splitlines()[1:])


def test_the_table_of_a_round_gives_every_number_with_its_name():
    shown = table(copy.deepcopy(ROUND))
    assert shown.startswith("== iteration 1 =")
    rows = rows_of(shown)
    assert rows["pairs kept"] == "41 of 64 queries"
    assert (rows["dropped: label"], rows["dropped: filter_order"]) == ("2", "21")
    assert rows["pair accuracy"] == "0.744 (ties 0.195, as half)"
    assert rows["probability by the policy, chosen / rejected"] == "0.617 / 0.383"
    assert rows["tokens a response"] == "19.0"
    assert rows["policy quality, unsteered, held out"] == "0.568 (truth 0.71, concision 0.39)"
    assert rows["seconds"] == "responses 2.2, training 7.5"
    assert rows["tokens a second"] == "sampling 1234, training 5679"


def test_the_table_leaves_out_what_was_not_measured():
    start = rows_of(table(START))
    assert set(start) == {"policy quality, unsteered, held out", "seconds"} and "before any update" in table(START)
    unjudged = rows_of(table({**ROUND, **NO_JUDGE}))
    assert not {"pair accuracy", "policy quality, unsteered, held out"} & set(unjudged) and "pairs kept" in unjudged
    nothing = table({**START, **NO_JUDGE, "seconds": None})
    assert "nothing to measure without a judge" in nothing


def test_the_table_never_says_none():
    """Each field of a round in turn, and all of them, are unknown; a round of recipe sft has queries but no pairs."""
    for name in [*ROUND, "all"]:
        row = {**ROUND, **(dict.fromkeys(ROUND) if name == "all" else {name: None}), "iteration": 1}
        assert "None" not in table(row), name
    assert rows_of(table({**ROUND, "num_queries": None}))["pairs kept"] == "41"
    sft = {**ROUND, "num_pairs": None, "num_queries": 2, "dropped": {}, "tokens_per_second": {"sampling": None}}
    rows = rows_of(table(sft))
    assert rows["demonstrations"] == "2" and not {"pairs kept", "tokens a second", "tokens a response"} & rows.keys()


def test_the_table_says_what_was_dropped_before_the_first_round():
    assert rows_of(table({**START, "dropped": {"demonstration_too_long": 3}}))["dropped: demonstration_too_long"] == "3"


def test_the_table_says_what_came_to_the_filters_and_where_mass_went():
    before = {"num_pairs": 62, "pair_accuracy": 0.6875, "chosen_probability": 0.5, "rejected_probability": 0.25}
    rows = rows_of(table({**ROUND, "before_filter": before, "held_out_log_prob": -0.625}))
    assert rows["before the filters"] == "62 pairs, accuracy 0.688, probability 0.500 / 0.250"
    assert rows["log-prob a token of the first policy's answers"] == "-0.625 (they are in no pair)"


def test_the_table_tells_groups_of_held_out_queries_apart():
    groups = {
        "all": {"quality": 0.5, "tokens": 21.25, "at_limit": 0.125},
        "others": {"quality": 0.75, "tokens": 9.0, "at_limit": 0.0},
    }
    rows = rows_of(table({**ROUND, "held_out_groups": groups}))
    assert rows["all"] == "0.500, 21.2 tokens, 0.125 cut at the limit" and rows["others"].startswith(
        "0.750, 9.0 tokens"
    )


ANSWERS = {"num_responses": 64, "mean_tokens": 81.26, "p90_tokens": 128.0, "cut": 0.1875}
ANSWERS |= {"repeated_4grams": 0.0625, "compressed": 0.5131, "empty": 0.0, "refused": None}


def test_the_table_measures_answers_without_a_judge():
    rows = rows_of(table({**START, **NO_JUDGE, "held_out_answers": ANSWERS}))
    assert rows["answers to 64 held-out queries"] == "81.3 tokens (90th percentile 128.0), 0.188 cut at the limit"
    assert rows["repeated 4-grams / compressed size / empty / refused"] == "0.062 / 0.513 / 0.000 / -"
    assert not any("answers to" in name for name in rows_of(table(copy.deepcopy(ROUND))))


def test_the_rounds_of_the_page_have_columns_for_answers_without_a_judge():
    headings, rows = round_table([{**START, **NO_JUDGE, "held_out_answers": ANSWERS}, {**ROUND, **NO_JUDGE}])
    cells = dict(zip(headings, zip(*rows, strict=True), strict=True))
    shown = {"answer tokens": "81.3", "answers, 90th percentile": "128.0", "answers cut": "0.188"}
    shown |= {"repeated 4-grams": "0.062", "compressed size": "0.513", "empty answers": "0.000"}
    assert {name: cells[name] for name in shown} == {name: (value, "-") for name, value in shown.items()}
    assert "refusals" not in headings and "answers cut" not in round_table([copy.deepcopy(ROUND)])[0]


def test_table_and_page_say_what_an_endpoint_and_a_reward_model_said(tmp_path):
    judged = {
        "num_judged": 40,
        "num_unread": 1,
        "accuracy": 0.8125,
        "ties": 0.125,
        "consistency": 0.875,
        "first_position": 0.5,
    }
    reward = {
        "num_trained": 90,
        "num_held_out": 10,
        "held_out_accuracy": 0.9,
        "judge_accuracy": 0.75,
        "judge_ties": 0.2,
    }
    rows = rows_of(table({**ROUND, "endpoint_judge": judged, "reward": reward}))
    assert rows["pair accuracy by the endpoint"] == "0.812 of 40 (ties 0.125, as half); both orders agree 0.875"
    assert rows["reward model, held-out accuracy"] == "0.900 of 10 pairs"
    assert rows["reward model, in the judge's order"] == "0.750"
    folder = make_run(tmp_path / "run", [START, {**ROUND, "endpoint_judge": judged, "reward": reward}], [])
    report.write_report(folder)
    text = re.sub(r"\s+", " ", Page((folder / "report.html").read_text(encoding="utf-8")).text)
    assert (
        "iteration 1: pair accuracy by the endpoint 0.812 of 40" in text
        and "held-out accuracy 0.900 of 10 pairs" in text
    )
    assert "iteration 0:" not in text
