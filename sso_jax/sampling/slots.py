"""Assigns requests to slots and to pages of the cache: which request is decoded where, and when.

A batch has a fixed number of slots. A free slot takes the next request; all slots are then decoded for a window of a
fixed number of steps, and so on. A request's pages grow with its response. If a shard has no page left, its youngest
request is put back into the queue and starts again later; its response will be the same.

A row's first response token is sampled with the prompt, so that a response of n tokens takes n - 1 decode steps. In the
cache a response starts at a multiple of WINDOW, so that a window never spans two pages.
"""

from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sso_jax.models.paged_cache import PageTable

WINDOW = 16
"""Decode steps between two looks at which rows have ended; a divisor of the page size."""


class Size(NamedTuple):
    """Tokens of a request."""

    prompt_tokens: int
    limit: int
    """Most tokens of its response."""


def response_start(prompt_tokens: int) -> int:
    """Returns the cache slot of the first response token."""
    return -(-prompt_tokens // WINDOW) * WINDOW


def most_slots(size: Size) -> int:
    """Returns the most cache slots that a request uses."""
    windows = max(0, size.limit - 2) // WINDOW  # windows that are written back: all but the last
    return max(size.prompt_tokens, response_start(size.prompt_tokens) + windows * WINDOW)


def queue_order(sizes: Sequence[Size], done: Container[int] = ()) -> list[int]:
    """Returns the requests that are not done, the longest prompts first: prompts of like lengths are run together."""
    return sorted((i for i in range(len(sizes)) if i not in done), key=lambda i: (-sizes[i].prompt_tokens, i))


@dataclass(frozen=True)
class PoolShape:
    """Sizes of a batch of slots and of its cache; slots and pages are divided evenly among the shards."""

    num_slots: int
    num_pages: int
    row_pages: int
    """Most pages of a row."""
    num_shards: int = 1
    page_size: int = 64
    """Cache slots of a page."""

    def pages_for(self, num_slots: int) -> int:
        """Returns the number of pages that hold so many cache slots."""
        return -(-num_slots // self.page_size)

    @property
    def shard_slots(self) -> int:
        """Slots of a shard."""
        return self.num_slots // self.num_shards

    @property
    def shard_pages(self) -> int:
        """Pages of a shard."""
        return self.num_pages // self.num_shards


@dataclass
class Row:
    """A request in a slot."""

    request: int
    slot: int
    size: Size
    pages: list[int] = field(default_factory=list)
    """Its pages, by their number within the shard."""
    windows: int = 0
    """Windows that it has been decoded for."""
    response: list[int] = field(default_factory=list)
    """Tokens of its response that have been read from the devices."""
    ended: bool = False
    """Whether nothing more is to be read for it: its response is whole, or starts again in another slot."""

    @property
    def num_cached(self) -> int:
        """Response tokens in the pages."""
        return self.windows * WINDOW

    @property
    def ends_with_next_window(self) -> bool:
        """Whether its response reaches its limit in the next window, wherever it ends."""
        return 1 + (self.windows + 1) * WINDOW >= self.size.limit

    def next_slot(self) -> int:
        """Returns the cache slot that the next window's first token is written to."""
        return response_start(self.size.prompt_tokens) + self.num_cached


class WindowInputs(NamedTuple):
    """What the next window reads, as arrays; pages and slots count within a shard."""

    table: PageTable
    """What each slot's row has in the cache."""
    prompt_tokens: np.ndarray
    """[B]"""
    counts: np.ndarray
    """[B] response tokens sampled so far."""
    limits: np.ndarray
    """[B]"""
    live: np.ndarray
    """[B] whether the slot has a request."""
    write_page: np.ndarray
    """[B] page that the window's tokens are written to, or the number of pages for none."""
    write_part: np.ndarray
    """[B] part of that page, in units of WINDOW slots."""


class Slots:
    """The slots of a batch, the pages of its cache, and the queue of requests."""

    def __init__(self, sizes: Sequence[Size], queue: Sequence[int], shape: PoolShape):
        """Starts with empty slots.

        Args:
          sizes: tokens of each request.
          queue: indices of the requests to run, in order.
          shape: sizes of the batch.

        Raises:
          ValueError: if a request does not fit an empty shard.
        """
        self.sizes, self.shape, self.queue = sizes, shape, deque(queue)
        most = max((shape.pages_for(most_slots(sizes[i])) for i in queue), default=0)
        if most > min(shape.row_pages, shape.shard_pages):
            raise ValueError(f"a request needs {most} pages of the {shape}; use a cache of more pages")
        self.rows: dict[int, Row] = {}  # by slot, oldest first
        self._free_pages = [list(range(shape.shard_pages - 1, -1, -1)) for _ in range(shape.num_shards)]
        self.restarts = 0

    def _shard(self, slot: int) -> int:
        return slot // self.shape.shard_slots

    def _free_slots(self) -> list[int]:
        """Returns one free slot for each shard that has one, those with the most free pages first."""
        first = {}
        for slot in range(self.shape.num_slots):
            if slot not in self.rows:
                first.setdefault(self._shard(slot), slot)
        return sorted(first.values(), key=lambda slot: -len(self._free_pages[self._shard(slot)]))

    def admit(self) -> list[Row]:
        """Gives free slots to the next requests of the queue, as long as the cache has room; returns their rows."""
        admitted = []
        while self.queue:
            size = self.sizes[self.queue[0]]
            first = max(size.prompt_tokens, response_start(size.prompt_tokens) + WINDOW)
            needed = self.shape.pages_for(min(first, most_slots(size)))
            slot = next((slot for slot in self._free_slots() if self._has_room(self._shard(slot), needed, size)), None)
            if slot is None:
                break
            row = Row(self.queue.popleft(), slot, size)
            self._take(self._shard(slot), row, needed)
            self.rows[slot] = row
            admitted.append(row)
        return admitted

    def _has_room(self, shard: int, needed: int, size: Size) -> bool:
        """Returns whether a shard has pages for another row, and some for its rows to grow: one for every fourth."""
        rows = [row for slot, row in self.rows.items() if self._shard(slot) == shard]
        most = sum(self.shape.pages_for(most_slots(own)) for own in (size, *(row.size for row in rows)))
        growth = most - needed - sum(len(row.pages) for row in rows)
        return len(self._free_pages[shard]) >= needed + min(growth, -(-len(rows) // 4))

    def _take(self, shard: int, row: Row, num_pages: int) -> None:
        """Gives a row pages, those with the lowest numbers, until it has `num_pages`."""
        free = self._free_pages[shard]
        while len(row.pages) < num_pages:
            row.pages.append(free.pop())

    def grow(self) -> None:
        """Gives each row the page that the next window is written to; puts requests back if there are too few."""
        for row in list(self.rows.values()):
            if row.ended or row.ends_with_next_window:
                continue
            shard = self._shard(row.slot)
            needed = self.shape.pages_for(row.next_slot() + WINDOW)
            while needed > len(row.pages) + len(self._free_pages[shard]):
                youngest = next(other for other in reversed(self.rows.values()) if self._shard(other.slot) == shard)
                youngest.ended = True
                self.queue.appendleft(youngest.request)
                self.release(youngest)
                self.restarts += 1
                if youngest is row:
                    break
            else:
                self._take(shard, row, needed)

    def window(self) -> WindowInputs:
        """Returns the inputs of the next window."""
        shape = self.shape
        inputs = WindowInputs(
            table=PageTable(
                owner=np.zeros(shape.num_pages, np.int32),
                positions=np.full((shape.num_pages, shape.page_size), -1, np.int32),
                pages=np.full((shape.num_slots, shape.row_pages), -1, np.int32),
                num_used=np.zeros(shape.num_shards, np.int32),
            ),
            prompt_tokens=np.ones(shape.num_slots, np.int32),
            counts=np.ones(shape.num_slots, np.int32),
            limits=np.ones(shape.num_slots, np.int32),
            live=np.zeros(shape.num_slots, bool),
            write_page=np.full(shape.num_slots, shape.shard_pages, np.int32),
            write_part=np.zeros(shape.num_slots, np.int32),
        )
        for row in self.rows.values():
            self._describe(inputs, row)
        return inputs

    def _describe(self, inputs: WindowInputs, row: Row) -> None:
        """Writes what the next window reads of a row."""
        slot, table = row.slot, inputs.table
        shard, start = self._shard(slot), response_start(row.size.prompt_tokens)
        num_slots = start + row.num_cached if row.windows else row.size.prompt_tokens
        used = row.pages[: self.shape.pages_for(num_slots)]
        positions = np.full(len(used) * self.shape.page_size, -1, np.int32)
        positions[: row.size.prompt_tokens] = np.arange(row.size.prompt_tokens)
        positions[start : start + row.num_cached] = row.size.prompt_tokens + np.arange(row.num_cached)
        own = np.asarray(used) + shard * self.shape.shard_pages
        table.owner[own] = slot - shard * self.shape.shard_slots
        table.positions[own] = positions.reshape(-1, self.shape.page_size)
        table.pages[slot, : len(used)] = used
        table.num_used[shard] = max(table.num_used[shard], max(used) + 1)
        inputs.prompt_tokens[slot], inputs.counts[slot] = row.size.prompt_tokens, 1 + row.num_cached
        inputs.limits[slot], inputs.live[slot] = row.size.limit, True
        if not row.ends_with_next_window:
            page, place = divmod(row.next_slot(), self.shape.page_size)
            inputs.write_page[slot], inputs.write_part[slot] = row.pages[page], place // WINDOW

    def advance(self) -> None:
        """Counts a window for all rows, and frees the slots of those that have reached their limit."""
        for row in list(self.rows.values()):
            ends = row.ends_with_next_window
            row.windows += 1
            if ends:
                self.release(row)

    def release(self, row: Row) -> None:
        """Frees the slot and the pages of a row, unless that has been done."""
        if self.rows.get(row.slot) is not row:
            return
        del self.rows[row.slot]
        free = self._free_pages[self._shard(row.slot)]
        free.extend(row.pages)
        free.sort(reverse=True)  # the lowest numbers are taken first, so that the pages in use lie close together
