"""Runs the requests of a sampling stage on the devices: admits, decodes a window, reads what has ended, and so on."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from sso_jax.data.buckets import bucket
from sso_jax.runtime.compile_clock import compile_seconds
from sso_jax.runtime.json_lines import with_shared
from sso_jax.runtime.mesh import batch_sharding, place, replicated
from sso_jax.sampling.decode import Drawn, SamplerPrograms
from sso_jax.sampling.prefill import FirstTokens, Prompts, Weights
from sso_jax.sampling.sampling_params import SamplingParams
from sso_jax.sampling.slots import WINDOW, PoolShape, Row, Size, Slots, most_slots

PROMPT_TOKENS = 512
"""Tokens that are run at once for prompts, on each shard of the batch, or a single longer prompt."""
FULL_CACHE_TOKENS, CACHE_SHARE = 512, 1 / 3
"""Most tokens of a response for which the cache holds every slot's longest response, and the share of that for more."""


@dataclass(frozen=True)
class Request:
    """A prompt to answer, and the random key of its response."""

    prompt_ids: list[int]
    key: tuple[int, int]
    limit: int | None = None
    """Maximum tokens of this response, if below the stage's."""


class SamplingStats(NamedTuple):
    """What a stage has cost."""

    num_tokens: int = 0
    """Tokens sampled, not counting those of a journal."""
    seconds: float = 0.0
    """Without compilation."""
    row_steps: int = 0
    """Decode steps times slots."""
    row_steps_used: int = 0
    """Those that drew a token of a response."""

    @property
    def share_used(self) -> float | None:
        """Share of the row-steps that drew a token of a response; None if there were none."""
        return self.row_steps_used / self.row_steps if self.row_steps else None


def total_stats(stats: Iterable[SamplingStats]) -> SamplingStats:
    """Returns the sums of several stages."""
    return SamplingStats(*(sum(numbers) for numbers in zip(SamplingStats(), *stats, strict=True)))


def pool_shape(sizes: Sequence[Size], num_slots: int, num_shards: int, page_size: int) -> PoolShape:
    """Returns the shape of a batch for these requests: of few different values, so that few programs are compiled.

    Responses rarely reach a high limit: beyond FULL_CACHE_TOKENS the cache has room for a share of it in every slot.
    """
    num_slots = -(-num_slots // num_shards) * num_shards
    longest = -(-max(map(most_slots, sizes)) // page_size)
    share = 1.0 if max(size.limit for size in sizes) <= FULL_CACHE_TOKENS else CACHE_SHARE
    shard_pages = max(longest, int(num_slots // num_shards * longest * share))
    row_pages = 1 << (longest - 1).bit_length()
    return PoolShape(num_slots, bucket(shard_pages, 4) * num_shards, row_pages, num_shards, page_size)


def prompts_at_once(length: int, shape: PoolShape) -> int:
    """Returns how many prompts of a padded length are run at once: by the length alone, so that a row's bits do too."""
    each = max(1, PROMPT_TOKENS // length)
    return min(1 << (each.bit_length() - 1), shape.shard_slots) * shape.num_shards


class _Read(NamedTuple):
    """Results that are still on the devices, and the rows that they belong to."""

    drawn: Drawn | FirstTokens
    rows: list[tuple[int, Row]]
    """(index in the results, row)."""


class Stage:
    """The requests of a stage, the state of the slots, and results that have not been read yet."""

    def __init__(
        self,
        programs: SamplerPrograms,
        mesh: jax.sharding.Mesh,
        weights: tuple[Weights, Weights],
        requests: Sequence[Request],
        slots: Slots,
        sampling: tuple[SamplingParams, np.ndarray],
    ):
        """Allocates the cache.

        Args:
          programs: compiled functions.
          mesh: device mesh, which must be in context (`jax.set_mesh`) here and in `run`.
          weights: weights for prompts and for single tokens.
          requests: all requests, by the indices of `slots`.
          slots: empty slots with their queue.
          sampling: sampling settings and stop tokens.
        """
        self._programs, self._mesh, self._weights = programs, mesh, weights
        self._requests, self._slots = requests, slots
        self._sampling = place(sampling, replicated(mesh))
        self._state = programs.start(slots.shape)
        self._unread: deque[_Read] = deque()
        # A CPU gains nothing from reading a window only while the next one runs.
        self._lag = 0 if mesh.devices.flat[0].platform == "cpu" else 1
        self._start = time.perf_counter() - compile_seconds()
        self._num_tokens = self._windows = self._used = 0

    def run(self) -> Iterator[dict[int, list[int]]]:
        """Yields the responses that have ended, by the index of their request, after each window."""
        while self._slots.queue or self._slots.rows or self._unread:
            for prompts, rows in self._admitted():
                self._run_prompts(prompts, rows)
            if self._slots.rows:
                self._run_window()
            ended: dict[int, list[int]] = {}
            while self._unread and (self._windows_unread() > self._lag or not self._slots.rows):
                ended.update(self._read(self._unread.popleft()))
            yield ended

    def stats(self) -> SamplingStats:
        """Returns what the stage has cost so far."""
        seconds = time.perf_counter() - compile_seconds() - self._start
        row_steps = self._windows * WINDOW * self._slots.shape.num_slots
        return SamplingStats(self._num_tokens, seconds, row_steps, self._used)

    def _windows_unread(self) -> int:
        return sum(isinstance(read.drawn, Drawn) for read in self._unread)

    def _admitted(self) -> Iterator[tuple[Prompts, list[tuple[int, Row]]]]:
        """Yields batches of newly admitted prompts of one padded length, and the rows in them."""
        by_length: dict[int, list[Row]] = {}
        for row in self._slots.admit():
            by_length.setdefault(bucket(row.size.prompt_tokens), []).append(row)
        for length, rows in by_length.items():
            while rows:
                yield self._take_batch(length, rows)

    def _take_batch(self, length: int, rows: list[Row]) -> tuple[Prompts, list[tuple[int, Row]]]:
        """Removes a batch from the rows: each shard's part holds prompts for its own slots."""
        shape = self._slots.shape
        batch_size = prompts_at_once(length, shape)
        each = batch_size // shape.num_shards
        prompts = Prompts(
            tokens=np.zeros((batch_size, length), np.int32),
            lengths=np.ones(batch_size, np.int32),
            keys=np.zeros((batch_size, 2), np.uint32),
            limits=np.ones(batch_size, np.int32),
            slots=np.full(batch_size, shape.shard_slots, np.int32),
            pages=np.full((batch_size, shape.pages_for(length)), shape.shard_pages, np.int32),
        )
        taken, next_row = [], [shard * each for shard in range(shape.num_shards)]
        for row in list(rows):
            shard, slot = divmod(row.slot, shape.shard_slots)
            at = next_row[shard]
            if at == (shard + 1) * each:
                continue
            next_row[shard] += 1
            rows.remove(row)
            request = self._requests[row.request]
            prompts.tokens[at, : row.size.prompt_tokens] = request.prompt_ids
            prompts.lengths[at], prompts.limits[at], prompts.slots[at] = *row.size, slot
            prompts.keys[at] = request.key
            own = row.pages[: shape.pages_for(row.size.prompt_tokens)]
            prompts.pages[at, : len(own)] = own
            taken.append((at, row))
        return prompts, taken

    def _run_prompts(self, prompts: Prompts, rows: list[tuple[int, Row]]) -> None:
        placed = place(prompts, batch_sharding(self._mesh))
        self._state, first = self._programs.admit(self._weights[0], self._state, placed, *self._sampling)
        self._unread.append(_Read(first, rows))
        for _, row in rows:
            if row.size.limit == 1:
                self._slots.release(row)

    def _run_window(self) -> None:
        self._slots.grow()
        rows, inputs = list(self._slots.rows.items()), self._slots.window()
        placed = place(inputs, batch_sharding(self._mesh))
        self._state, drawn = self._programs.window(self._weights[1], self._state, placed, *self._sampling)
        self._unread.append(_Read(drawn, rows))
        self._slots.advance()
        self._windows += 1

    def _read(self, read: _Read) -> dict[int, list[int]]:
        """Reads results from the devices, frees the slots of rows that have ended, and returns their responses."""
        drawn, ended = jax.device_get(read.drawn), {}
        in_window = isinstance(drawn, Drawn)
        for at, row in read.rows:
            if row.ended:
                continue
            new = drawn.tokens[at, : drawn.counts[at]].tolist() if in_window else [int(drawn.tokens[at])]
            row.response += new
            self._num_tokens += len(new)
            self._used += len(new) if in_window else 0
            if drawn.done[at]:
                row.ended = True
                ended[row.request] = with_shared(row.response)
                self._slots.release(row)
        return ended
