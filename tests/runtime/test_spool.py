"""Sequences in a temporary file: the same records as a list of them, and little memory."""

import gc
import io
import tempfile
import tracemalloc

import pytest

from sso_jax.runtime import spool
from sso_jax.runtime.errors import RunError
from sso_jax.runtime.spool import Arrivals, Lazy, Spool, Table, spooled, subset


@pytest.fixture(params=[20_000, 5], ids=["in_memory", "in_a_file"])
def most(request, monkeypatch):
    monkeypatch.setattr(spool, "MOST_IN_MEMORY", request.param)


def record(number: int) -> dict:
    return {"id": f"row-{number}", "ids": list(range(number, number + 300)), "text": "\u00e9" * number}


def test_a_spool_is_the_sequence_of_what_was_added(most):
    whole = [record(number) for number in range(12)]
    found = Spool()
    for number, one in enumerate(whole):  # read while it grows, over the limit too
        found.append(one)
        assert len(found) == number + 1 and found[number] == one and found[0] == whole[0]
    assert list(found) == list(found.settled()) == whole and found[-1] == whole[-1]
    assert found[2:9:3] == whole[2:9:3] and found[10:99] == whole[10:] and found[:0] == []
    for beyond in (12, -13):
        with pytest.raises(IndexError, match=f"{beyond} of 12"):
            found[beyond]


def test_many_records_are_not_in_memory(monkeypatch):
    monkeypatch.setattr(spool, "MOST_IN_MEMORY", 5)
    gc.collect()
    tracemalloc.start()
    found = Spool(record(number) for number in range(2000))  # about 2,500 bytes each, 5 MB
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100_000 and found[1999] == record(1999)


def test_few_records_stay_a_list_and_sequences_are_themselves(most):
    own = spooled(iter("abc"))
    assert own == ["a", "b", "c"] and spooled(own) is own
    assert isinstance(spooled(iter(range(6))), list) == (spool.MOST_IN_MEMORY > 5)


def test_a_subset_has_the_records_of_its_numbers(most):
    whole = spooled(map(record, range(8)))
    assert list(subset(whole, [5, 0, 5])) == [record(5), record(0), record(5)]
    assert list(subset(subset(whole, [7, 3, 1]), [2, 0])) == [record(1), record(7)] and not subset(whole, [])


def test_lazy_records_are_made_when_they_are_read():
    made = []
    found = Lazy(4, lambda number: made.append(number) or number * number)
    assert len(found) == 4 and made == [] and found[-1] == 9 and made == [3]
    assert list(found) == [0, 1, 4, 9] and found[1:3] == [1, 4]


def test_an_index_error_of_what_makes_an_item_is_not_the_end():
    """Python's own iteration of a sequence takes it for the end, so that records would be missing without a word."""
    with pytest.raises(IndexError, match="list index out of range"):
        list(Lazy(3, lambda number: [10, 20][number]))


def test_a_full_disk_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(spool, "MOST_IN_MEMORY", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as full, pytest.raises(RunError, match=rf"{tmp_path}: .*No space left.*TMPDIR"):
        full.setattr(tempfile, "TemporaryFile", lambda buffering: io.FileIO("/dev/full", "w"))
        Spool(range(3))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(RunError, match=r"absent: .*No such file"):
        Spool(range(3))


def test_arrivals_are_put_in_order_and_the_last_of_a_number_counts(most):
    found = Arrivals(7, [(6, "g"), (2, "x")])
    assert len(found) == 2 and 6 in found and 0 not in found
    found.update({0: "a", 2: "c", 1: "b", 5: "f", 3: "d", 4: "e"}.items())
    assert len(found) == 7 and list(found.in_order()) == list("abcdefg")


def test_a_table_is_a_mapping(most):
    found = Table((f"q{number}", {"plain": [number]}) for number in range(8))
    assert dict(found) == {f"q{number}": {"plain": [number]} for number in range(8)}
    assert found.get("absent") is None and "q7" in found and len(found) == 8
