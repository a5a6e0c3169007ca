"""Reads and writes JSON Lines files and the dataclass records in them."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from etils import epath

from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import write_lines

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")


def to_json(record: "DataclassInstance") -> dict[str, Any]:
    """Converts a record to a JSON object; the keys of `extra` are placed beside the record's own fields.

    Values are those of the record and not copies, as `dataclasses.asdict` makes of every token id.
    """
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    extra = fields.pop("extra", {})
    return {**fields, **extra}


def from_json(kind: type[Record], fields: dict[str, Any]) -> Record:
    """Restores a record of class `kind` from the result of `to_json`."""
    known = _fields_of(kind)
    own: dict[str, Any] = {
        name: tuple(value) if known[name] else value for name, value in fields.items() if name in known
    }
    if "extra" in kind.__dataclass_fields__:
        own["extra"] = {name: value for name, value in fields.items() if name not in known}
    return kind(**own)


@lru_cache
def _fields_of(kind: type) -> dict[str, bool]:
    """Returns the fields of a record class except `extra`, and whether each is a tuple."""
    return {f.name: getattr(f.type, "__origin__", None) is tuple for f in dataclasses.fields(kind) if f.name != "extra"}


class _Numbers(dict[Any, int]):
    """Integers by their digits or themselves: equal ones are one object, like the ids of a vocabulary."""

    def __missing__(self, number: str | int) -> int:
        own = int(number)
        if len(self) < MOST_SHARED:
            self[number] = own
        return own


MOST_SHARED = 300_000
"""Maximum number of integers that are kept to be shared; the largest vocabularies have 262,144 tokens."""
_BY_DIGITS, _BY_VALUE = _Numbers(), _Numbers()


def load_json(text: str | bytes) -> Any:
    """Parses JSON; equal integers are one object, so that a list of token ids takes 8 bytes a token and not 36."""
    return json.loads(text, parse_int=_BY_DIGITS.__getitem__)


def with_shared(numbers: list[int]) -> list[int]:
    """Returns equal numbers, of which those that other lists have as well are the same objects."""
    return list(map(_BY_VALUE.__getitem__, numbers))


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Returns the objects of a JSON Lines file, skipping empty lines.

    Raises:
      InputError: names the file and the line that is not a JSON object.
    """
    return [row for _, row in each_numbered_line(path)]


def each_json_line(path: str | Path) -> Iterator[dict[str, Any]]:
    """Like `read_json_lines`, but yields one object after the other and holds none."""
    return (row for _, row in each_numbered_line(path))


def each_numbered_line(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the (line number, object) pairs of a JSON Lines file, skipping empty lines.

    Raises:
      InputError: names the file and the line that is not a JSON object.
    """
    for number, line in enumerate(_lines(path), start=1):
        place = f"{path}, line {number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{place}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
        if text.strip():
            yield number, parse_object(text, place)


def _lines(path: str | Path) -> Iterator[bytes]:
    with epath.Path(path).open("rb") as file:
        yield from file


def parse_object(text: str, place: str) -> dict[str, Any]:
    """Parses a line of JSON Lines; raises `InputError` with its place if it is not a JSON object."""
    try:
        row = load_json(text)
    # also raised for numbers with thousands of digits, and for nesting that is too deep
    except (ValueError, RecursionError) as error:
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{place}: not valid JSON ({why}); give one JSON object per line") from error
    if not isinstance(row, dict):
        raise InputError(f"{place}: {type(row).__name__} instead of a JSON object; give one JSON object per line")
    return row


def read_records(kind: type[Record], path: str | Path) -> list[Record]:
    """Reads the records of class `kind` in a file that `write_records` wrote."""
    return list(each_record(kind, path))


def each_line_if_any(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file of this machine that need not be there."""
    return each_json_line(path) if path.is_file() else iter(())


def each_record(kind: type[Record], path: str | Path) -> Iterator[Record]:
    """Like `read_records`, but yields one record after the other and holds none."""
    return (from_json(kind, row) for row in each_json_line(path))


def write_records(records: Iterable[Any], path: str | Path) -> None:
    """Writes records or dictionaries atomically as JSON Lines."""
    rows = (record if isinstance(record, dict) else to_json(record) for record in records)
    write_lines((json.dumps(row, ensure_ascii=False) for row in rows), path)
