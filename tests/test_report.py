"""The report of a run made by hand: its page stands alone and shows texts as text, and the table of a round says what was measured."""

import base64
import copy
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from sso_jax import report
from sso_jax.records import Triple, write_records

HOSTILE = "<script>alert('x')</script> & <b>bold</b> \"quoted\" <img src=http://evil.example/x.png> </div></pre>"
START = {
    "iteration": 0, "num_queries": None, "num_pairs": None, "dropped": {}, "pair_accuracy": None, "pair_ties": None,
    "chosen_probability": None, "rejected_probability": None, "policy_quality": 0.4321, "quality_parts": {"truth": 0.61, "concision": 0.29},
    "response_tokens": None, "held_out_tokens": 17.0, "random_features": None, "seconds": {"evaluation": 1.5}, "tokens_per_second": None,
}  # fmt: skip
ROUND = {
    "iteration": 1, "num_queries": 64, "num_pairs": 41, "dropped": {"label": 2, "filter_order": 21}, "pair_accuracy": 0.7439,
    "pair_ties": 0.1951, "chosen_probability": 0.6173, "rejected_probability": 0.3829, "policy_quality": 0.5678,
    "quality_parts": {"truth": 0.71, "concision": 0.39}, "response_tokens": 19.04, "held_out_tokens": 15.0, "random_features": 3,
    "seconds": {"responses": 2.25, "training": 7.5}, "tokens_per_second": {"sampling": 1234.4, "training": 5678.6},
}  # fmt: skip
UPDATE = {
    "iteration": 1, "loss": 0.7, "base_loss": 0.6, "positive_loss": 0.5, "negative_loss": 0.4, "weight": 0.9, "chosen_log_prob": -9.0,
    "rejected_log_prob": -11.0, "margin": 0.1, "accuracy": 0.5, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens_per_second": 100.0,
}  # fmt: skip
NO_JUDGE = {"pair_accuracy": None, "pair_ties": None, "policy_quality": None, "quality_parts": None, "held_out_tokens": None}


class Page(HTMLParser):
    """Tags with their attributes, and the text between them, of an HTML page."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.text, self.open = "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text += "" if "style" in self.open else data


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
    texts = {name: texts.get(name, f"{name} number {number}.") for name in ("query", "chosen", "rejected", "original")}
    return Triple(id=str(number), good_system="g", bad_system="b", features=("Safety", "Accuracy"), swapped=number == 0, **texts)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    hostile = {name: f"{name}: {HOSTILE}" for name in ("query", "chosen", "rejected", "original")}
    triples = [triple(0, **hostile), *(triple(number) for number in range(1, 41))]
    folder = make_run(tmp_path_factory.mktemp("runs") / "a <run>", [START, ROUND], triples)
    report.write(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_texts_of_queries_responses_and_config_are_shown_as_text(html):
    page = Page(html)
    for name in ("query", "chosen", "rejected", "original", "note"):
        assert f"{name}: {HOSTILE}" in page.text
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "a <run>" in page.text


def test_the_page_loads_nothing_from_elsewhere(html):
    page = Page(html)
    loaded = [
        value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href", "srcset", "data", "action")
    ]
    assert loaded and all(value.startswith("data:image/svg+xml;base64,") for value in loaded)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not re.search(r"@import|url\(", html)
    for value in loaded:
        for element in ET.fromstring(base64.b64decode(value.partition(",")[2])).iter():  # the figures are well-formed, and load nothing
            assert all(value.startswith("#") for name, value in element.attrib.items() if name.endswith("href"))
            assert "script" not in element.tag.lower()


def test_the_page_shows_the_rounds_their_figures_and_a_spread_of_triples(html):
    text = re.sub(r"\s+", " ", Page(html).text)
    for expected in ("41 / 64", "0.744", "0.195", "0.617", "0.383", "19.0", "0.432", "0.568", "label 2", "filter order 21"):
        assert expected in text, expected
    assert "Over iterations" in text and "Over updates" in text and "Triples of iteration 1" in text
    shown = [int(number) for number in re.findall(r"chosen number (\d+)\.", text)]
    assert 5 <= len(shown) <= 20 and max(shown) > 20  # from the whole round, not from its head
    assert text.count("swapped by a control") == 1
    assert "Toy world" in text


def test_a_run_without_judge_updates_or_triples_has_a_report_too(tmp_path):
    folder = make_run(tmp_path / "run", [{**START, **NO_JUDGE}, {**ROUND, **NO_JUDGE}], [], updates=0)
    report.write(folder)
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert "41 / 64" in text and "Over iterations" in text
    assert "Toy world" not in text and "Triples of" not in text and "Over updates" not in text


def rows_of(table: str) -> dict[str, str]:
    """Name and value of each line below the title."""
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in table.splitlines()[1:])


def test_the_table_of_a_round_gives_every_number_with_its_name():
    table = report.table(copy.deepcopy(ROUND))
    assert table.startswith("== iteration 1 =")
    rows = rows_of(table)
    assert rows["pairs kept"] == "41 of 64 queries"
    assert (rows["dropped: label"], rows["dropped: filter_order"]) == ("2", "21")
    assert rows["pair accuracy"] == "0.744 (ties 0.195, as half)"
    assert rows["on-policy probability, chosen / rejected"] == "0.617 / 0.383"
    assert rows["tokens a response"] == "19.0"
    assert rows["policy quality, unsteered, held out"] == "0.568 (truth 0.71, concision 0.39)"
    assert rows["seconds"] == "responses 2.2, training 7.5"
    assert rows["tokens a second"] == "sampling 1234, training 5679"


def test_the_table_leaves_out_what_was_not_measured():
    start = rows_of(report.table(START))
    assert set(start) == {"policy quality, unsteered, held out", "seconds"} and "before any update" in report.table(START)
    unjudged = rows_of(report.table({**ROUND, **NO_JUDGE}))
    assert not {"pair accuracy", "policy quality, unsteered, held out"} & set(unjudged) and "pairs kept" in unjudged
    nothing = report.table({**START, **NO_JUDGE, "seconds": None})
    assert "nothing to measure without a judge" in nothing
