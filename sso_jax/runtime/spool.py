"""Sequences that need not be in memory: records in a temporary file, and records that are made when they are read."""

import os
import pickle
import tempfile
from array import array
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import IO, Any, Generic, TypeVar, overload

Item = TypeVar("Item")
MOST_IN_MEMORY = 20_000
"""Records of a `Spool` that are kept in memory; those of a longer one are all in its file."""


class _Reads(Sequence[Item]):
    """A sequence by a function that returns its item of a number; slices are lists."""

    def _item(self, number: int) -> Item:
        raise NotImplementedError

    @overload
    def __getitem__(self, at: int) -> Item: ...

    @overload
    def __getitem__(self, at: slice) -> list[Item]: ...

    def __getitem__(self, at: int | slice) -> Item | list[Item]:
        if isinstance(at, slice):
            return [self._item(number) for number in range(*at.indices(len(self)))]
        number = at + len(self) if at < 0 else at
        if not 0 <= number < len(self):
            raise IndexError(f"{at} of {len(self)} records")
        return self._item(number)


class Lazy(_Reads[Item]):
    """A sequence whose items are made anew each time that they are read."""

    def __init__(self, length: int, make: Callable[[int], Item]):
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    def _item(self, number: int) -> Item:
        return self._make(number)


class Spool(_Reads[Item]):
    """A sequence that grows at its end; a long one is in a temporary file and takes 8 bytes of memory a record.

    The file has no name and is gone with the process; TMPDIR says where it is. Records must be picklable.
    """

    def __init__(self, records: Iterable[Item] = ()):
        self._records: list[Item] = []
        self._file: IO[bytes] | None = None
        self._ends = array("q", [0])
        for record in records:
            self.append(record)

    def append(self, record: Item) -> None:
        """Adds a record."""
        if self._file is None:
            self._records.append(record)
            if len(self._records) <= MOST_IN_MEMORY:
                return
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed when nothing refers to it)
            waiting, self._records = self._records, []
        else:
            waiting = [record]
        for one in waiting:
            content = pickle.dumps(one, pickle.HIGHEST_PROTOCOL)
            _write_whole(self._file, content)
            self._ends.append(self._ends[-1] + len(content))

    def settled(self) -> Sequence[Item]:
        """Returns the whole sequence, which does not grow any more: a list if it is in memory."""
        return self._records if self._file is None else self

    def __len__(self) -> int:
        return len(self._records) if self._file is None else len(self._ends) - 1

    def _item(self, number: int) -> Item:
        if self._file is None:
            return self._records[number]
        start, end = self._ends[number : number + 2]
        record: Item = pickle.loads(os.pread(self._file.fileno(), end - start, start))
        return record


def _write_whole(file: IO[bytes], content: bytes) -> None:
    """Writes all of it: an unbuffered file may take a part at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


class Arrivals(Container[int], Generic[Item]):
    """Items that arrive in any order, each with its number; they are kept in a `Spool`."""

    def __init__(self, most: int, known: Iterable[tuple[int, Item]] = ()):
        """Takes the number of items that may arrive, and those that have."""
        self._rows = array("q", [-1]) * most
        self._items: Spool[Item] = Spool()
        self._count = 0
        self.update(known)

    def add(self, number: int, item: Item) -> None:
        """Adds an item, or replaces the one of this number."""
        self._count += self._rows[number] < 0
        self._rows[number] = len(self._items)
        self._items.append(item)

    def update(self, items: Iterable[tuple[int, Item]]) -> None:
        """Adds items with their numbers."""
        for number, item in items:
            self.add(number, item)

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self._rows[number] >= 0

    def __len__(self) -> int:
        return self._count

    def in_order(self) -> Sequence[Item]:
        """Returns all items by their numbers, once all have arrived."""
        return subset(self._items.settled(), self._rows)


class Table(Mapping[str, Item], Generic[Item]):
    """Records by their id, in a `Spool`."""

    def __init__(self, rows: Iterable[tuple[str, Item]]):
        self._numbers: dict[str, int] = {}
        self._records: Spool[Item] = Spool()
        for name, record in rows:
            self._numbers[name] = len(self._records)
            self._records.append(record)

    def __getitem__(self, name: str) -> Item:
        return self._records[self._numbers[name]]

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Any:
        return iter(self._numbers)


def spooled(records: Iterable[Item]) -> Sequence[Item]:
    """Returns records as a sequence: itself if it is one, else a list, or a `Spool` if there are many."""
    return records if isinstance(records, Sequence) else Spool(records).settled()


def subset(records: Sequence[Item], numbers: Sequence[int]) -> Sequence[Item]:
    """Returns the records of these numbers: a list of a list, else a view."""
    if isinstance(records, list):
        return [records[number] for number in numbers]
    own = array("q", numbers)
    return Lazy(len(own), lambda at: records[own[at]])
