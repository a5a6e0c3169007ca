"""The questions of examples/: as many as the documents say, all different, plain and of a length that people write."""

import re
from itertools import pairwise
from pathlib import Path

from sso_jax.data.queries import load_queries
from sso_jax.data.rows import Table
from sso_jax.runtime.json_lines import read_json_lines

FILE = Path(__file__).resolve().parents[2] / "examples" / "questions.jsonl"
ROWS = read_json_lines(FILE)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def test_there_are_300_with_ids_in_order():
    assert [row["id"] for row in ROWS] == [f"question-{number:03}" for number in range(1, 301)]
    assert all(set(row) == {"id", "query"} for row in ROWS)


def test_all_are_different_whatever_their_case_and_punctuation():
    assert len({tuple(words(row["query"])) for row in ROWS}) == 300


def test_each_has_5_to_60_words_of_plain_ascii():
    lengths = [len(row["query"].split()) for row in ROWS]
    assert min(lengths) >= 5 and max(lengths) <= 60
    assert all(row["query"].isascii() and row["query"].isprintable() for row in ROWS)
    assert sum(length > 30 for length in lengths) >= 15, "some are as long as real requests"


def test_neighbours_begin_with_different_words():
    firsts = [words(row["query"])[0] for row in ROWS]
    assert not [pair for pair in pairwise(firsts) if pair[0] == pair[1]]


def test_a_run_reads_every_one_of_them():
    read = load_queries(Table(str(FILE), "queries.path", on_bad_rows="refuse"))
    assert [query.query for query in read.records] == [row["query"] for row in ROWS]
