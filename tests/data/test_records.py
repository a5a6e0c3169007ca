"""Records and their files: round trips of every kind, keys that are kept, whole-or-nothing writes, and errors that name
the line.
"""

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sso_jax.data.records import PrincipledQuery, PromptRecord, Query, SteeredQuery, Triple
from sso_jax.runtime.checksums import json_digest
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import write_text
from sso_jax.runtime.json_lines import (
    each_json_line,
    each_numbered_line,
    from_json,
    read_json_lines,
    read_records,
    to_json,
    with_shared,
    write_records,
)

TEXT = 'Zeile 1\nZeile 2\r\n\ttab "quoted" \\ \u2028\u2029\x85\x0b\x00 é e\u0301 漢字 👩‍👩‍👧 <|im_end|>'
RECORDS = {
    "query": Query("1", TEXT),
    "principled": PrincipledQuery(
        "1", TEXT, ("Safety", "Accuracy"), ("safe", "fine"), ("unsafe", "no"), ("a", "b"), ("c", "d"), TEXT, 1
    ),
    "steered": SteeredQuery("1", TEXT, ("Safety",), "good " + TEXT, "bad " + TEXT, None, 2),
    "texts_only": Triple("1", TEXT, "g", "b", TEXT, "no", "perhaps"),
    "triple": Triple(
        "1",
        TEXT,
        "g",
        "b",
        TEXT,
        "no",
        "perhaps",
        ("Safety",),
        {"chosen": [1, 2], "rejected": [], "original": [3]},
        "hash",
        {"plain": {"chosen": -1.1754943508222875e-38, "rejected": -0.1 - 0.2}},
        True,
        extra={"uuid": "u", "origin": [{"von": ["x", None, 1.5]}]},
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_comes_back_from_its_line_as_it_was(tmp_path, name):
    record, path = RECORDS[name], tmp_path / "records.jsonl"
    write_records([record, record], path)
    assert path.read_bytes().count(b"\n") == 2
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == [
        json.loads(json.dumps(to_json(record)))
    ] * 2
    assert read_records(type(record), path) == [record, record]
    assert os.listdir(tmp_path) == ["records.jsonl"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
TRIPLES = st.builds(
    Triple,
    **dict.fromkeys(("id", "query", "chosen", "rejected"), st.text()),
    **dict.fromkeys(("good_system", "bad_system", "original", "tokens_hash"), st.none() | st.text()),
    features=st.lists(st.text(), max_size=3).map(tuple),
    response_ids=st.none()
    | st.dictionaries(st.sampled_from(["chosen", "rejected", "original"]), st.lists(st.integers(0, 2**31), max_size=4)),
    log_probs=st.none()
    | st.dictionaries(
        st.text(), st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False), max_size=2), max_size=2
    ),
    swapped=st.booleans(),
    history=st.lists(st.fixed_dictionaries({"role": st.text(), "content": st.text()}), max_size=2).map(tuple),
    scores=st.none() | st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False), max_size=2),
    extra=st.dictionaries(st.text(min_size=1).map(lambda name: f"x{name}"), JSON_VALUES, max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(records=st.lists(TRIPLES, max_size=4))
def test_any_records_come_back_from_their_file_as_they_were(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("any") / "records.jsonl"
    write_records(records, path)
    assert read_records(Triple, path) == records
    assert path.read_bytes().count(b"\n") == len(records)  # whatever breaks lines in a text is escaped


PUBLIC = {
    "id": "1",
    "query": "q",
    "good_system": "g",
    "bad_system": "b",
    "chosen": "c",
    "rejected": "r",
    "original": "o",
}


@pytest.mark.parametrize(
    "key",
    [
        "score",
        "extra",
    ],
)
def test_extra_keys_of_a_pairs_file_are_kept(key):
    row = {**PUBLIC, key: {"deep": [1, None]}}
    record = from_json(Triple, row)
    assert (record.chosen, record.extra[key]) == ("c", {"deep": [1, None]})
    assert {name: to_json(record)[name] for name in row} == row


def test_files_are_utf_8_that_people_can_read_and_empty_lines_are_skipped(tmp_path):
    path = tmp_path / "r.jsonl"
    write_records([{"query": "Größe 漢"}], path)
    assert path.read_bytes() == '{"query": "Größe 漢"}\n'.encode()
    path.write_bytes(b'\n{"a": 1}\r\n  \n{"a": 2}')
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]
    assert list(each_numbered_line(path)) == [(2, {"a": 1}), (4, {"a": 2})]
    write_records([], path)
    assert path.read_bytes() == b"" and read_json_lines(path) == []


def refuse(*arguments):
    raise OSError("no space left on device")


FAILURES = {
    "sync": OSError,
    "rename": OSError,
    "encode": UnicodeEncodeError,
    "record": TypeError,
    "source": ZeroDivisionError,
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, failure):
    path = tmp_path / "r.jsonl"
    write_records([{"old": True}], path)
    rows = {
        "encode": [{"new": 1}, {"new": "\ud83d"}],  # half of a surrogate pair, which UTF-8 cannot hold
        "record": [{"new": 1}, {"new": object()}],
        "source": ({"new": 1 / n} for n in (1, 0)),
    }.get(failure, [{"new": 1}])
    if failure in ("sync", "rename"):
        monkeypatch.setattr(os, {"sync": "fsync", "rename": "replace"}[failure], refuse)
    with pytest.raises(FAILURES[failure]):
        write_records(rows, path)
    assert read_json_lines(path) == [{"old": True}]


def test_a_reader_sees_the_old_or_the_new_text_and_never_a_part(tmp_path, monkeypatch):
    """The new text is on the disk in full, under another name, before the name is given to it."""
    path, seen, replace = tmp_path / "r.txt", [], os.replace

    def watched(source, target):
        seen.append((Path(source).read_text(encoding="utf-8"), Path(target).read_text(encoding="utf-8")))
        replace(source, target)

    write_text("old", path)
    monkeypatch.setattr(os, "replace", watched)
    write_text("new" * 10000, path)
    assert seen == [("new" * 10000, "old")]
    assert path.read_text() == "new" * 10000 and os.listdir(tmp_path) == ["r.txt"]


BAD_LINES = {
    "cut": (
        b'{"a": 1}\n\n{"a": 2\n',
        r"r\.jsonl, line 3: not valid JSON \(.* at column \d+\); give one JSON object per line",
    ),
    "two_on_a_line": (b'{"a": 1} {"a": 2}\n', r"r\.jsonl, line 1: not valid JSON"),
    "list": (b'{"a": 1}\n[1]\n', r"r\.jsonl, line 2: list instead of a JSON object; give"),
    "number": (b"7\n", r"r\.jsonl, line 1: int instead of a JSON object"),
    "latin_1": (b'{"a": "\xe9"}\n', r"r\.jsonl, line 1: not UTF-8 .*; save the file as UTF-8"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_refused_with_file_line_and_remedy(tmp_path, case):
    content, message = BAD_LINES[case]
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json_lines(tmp_path / "r.jsonl")


def test_bytes_that_are_not_utf_8_are_found_near_their_line(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b'{"a": 1}\n' * 50 + b'{"a": "\xe9"}\n')
    with pytest.raises(InputError, match=r"line 5[01]"):
        read_json_lines(tmp_path / "r.jsonl")


def test_equal_token_ids_of_a_file_are_one_object_and_records_are_written_without_copies(tmp_path):
    """36 bytes a token otherwise: a list's place and an integer of its own."""
    record = PromptRecord("a", {"plain": [70_001, 70_002, -3]})
    assert to_json(record)["prompts"] is record.prompts
    write_records([record, record], tmp_path / "prompts.jsonl")
    first, second = read_records(PromptRecord, tmp_path / "prompts.jsonl")
    assert first == second == record
    assert all(a is b for a, b in zip(first.prompts["plain"], second.prompts["plain"], strict=True))
    one, other = (with_shared([int("70001")]) for _ in range(2))
    assert one == [70_001] and one[0] is other[0]


def test_records_are_written_and_read_one_by_one(tmp_path):
    alive, most = 0, 0

    class Row(dict):
        def __init__(self, *args):
            nonlocal alive, most
            super().__init__(*args)
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    path = tmp_path / "rows.jsonl"
    write_records((Row({"number": i}) for i in range(1000)), path)
    assert most <= 3
    rows = each_json_line(path)
    assert next(rows) == {"number": 0} and sum(1 for _ in rows) == 999


def test_the_digest_of_a_list_is_that_of_its_json():
    head, rows = ["a", {"b": [1.5, None]}], [[[1, 2], (3, 4)], {"ü": "x"}]
    for some in (rows, []):
        whole = hashlib.blake2b(json.dumps([*head, some]).encode(), digest_size=12).hexdigest()
        assert json_digest(head, iter(some), 12) == whole
