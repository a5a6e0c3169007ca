"""The slots of `benchmarks.ragged`: the row-steps of sampling stages with responses of given lengths, without a model.

`sso_jax.sampling.slots` admits, grows, puts back and releases as in a run; only the decoder is missing. The most tokens
of a response are 2,048, and lengths are not scaled.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.ragged.requests import CAP, draw_lengths, kinds_of
from sso_jax.models.paged_cache import page_size_of
from sso_jax.sampling.slots import WINDOW, Size, Slots, queue_order
from sso_jax.sampling.stage import pool_shape

REQUESTS = 60_000
BATCHES = ((16, 1), (64, 1), (256, 1), (256, 16))
"""(slots, batch shards that they are divided among)."""


class Device(NamedTuple):
    """What a stage's slots depend on besides the requests."""

    page_size: int
    lag: int
    """Windows by which the ends of responses are seen late."""


CPU, ACCELERATOR = Device(page_size_of("cpu"), 0), Device(page_size_of("tpu"), 1)


def simulate(
    slots: Slots, lengths: Sequence[int], lag: int = 0, before_window: Callable[[], None] = lambda: None
) -> list[int]:
    """Runs the requests of `slots` as `Stage` does; returns them in the order in which they were seen to end.

    Args:
      slots: empty slots with their queue.
      lengths: tokens of each response, at most its limit.
      lag: windows by which the end of a response is seen late.
      before_window: called before each window, when all rows have their pages.
    """
    unread, ended = deque(), []
    while slots.queue or slots.rows or unread:
        for row in slots.admit():
            if row.size.limit == 1:
                row.ended = True
                ended.append(row.request)
                slots.release(row)
        if slots.rows:
            slots.grow()
            before_window()
            unread.append([(row, row.windows + 1) for row in slots.rows.values()])
            slots.advance()
        while unread and (len(unread) > lag or not slots.rows):
            for row, windows in unread.popleft():
                if not row.ended and 1 + windows * WINDOW >= lengths[row.request]:
                    row.ended = True
                    ended.append(row.request)
                    slots.release(row)
    return ended


class Counts(NamedTuple):
    """What a stage has taken."""

    share_used: float
    """Share of the row-steps that drew a token of a response which was kept."""
    windows: int
    drain: int
    """Windows that had no request waiting."""
    restarts: int
    peak_pages: int
    """Most pages in use in a window."""
    num_pages: int


def count(
    requests: Sequence[tuple[int, int]],
    batch: tuple[int, int],
    device: Device,
    order: Sequence[int] | None = None,
) -> Counts:
    """Simulates a stage.

    Args:
      requests: (prompt tokens, response tokens) of each.
      batch: slots and batch shards.
      device: the kind of device.
      order: the queue; None takes the sampler's own order.
    """
    sizes, lengths = [Size(prompt, CAP) for prompt, _ in requests], [length for _, length in requests]
    shape = pool_shape(sizes, *batch, device.page_size)
    slots = Slots(sizes, queue_order(sizes) if order is None else order, shape)
    waiting, pages = [], []

    def look() -> None:
        waiting.append(bool(slots.queue))
        pages.append(sum(len(row.pages) for row in slots.rows.values()))

    simulate(slots, lengths, device.lag, look)
    windows = len(waiting)
    # A response's first token is drawn with its prompt.
    share_used = sum(length - 1 for length in lengths) / (windows * WINDOW * shape.num_slots)
    return Counts(share_used, windows, windows - sum(waiting), slots.restarts, max(pages), shape.num_pages)


def requests_of(lengths: str | None, num_requests: int) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Yields names and requests: those of each policy of a file, or log-normal ones; three responses to each prompt."""
    for name, kind in kinds_of(lengths).items():
        drawn = draw_lengths(lengths, -(-num_requests // 3), 1.0, **kind)
        yield name, [(prompt, response) for prompt, responses in drawn for response in responses][:num_requests]


def print_slots(lengths: str | None, num_requests: int) -> None:
    """Prints a Markdown table of the stages of so many requests, row by row.

    All columns but the last are of an accelerator.
    """
    columns = (
        "lengths | slots | row-steps used | windows | with an empty queue | restarts | most pages in use | on a CPU"
    )
    print(f"| {columns} |\n" + "|---" * 8 + "|")
    for name, requests in requests_of(lengths, num_requests):
        for num_slots, shards in BATCHES:
            here, on_cpu = (count(requests, (num_slots, shards), device) for device in (ACCELERATOR, CPU))
            batch = f"{num_slots} on {shards} shards" if shards > 1 else f"{num_slots}"
            pages = f"{here.peak_pages:,} of {here.num_pages:,}"
            print(
                f"| {name} | {batch} | {here.share_used:.1%} | {here.windows:,} | {here.drain} | {here.restarts:,} | "
                f"{pages} | {on_cpu.share_used:.1%} |",
                flush=True,
            )
