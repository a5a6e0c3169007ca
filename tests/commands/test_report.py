"""The report of a run made by hand: its page stands alone and shows texts as text, and the table of a round says what
was measured.
"""

import base64
import copy
import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from sso_jax.commands.report import page as report
from sso_jax.commands.report.tables import table
from sso_jax.commands.report.triples import script_json
from sso_jax.data.records import Triple
from sso_jax.runtime.json_lines import write_records

HOSTILE = "<script>alert('x')</script> & <b>bold</b> \"quoted\" <img src=http://evil.example/x.png> </div></pre>"
START = {
    "iteration": 0,
    "num_queries": None,
    "num_pairs": None,
    "dropped": {},
    "pair_accuracy": None,
    "pair_ties": None,
    "chosen_probability": None,
    "rejected_probability": None,
    "policy_quality": 0.4321,
    "quality_parts": {"truth": 0.61, "concision": 0.29},
    "response_tokens": None,
    "held_out_tokens": 17.0,
    "random_features": None,
    "seconds": {"evaluation": 1.5},
    "tokens_per_second": None,
}
ROUND = {
    "iteration": 1,
    "num_queries": 64,
    "num_pairs": 41,
    "dropped": {"label": 2, "filter_order": 21},
    "pair_accuracy": 0.7439,
    "pair_ties": 0.1951,
    "chosen_probability": 0.6173,
    "rejected_probability": 0.3829,
    "policy_quality": 0.5678,
    "quality_parts": {"truth": 0.71, "concision": 0.39},
    "response_tokens": 19.04,
    "held_out_tokens": 15.0,
    "random_features": 3,
    "seconds": {"responses": 2.25, "training": 7.5},
    "tokens_per_second": {"sampling": 1234.4, "training": 5678.6},
}
UPDATE = {
    "iteration": 1,
    "loss": 0.7,
    "base_loss": 0.6,
    "positive_loss": 0.5,
    "negative_loss": 0.4,
    "weight": 0.9,
    "chosen_log_prob": -9.0,
    "rejected_log_prob": -11.0,
    "margin": 0.1,
    "accuracy": 0.5,
    "grad_norm": 1.0,
    "learning_rate": 1e-4,
    "tokens_per_second": 100.0,
}
NO_JUDGE = {
    "pair_accuracy": None,
    "pair_ties": None,
    "policy_quality": None,
    "quality_parts": None,
    "held_out_tokens": None,
}


class Page(HTMLParser):
    """Tags with their attributes, and the text between them, of an HTML page."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.text, self.open, self.scripts = "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.text += data


def make_run(folder, summary: list[dict], triples: list[Triple], updates: int = 3):
    """A run directory with what the report reads."""
    (folder / "iteration_1").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (folder / "config.yaml").write_text(f"run:\n  directory: {folder.name}\n  note: {HOSTILE}\n", encoding="utf-8")
    if updates:
        write_records([{**UPDATE, "step": step} for step in range(updates)], folder / "metrics.jsonl")
    write_records(triples, folder / "iteration_1" / "pairs.jsonl")
    return folder


def triple(number: int, **texts) -> Triple:
    names = ("query", "chosen", "rejected", "original", "good_system", "bad_system")
    texts = {name: texts.get(name, f"{name} number {number}.") for name in names}
    ids = {"chosen": [1, 2], "rejected": [1, 2, 3, 4], "original": [1]}
    log_probs = {"plain": {"chosen": -1.0, "rejected": -2.0}, "positive": {"chosen": -0.5}}
    return Triple(
        id=f"t{number}",
        features=("Safety", "Accuracy") if number % 2 else ("Engagement",),
        swapped=number == 0,
        response_ids=ids,
        log_probs=log_probs,
        **texts,
    )


def drop(folder, triples: list[Triple], reason: str) -> None:
    """Sampled triples of round 1 that were dropped."""
    write_records(triples, folder / "iteration_1" / "responses.jsonl")
    write_records([{"id": t.id, "reason": reason} for t in triples], folder / "iteration_1" / "dropped.jsonl")


HOSTILE_NAMES = ("query", "chosen", "rejected", "original", "good_system", "bad_system")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    hostile = {name: f"{name}: {HOSTILE}" for name in HOSTILE_NAMES}
    folder = make_run(
        tmp_path_factory.mktemp("runs") / "a <run>", [START, ROUND], [triple(0, **hostile), *map(triple, range(1, 41))]
    )
    drop(folder, [triple(number) for number in range(41, 44)], f"label {HOSTILE}")
    report.write_report(folder)
    return folder


@pytest.fixture(scope="module")
def html(run_folder):
    return (run_folder / "report.html").read_text(encoding="utf-8")


def data_of(page: Page) -> list[dict]:
    """The triples that a page carries."""
    return json.loads(page.scripts[0])


def test_texts_of_queries_responses_and_config_are_shown_as_text(html):
    page = Page(html)
    assert f"note: {HOSTILE}" in page.text and "a <run>" in page.text
    rows = {row["id"]: row for row in data_of(page)}
    for name in HOSTILE_NAMES:
        assert rows["t0"][name] == f"{name}: {HOSTILE}"
    assert rows["t41"]["status"] == f"label {HOSTILE}"
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert (
        "<script>alert" not in html
        and "<img src=http" not in html
        and "</div></pre>" not in html.replace("</div></pre></div>", "")
    )
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [
        {"type": "application/json", "id": "triples-data"},
        {},
    ]
    assert (
        "innerHTML" not in page.scripts[1] and "insertAdjacent" not in page.scripts[1]
    )  # texts become text nodes only


def test_data_in_a_script_element_cannot_end_it():
    value = ["</script><script>alert(1)</script>", "<!--<script>", "a & b \u2028 c", 'quote " and \\']
    text = script_json(value)
    assert json.loads(text) == value and not set(text) & set("<>&\u2028\u2029")


def test_the_page_loads_nothing_from_elsewhere(html):
    page = Page(html)
    loaded = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action")
    ]
    assert loaded and all(value.startswith("data:image/svg+xml;base64,") for value in loaded)
    assert not {"link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert not re.search(r"@import|url\(", html) and not re.search(
        r"fetch|XMLHttp|import|eval|new Function", page.scripts[1]
    )
    policy = next(
        attributes["content"]
        for tag, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'") and "http" not in policy
    for value in loaded:
        for element in ET.fromstring(
            base64.b64decode(value.partition(",")[2])
        ).iter():  # the figures are well-formed, and load nothing
            assert all(value.startswith("#") for name, value in element.attrib.items() if name.endswith("href"))
            assert "script" not in element.tag.lower()


def test_the_page_shows_the_rounds_their_figures_and_all_triples(html):
    page = Page(html)
    text = re.sub(r"\s+", " ", page.text)
    for expected in (
        "41 / 64",
        "0.744",
        "0.195",
        "0.617",
        "0.383",
        "19.0",
        "0.432",
        "0.568",
        "label 2",
        "filter order 21",
    ):
        assert expected in text, expected
    assert "Over iterations" in text and "Over updates" in text and "Toy world" in text
    rows = data_of(page)
    assert [row["id"] for row in rows] == [f"t{number}" for number in range(44)]
    assert {row["status"] for row in rows[:41]} == {"kept"} and [row.get("swapped") for row in rows[:2]] == [True, None]
    assert (rows[1]["features"], rows[1]["good_system"], rows[1]["iteration"]) == (
        ["Safety", "Accuracy"],
        "good_system number 1.",
        1,
    )
    assert rows[1]["log_probs"] == {
        "chosen": {"plain": -0.5, "positive": -0.25},
        "rejected": {"plain": -0.5},
        "original": {},
    }
    assert rows[1]["tokens"] == {"chosen": 2, "rejected": 4, "original": 1}


def test_a_large_run_has_a_page_of_bounded_size(tmp_path):
    folder = make_run(
        tmp_path / "run", [START, ROUND], [triple(number, chosen="word " * 2000) for number in range(2500)]
    )
    report.write_report(folder)
    rows = data_of(Page((folder / "report.html").read_text(encoding="utf-8")))
    assert 1000 <= len(rows) <= 2000 and rows[-1]["id"] == "t2498"  # every other one
    assert all(len(row["chosen"]) < 3100 and row["chosen"].endswith("more characters]") for row in rows)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize(
    ("state", "count", "drawn"),
    [
        ("", "44 of 44 triples", 25),
        ("feature=Safety", "22 of 44 triples", 22),
        ("status=dropped", "3 of 44 triples", 3),
        ("text=number 17.", "1 of 44 triples", 1),
        ("text=%3Cscript%3E", "1 of 44 triples", 1),
    ],
)
def test_a_browser_filters_and_draws_the_triples_as_text(run_folder, tmp_path, state, count, drawn):
    shutil.copy(run_folder / "report.html", tmp_path / "report.html")  # a plain path for the address
    address = f"{(tmp_path / 'report.html').as_uri()}#{state}"
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=2000",
        "--dump-dom",
        address,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)}
    )
    page = Page(done.stdout)
    assert count in page.text
    assert sum(attributes.get("class") == "card item" for _, attributes in page.tags) == drawn
    shown = re.sub(r"\s+", " ", page.text)
    assert (re.sub(r"\s+", " ", f"chosen: {HOSTILE}") in shown) == (state in ("", "text=%3Cscript%3E"))
    assert not any(attributes.get("src", "").startswith("http") for _, attributes in page.tags)


def test_a_run_without_judge_updates_or_triples_has_a_report_too(tmp_path):
    folder = make_run(tmp_path / "run", [{**START, **NO_JUDGE}, {**ROUND, **NO_JUDGE}], [], updates=0)
    report.write_report(folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    text = Page(html).text
    assert "41 / 64" in text and "Over iterations" in text
    assert "Toy world" not in text and "Triples" not in text and "Over updates" not in text and "<script" not in html


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
    assert rows["on-policy probability, chosen / rejected"] == "0.617 / 0.383"
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


def test_the_table_says_what_came_to_the_filters_and_where_mass_went():
    before = {"num_pairs": 62, "pair_accuracy": 0.6875, "chosen_probability": 0.5, "rejected_probability": 0.25}
    rows = rows_of(table({**ROUND, "before_filter": before, "held_out_log_prob": -0.625}))
    assert rows["before the filters"] == "62 pairs, accuracy 0.688, on-policy probability 0.500 / 0.250"
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
