"""Slots and pages without a device: every request ends once, pages are never shared, and few row-steps are wasted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.ragged.slots import simulate
from sso_jax.sampling.slots import WINDOW, PoolShape, Size, Slots, most_slots, response_start
from sso_jax.sampling.stage import pool_shape

PAGE = 64


def run(sizes, lengths, shape, lag=0, check=lambda slots: None):
    """Runs all requests; response i ends after `lengths[i]` tokens, which is seen `lag` windows late.

    Returns the slots, the order in which requests ended, and the rows of each window while requests were waiting.
    """
    slots, windows = Slots(sizes, range(len(sizes)), shape), []

    def before_window():
        check(slots)
        windows.append([(row, row.windows + 1) for row in slots.rows.values()] if slots.queue else [])

    return slots, simulate(slots, lengths, lag, before_window), windows


def share_used(lengths, windows, num_slots):
    """Share of row-steps that draw a wanted token while requests are waiting; a first token comes with its prompt."""
    full = [rows for rows in windows if rows]
    drawn = sum(
        min(WINDOW, max(0, lengths[row.request] - 1 - (done - 1) * WINDOW)) for rows in full for row, done in rows
    )
    return drawn / (len(full) * WINDOW * num_slots)


def check_pages(slots):
    """No page has two owners, and each row has all the pages that the next window reads and writes."""
    inputs, shape = slots.window(), slots.shape
    for shard in range(shape.num_shards):
        rows = [row for slot, row in slots.rows.items() if slot // shape.shard_slots == shard]
        held = [page for row in rows for page in row.pages]
        assert len(held) == len(set(held)) <= shape.shard_pages
        assert all(0 <= page < shape.shard_pages for page in held)
    for slot, row in slots.rows.items():
        first = slot // shape.shard_slots * shape.shard_pages
        pages = inputs.table.pages[slot][inputs.table.pages[slot] >= 0]
        positions, prompt_tokens = inputs.table.positions[first + pages].reshape(-1), row.size.prompt_tokens
        start, num_cached = response_start(prompt_tokens), row.windows * WINDOW
        places = [*range(prompt_tokens), *range(start, start + num_cached)]
        assert np.flatnonzero(positions >= 0).tolist() == places
        assert positions[places].tolist() == list(range(prompt_tokens + num_cached))
        assert (inputs.table.owner[first + pages] == slot % shape.shard_slots).all()
        assert inputs.table.num_used[slot // shape.shard_slots] > pages.max()
        if not row.ends_with_next_window:
            place = row.pages.index(inputs.write_page[slot]) * PAGE + inputs.write_part[slot] * WINDOW
            assert place == start + row.windows * WINDOW
        else:
            assert inputs.write_page[slot] == shape.shard_pages


sizes_and_lengths = st.lists(
    st.tuples(st.integers(1, 400), st.integers(1, 300), st.floats(0, 1)), min_size=1, max_size=40
)


@settings(max_examples=60, deadline=None)
@given(sizes_and_lengths, st.integers(1, 3), st.integers(1, 4), st.integers(0, 20), st.integers(0, 1))
def test_every_request_ends_once_and_no_page_has_two_owners(drawn, shards, each, spare, lag):
    sizes = [Size(prompt, limit) for prompt, limit, _ in drawn]
    lengths = [max(1, int(limit * share)) for _, limit, share in drawn]
    longest = -(-max(map(most_slots, sizes)) // PAGE)
    shape = PoolShape(shards * each, shards * (longest + spare), longest, shards, PAGE)
    _, ended, _ = run(sizes, lengths, shape, lag, check_pages)
    assert sorted(ended) == list(range(len(sizes)))


def test_a_request_that_does_not_fit_an_empty_cache_is_refused():
    with pytest.raises(ValueError, match="a request needs 6 pages"):
        Slots([Size(300, 40)], [0], PoolShape(4, 5, 8))


@pytest.mark.parametrize(
    ("prompt", "limit", "expected"),
    [
        (1, 1, 1),
        (128, 17, 1),  # one window, which is not written back
        (128, 18, 2),
        (112, 18, 1),  # its window fills the first page
        (112, 33, 1),
        (112, 34, 2),
        (100, 2048, 17),  # 112 + 127 * 16 of 2,048 tokens are cached: 2,144 slots
    ],
)
def test_pages_of_a_request_by_hand(prompt, limit, expected):
    assert -(-most_slots(Size(prompt, limit)) // 128) == expected


def test_with_too_few_pages_the_youngest_starts_again_and_the_oldest_goes_on():
    """Ten pages and two rows that need eight each: the second is put back once the first needs its sixth."""
    slots, ended, _ = run([Size(100, 400)] * 2, [400, 400], PoolShape(2, 10, 8))
    assert ended == [0, 1] and slots.restarts >= 1


def test_rows_that_reach_their_limit_free_their_slots_without_being_read():
    """Equal responses of 49 tokens take exactly three windows each, even if results are read a window late."""
    _, ended, windows = run([Size(30, 49)] * 8, [49] * 8, PoolShape(4, 8, 1), lag=1)
    assert len(ended) == 8 and len(windows) == 6


def lognormal(count, mean, sigma, cap, seed=0):
    draw = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(draw, 2, cap).astype(int).tolist()


@pytest.mark.parametrize("num_slots", [16, 64, 256])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("sigma", [0.4, 1.0])
def test_nine_tenths_of_row_steps_draw_a_wanted_token_in_a_third_of_the_cache(num_slots, lag, sigma):
    lengths = lognormal(30 * num_slots, 350, sigma, 2048)
    prompts = np.random.default_rng(1).integers(20, 200, len(lengths)).tolist()
    sizes = [Size(prompt, 2048) for prompt in prompts]
    shape = pool_shape(sizes, num_slots, 1, PAGE)
    slots, ended, windows = run(sizes, lengths, shape, lag)
    assert len(ended) == len(lengths)
    assert share_used(lengths, windows, num_slots) > 0.9
    assert shape.num_pages * PAGE <= 0.4 * num_slots * (max(prompts) + 2048)
    assert slots.restarts < 0.01 * len(lengths)
