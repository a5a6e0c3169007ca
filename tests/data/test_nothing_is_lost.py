"""Random rows of every shape: each text in them is in a record, named in the log, or the row is refused or dropped."""

import json
import logging
import re
from itertools import count
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sso_jax.data.conversations import INPUT_FIELDS, PROMPT_FIELDS, RESPONSE_FIELDS, SYSTEM_FIELDS
from sso_jax.data.demonstrations import load_demonstrations
from sso_jax.data.pair_files import ORIGINALS, SYSTEMS, load_pairs
from sso_jax.data.queries import load_queries
from sso_jax.data.rows import Table
from sso_jax.data.verdicts import COMPARISONS, LISTS
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.json_lines import to_json

READERS = {"queries": load_queries, "pairs": load_pairs, "demonstrations": load_demonstrations}
FIELDS = sorted(
    {
        *PROMPT_FIELDS,
        *INPUT_FIELDS,
        *SYSTEM_FIELDS,
        *RESPONSE_FIELDS,
        *ORIGINALS,
        *(name for names in SYSTEMS for name in names),
        *(name for one in COMPARISONS for name in (one.first, one.second, *one.verdicts)),
        *LISTS,
        *("history", "chosen", "rejected", "completion", "label", "score_chosen", "category", "note"),
    }
)
ROLES = ("user", "assistant", "system", "human", "gpt", "User")


class Texts:
    """Texts that occur nowhere else: a record or the log has each of them or has not."""

    def __init__(self):
        self.number = count()

    def __call__(self) -> str:
        return f"text{next(self.number)}."


@st.composite
def values(draw, new: Texts) -> Any:
    """A value of a field: a text, turns in any form, a list, a number, or nothing."""
    kind = draw(
        st.sampled_from(["text", "turns", "json", "transcript", "texts", "pairs", "answers", "empty", "number"])
    )
    if kind in ("turns", "json"):
        turns = [_turn(draw, new) for _ in range(draw(st.integers(1, 4)))]
        return json.dumps(turns) if kind == "json" else turns
    if kind == "transcript":
        return f"\n\nHuman: {new()}\n\nAssistant: {new()}"
    if kind in ("texts", "pairs"):
        size = draw(st.integers(1, 3))
        return [new() for _ in range(size)] if kind == "texts" else [[new(), new()] for _ in range(size)]
    if kind == "answers":
        return [{"response": new(), "answer": new(), "score": i} for i in range(draw(st.integers(1, 3)))]
    if kind == "number":
        return draw(st.sampled_from([0, 1, 2, True, False, 1.5]))
    return new() if kind == "text" else draw(st.sampled_from([None, "", [], " "]))


def _turn(draw, new: Texts) -> dict[str, Any]:
    role_key, text_key = draw(st.sampled_from([("role", "content"), ("from", "value")]))
    turn: dict[str, Any] = {role_key: draw(st.sampled_from(ROLES)), text_key: new()}
    if draw(st.integers(0, 5)) == 0:
        turn[text_key] = [{"type": "text", "text": new()}, {"type": "text", "text": new()}]
    if draw(st.integers(0, 5)) == 0:
        turn["weight"] = draw(st.sampled_from([0, 1]))
    if draw(st.integers(0, 5)) == 0:
        turn["thought"] = new()
    return turn


@st.composite
def some_rows(draw) -> list[dict[str, Any]]:
    """A few rows; most have a prompt and a pair, so that they are read."""
    new, found = Texts(), []
    for _ in range(draw(st.integers(1, 3))):
        names = draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=5, unique=True))
        row = {name: draw(values(new)) for name in names}
        if draw(st.booleans()):
            row |= {name: row.get(name, new()) for name in ("prompt", "chosen", "rejected")}
        found.append(row)
    return found


def leaves(value: Any) -> list[str]:
    """All texts in a value."""
    return re.findall(r"text\d+\.", json.dumps(value))


class Heard(logging.Handler):
    """The log of the readers."""

    def __init__(self):
        super().__init__()
        self.text = ""

    def emit(self, record):
        self.text += record.getMessage() + "\n"


ANSWER_AND_MORE = [{"role": "assistant", "content": "text0."}, {"role": "user", "content": "text1."}]


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=300, deadline=None)
@given(given_rows=some_rows())
@example(given_rows=[{"answer": ANSWER_AND_MORE, "input": "text2."}])
def test_every_text_is_in_a_record_or_named_in_the_log(tmp_path_factory, kind, given_rows):
    path = tmp_path_factory.getbasetemp() / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given_rows))
    log, heard = logging.getLogger("sso_jax"), Heard()
    log.addHandler(heard)
    before = log.level
    log.setLevel(logging.INFO)
    try:
        found = READERS[kind](Table(str(path), "x.path"))
    except InputError as error:
        assert str(path) in str(error)
        return
    finally:
        log.removeHandler(heard)
        log.setLevel(before)
    kept = json.dumps([to_json(record) for record in found.records], ensure_ascii=False)
    not_used = heard.text.partition("not used")[2].partition("\n")[0]
    for number, row in enumerate(given_rows, start=1):
        if re.search(rf"dropped .*line {number}: ", heard.text):
            continue
        for name, value in row.items():
            lost = [text for text in leaves(value) if text not in kept]
            assert not lost or name in not_used, (name, lost, heard.text)
