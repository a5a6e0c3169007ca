"""Sequences that need not be in memory: records in a temporary file, and records that are made when they are read."""

import os
import pickle
import tempfile
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import IO, Generic, TypeVar, overload

from sso_jax.runtime.errors import RunError

Item = TypeVar("Item")
MOST_IN_MEMORY = 20_000
"""Maximum number of records that a `Spool` keeps in memory; those of a longer one are all in its file."""


class _ByNumber(Sequence[Item]):
    """A sequence by a function that returns the item of a number; slices are lists."""

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

    def __iter__(self) -> Iterator[Item]:
        # not Sequence's, which takes an IndexError in `_item` for the end
        return map(self._item, range(len(self)))


class Lazy(_ByNumber[Item]):
    """A sequence whose items are made each time that they are read."""

    def __init__(self, length: int, make: Callable[[int], Item]):
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    def _item(self, number: int) -> Item:
        return self._make(number)


class Spool(_ByNumber[Item]):
    """A sequence that grows at its end; a long one is in a temporary file and takes 8 bytes of memory a record.

    The file has no name and is deleted with the sequence or the process. It is in the folder that TMPDIR names, which
    saves no memory if that is a file system in memory. Records must be picklable.
    """

    def __init__(self, records: Iterable[Item] = ()):
        self._records: list[Item] = []
        self._file: IO[bytes] | None = None
        self._ends = array("q", [0])
        for record in records:
            self.append(record)

    def append(self, record: Item) -> None:
        """Adds a record.

        Raises:
          RunError: if it cannot be written.
        """
        if self._file is None:
            self._records.append(record)
            if len(self._records) <= MOST_IN_MEMORY:
                return
            self._file = _open_file()
            waiting, self._records = self._records, []
        else:
            waiting = [record]
        for each in waiting:
            content = pickle.dumps(each, pickle.HIGHEST_PROTOCOL)
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


def _open_file() -> IO[bytes]:
    """Opens a temporary file without a name and without a buffer, so that what was written can be read at once."""
    try:
        return tempfile.TemporaryFile(buffering=0)  # closed when nothing refers to it
    except OSError as error:
        raise _no_room(error) from error


def _write_whole(file: IO[bytes], content: bytes) -> None:
    """Writes all of it: a file without a buffer may take a part at a time."""
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise _no_room(error) from error


def _no_room(error: OSError) -> RunError:
    return RunError(
        f"{tempfile.gettempdir()}: cannot keep the records of a stage there ({error.strerror}); make room, or set "
        "TMPDIR to a folder with more, then run the same command again"
    )


class Arrivals(Container[int], Generic[Item]):
    """Items that arrive in any order, each with its number; they are kept in a `Spool`."""

    def __init__(self, num_items: int, known: Iterable[tuple[int, Item]] = ()):
        """Takes how many items will arrive, and those that have, by their numbers."""
        self._rows = array("q", [-1]) * num_items
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

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)


def spooled(records: Iterable[Item]) -> Sequence[Item]:
    """Returns records as a sequence: itself if it is one, else a list, or a `Spool` if there are many."""
    return records if isinstance(records, Sequence) else Spool(records).settled()


def subset(records: Sequence[Item], numbers: Sequence[int]) -> Sequence[Item]:
    """Returns the records of these numbers: for a list another list, else a view."""
    if isinstance(records, list):
        return [records[number] for number in numbers]
    kept = array("q", numbers)
    return Lazy(len(kept), lambda at: records[kept[at]])
