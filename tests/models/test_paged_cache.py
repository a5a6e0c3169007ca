"""Attention to pages held to a softmax in NumPy, whatever the pages' places, and the bytes that it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sso_jax.models.kernels import ScoreRule
from sso_jax.models.paged_cache import (
    PagedCache,
    PageTable,
    RowView,
    chunk_size,
    paged_attend,
    write_prompts,
    write_window,
)

LAYERS, KV_HEADS, GROUP, HEAD = 2, 2, 3, 8
WINDOW = 16
PAGE = 64


def num_pages_for(num_slots):
    return -(-num_slots // PAGE)


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_table(lengths, num_pages, order):
    """Table of rows of these lengths whose pages are taken from `order`, and each row's pages."""
    needed = [num_pages_for(length) for length in lengths]
    own, at = [], 0
    for count in needed:
        own.append(order[at : at + count])
        at += count
    owner, positions = np.zeros(num_pages, np.int32), np.full((num_pages, PAGE), -1, np.int32)
    pages = np.full((len(lengths), max(needed)), -1, np.int32)
    for row, (mine, length) in enumerate(zip(own, lengths, strict=True)):
        pages[row, : len(mine)] = mine
        owner[mine] = row
        places = np.arange(len(mine) * PAGE)
        positions[mine] = np.where(places < length, places, -1).reshape(-1, PAGE)
    return PageTable(owner, positions, pages, np.array([max(order[:at]) + 1], np.int32)), own


def filled(lengths, num_pages, order, layer=1):
    """Keys and values of each row, and a cache that holds them; what nobody sees is not a number."""
    table, own = make_table(lengths, num_pages, order)
    keys = np.full((LAYERS, num_pages, KV_HEADS, HEAD, PAGE), np.nan, np.float32)
    values = np.full((LAYERS, num_pages, KV_HEADS, PAGE, HEAD), np.nan, np.float32)
    rows = []
    for row, length in enumerate(lengths):
        k, v = random(row, KV_HEADS, length, HEAD), random(100 + row, KV_HEADS, length, HEAD)
        rows.append((k, v))
        for number, page in enumerate(own[row]):
            part = slice(number * PAGE, min(length, (number + 1) * PAGE))
            size = part.stop - part.start
            keys[:, page], values[:, page] = 0.0, 0.0
            keys[layer, page, :, :, :size] = k[:, part].swapaxes(1, 2)
            values[layer, page, :, :size] = v[:, part]
    used = table.num_used[0]
    keys[:, :used] = np.nan_to_num(keys[:, :used])  # read, but not seen
    values[:, :used] = np.nan_to_num(values[:, :used])
    return rows, PagedCache(keys, values), table


def softmax(queries, rows, recent_keys, recent_values, num_recent, earliest=(0,) * 8, scale=HEAD**-0.5, cap=None):
    """softmax(scores) v over a row's keys from `earliest` on and the window's first ones, in float64."""
    out = np.zeros(queries.shape)
    for b, k, g in np.ndindex(queries.shape[:3]):
        keys = np.concatenate([rows[b][0][k, earliest[b] :], recent_keys[b, k, :num_recent]]).astype(np.float64)
        values = np.concatenate([rows[b][1][k, earliest[b] :], recent_values[b, k, :num_recent]])
        scores = keys @ queries[b, k, g] * scale
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        out[b, k, g] = weights / weights.sum() @ values
    return out


def attend(queries, recent, cache, table, num_recent, earliest=None, rule=ScoreRule(), kernel="plain"):
    first = np.zeros(len(queries), np.int32) if earliest is None else np.array(earliest, np.int32)
    view = RowView((np.arange(WINDOW) < num_recent)[None], first)
    attended = jax.jit(paged_attend, static_argnames=("rule", "kernel"))
    return np.asarray(attended(queries, recent, view, cache, jnp.int32(1), table, rule=rule, kernel=kernel))


LENGTHS = [1, 128, 300, 77, 513]
INPUTS = (
    random(7, 5, KV_HEADS, GROUP, HEAD),
    (random(8, 5, KV_HEADS, WINDOW, HEAD), random(9, 5, KV_HEADS, WINDOW, HEAD)),
)


@pytest.mark.parametrize("num_recent", [1, 9, 16])
@pytest.mark.parametrize("kernel", ["plain", "splash"])  # chunks of a fixed size, and a fixed number of them
def test_a_row_attends_to_its_pages_and_to_the_window(num_recent, kernel):
    rows, cache, table = filled(LENGTHS, 80, np.random.default_rng(0).permutation(60).tolist())
    queries, recent = INPUTS
    expected = softmax(queries, rows, *recent, num_recent)
    np.testing.assert_allclose(attend(queries, recent, cache, table, num_recent, kernel=kernel), expected, atol=1e-5)


@pytest.mark.parametrize("rule", [ScoreRule(), ScoreRule(scale=0.7), ScoreRule(scale=2.0, cap=1.5)])
def test_a_row_attends_from_its_earliest_position_on_with_scaled_and_capped_scores(rule):
    """Windows that begin within a page, at its start, at the row's start and at its end, with only recent keys."""
    rows, cache, table = filled(LENGTHS, 80, np.random.default_rng(0).permutation(60).tolist())
    queries, recent = INPUTS
    earliest = (0, 65, 128, 77, 500)
    scale = HEAD**-0.5 if rule.scale is None else rule.scale
    expected = softmax(queries, rows, *recent, 9, earliest, scale, rule.cap)
    np.testing.assert_allclose(attend(queries, recent, cache, table, 9, earliest, rule), expected, atol=1e-5)


def test_bits_of_a_row_depend_neither_on_its_pages_places_nor_on_the_others():
    queries, recent = INPUTS
    results = []
    for seed in range(3):
        _, cache, table = filled(LENGTHS, 80, np.random.default_rng(seed).permutation(70).tolist())
        results.append(attend(queries, recent, cache, table, 5))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    _, cache, table = filled([LENGTHS[0], 900, LENGTHS[2], 3, 400], 80, list(range(80)))
    others = attend(queries, recent, cache, table, 5)
    np.testing.assert_array_equal(others[[0, 2]], results[0][[0, 2]])
    assert not np.array_equal(others[1], results[0][1])


def test_eight_devices_attend_like_one(eight_devices):
    """Rows and pages over four shards, heads over two; each shard has its own table."""
    queries, recent = random(1, 8, KV_HEADS, GROUP, HEAD), (random(2, 8, KV_HEADS, WINDOW, HEAD),) * 2
    lengths = [30, 200, 128, 5, 129, 64, 300, 1]
    parts = [filled(lengths[i : i + 2], 6, [3, 0, 2, 5, 1, 4]) for i in range(0, 8, 2)]
    rows = [row for own, _, _ in parts for row in own]
    width = max(table.pages.shape[1] for _, _, table in parts)
    tables = [
        table._replace(pages=np.pad(table.pages, ((0, 0), (0, width - table.pages.shape[1])), constant_values=-1))
        for _, _, table in parts
    ]
    cache = PagedCache(*(np.concatenate(x, axis=1) for x in zip(*(cache for _, cache, _ in parts), strict=True)))
    table = PageTable(*(np.concatenate(x) for x in zip(*tables, strict=True)))
    with jax.set_mesh(eight_devices):
        got = attend(queries, recent, cache, table, 4)
    np.testing.assert_allclose(got, softmax(queries, rows, *recent, 4), atol=1e-5)


@pytest.mark.parametrize("num_slots", [16, 64])
def test_pages_that_are_read_hold_little_else_than_live_keys(num_slots):
    """Bytes read over bytes of live keys and values, on lengths between admission and end, are at most 1.3."""
    draw = np.random.default_rng(num_slots)
    whole = np.minimum(draw.lognormal(np.log(350) - 0.245, 0.7, 4096), 2048)
    lengths = draw.choice(whole, num_slots, p=whole / whole.sum())  # those that a slot holds at a random moment
    live = (draw.integers(20, 200, num_slots) + lengths * draw.random(num_slots)).astype(int) + 1
    num_pages = 2 * sum(map(num_pages_for, live))
    table, _ = make_table(live.tolist(), num_pages, list(range(num_pages)))
    size = chunk_size(num_pages, "plain")
    read = -(-int(table.num_used[0]) // size) * size * PAGE
    assert read <= 1.3 * live.sum()


def test_prompts_and_windows_are_written_to_their_places():
    cache = PagedCache(jnp.zeros((LAYERS, 6, KV_HEADS, HEAD, PAGE)), jnp.full((LAYERS, 6, KV_HEADS, PAGE, HEAD), 9.0))
    keys, values = random(0, LAYERS, 3, KV_HEADS, 96, HEAD), random(1, LAYERS, 3, KV_HEADS, 96, HEAD)
    pages = np.array([[4, 1], [0, 6], [6, 6]])  # the second prompt has a single page, the third none
    cache = jax.jit(write_prompts)(cache, keys, values, pages)
    np.testing.assert_array_equal(cache.values[:, 4], values[:, 0, :, :PAGE])
    np.testing.assert_array_equal(cache.values[:, 1, :, :32], values[:, 0, :, PAGE:])
    np.testing.assert_array_equal(cache.keys[:, 4], keys[:, 0, :, :PAGE].swapaxes(-1, -2))
    np.testing.assert_array_equal(cache.keys[:, 0], keys[:, 1, :, :PAGE].swapaxes(-1, -2))
    assert np.all(np.asarray(cache.values[:, [2, 3, 5]]) == 9.0) and not np.asarray(cache.keys[:, [2, 3, 5]]).any()
    new_keys, new_values = random(2, LAYERS, 2, KV_HEADS, WINDOW, HEAD), random(3, LAYERS, 2, KV_HEADS, WINDOW, HEAD)
    after = jax.jit(write_window)(cache, new_keys, new_values, np.array([1, 6]), np.array([2, 3]))
    np.testing.assert_array_equal(after.values[:, 1, :, 32:48], new_values[:, 0])
    np.testing.assert_array_equal(after.keys[:, 1, :, :, 32:48], new_keys[:, 0].swapaxes(-1, -2))
    np.testing.assert_array_equal(after.values[:, 1, :, :32], cache.values[:, 1, :, :32])
    rest = [0, 2, 3, 4, 5]
    np.testing.assert_array_equal(after.values[:, rest], cache.values[:, rest])
