"""The key/value cache of decoding: pages of slots, and attention that reads the pages in use once, in their order.

Rows of different lengths share one pool of pages. A row's tokens fill its own pages from the left; what a row holds is
described by a `PageTable`. During a window of decode steps the pool is only read: the tokens of the window itself are
in a small dense cache (`attention.Cache`), which `write_window` appends to the pages afterwards.

Softmax over all of a row's keys is put together from the parts of its pages (Dao et al. 2022, alg. 1): each page gives
its largest score, the sum of its weights relative to that, and the weighted sum of its values. A row's parts are
combined in the order of its tokens, so that the result does not depend on where its pages lie or on other rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sso_jax.models.architecture import Architecture
from sso_jax.models.kernels import HIDDEN_SCORE, ScoreRule
from sso_jax.runtime.mesh import constrain, over_mesh

PAGE_SIZES = {"cpu": 64}
"""Slots of a page by platform."""
PAGE_SIZE = 128
"""Slots of a page elsewhere: a TPU pads the last axis of an array to as many."""
CPU_CHUNK, NUM_CHUNKS = 16, 4
"""Pages that are read at a time: on a CPU few enough for its cache, elsewhere a pool is read in so many chunks."""


class PagedCache(NamedTuple):
    """Keys and values of all layers in N pages of P slots. Keys are transposed: their products need no other layout."""

    keys: Float[Array, "L N K H P"]
    values: Float[Array, "L N K P H"]


CACHE_AXES = ("layers", "batch", "kv_heads", None, None)
"""Logical names of the axes of a cache's arrays, paged or not; each shard of the batch has its own pages."""


class PageTable(NamedTuple):
    """Which pages each row reads; indices of rows and pages count within a shard of the batch."""

    owner: Int[Array, "N"]
    """Row of each page; any row for a page that is not in use."""
    positions: Int[Array, "N P"]
    """Position of the owner's token in each slot; -1 for a slot without one."""
    pages: Int[Array, "B J"]
    """Pages of each row in the order of its tokens, -1 after the last."""
    num_used: Int[Array, "S"]
    """For each shard, the number of pages up to the last one in use: later ones are not read."""


TABLE_AXES = PageTable(("batch",), ("batch", None), ("batch", None), ("batch",))
"""Logical names of the axes of a table."""


def chunk_size(num_pages: int, kernel: str) -> int:
    """Returns the number of pages that are read at a time; `kernel` is the name of the kernel for whole sequences."""
    return min(CPU_CHUNK, num_pages) if kernel == "plain" else -(-num_pages // NUM_CHUNKS)


def page_size_of(platform: str) -> int:
    """Returns the number of slots of a page on devices of a platform, as JAX names it."""
    return PAGE_SIZES.get(platform, PAGE_SIZE)


def empty_pages(architecture: Architecture, num_pages: int, page_size: int, dtype: jnp.dtype) -> PagedCache:
    """Returns a cache of zeros for all layers."""
    a = architecture
    shape = (a.num_layers, num_pages, a.num_kv_heads)
    keys = jnp.zeros((*shape, a.head_size, page_size), dtype)
    values = jnp.zeros((*shape, page_size, a.head_size), dtype)
    return PagedCache(constrain(keys, *CACHE_AXES), constrain(values, *CACHE_AXES))


def write_prompts(
    cache: PagedCache, keys: Float[Array, "L R K T H"], values: Float[Array, "L R K T H"], pages: Int[Array, "R J"]
) -> PagedCache:
    """Writes whole prompts from the first slot of their pages on.

    Args:
      cache: the cache.
      keys: keys of the R prompts.
      values: their values.
      pages: pages of each prompt, at least as many as its T slots need; N or more for none, which writes nothing.
    """
    page_size = cache.values.shape[3]
    padding = pages.shape[1] * page_size - keys.shape[3]

    def write(keys, values, new_keys, new_values, pages):
        def in_pages(x):  # [L, R, K, T, H] -> [L, R*J, K, P, H]
            layers, rows, heads, _, size = x.shape
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding), (0, 0)))
            x = x.reshape(layers, rows, heads, -1, page_size, size).swapaxes(2, 3)  # [L, R, J, K, P, H]
            return x.reshape(layers, -1, heads, page_size, size)

        flat = pages.reshape(-1)
        written = keys.at[:, flat].set(in_pages(new_keys).swapaxes(-1, -2), mode="drop")
        return written, values.at[:, flat].set(in_pages(new_values), mode="drop")

    return PagedCache(*_on_shards(write, (cache.keys, cache.values, keys, values), pages))


def write_window(
    cache: PagedCache,
    keys: Float[Array, "L B K W H"],
    values: Float[Array, "L B K W H"],
    page: Int[Array, "B"],
    part: Int[Array, "B"],
) -> PagedCache:
    """Writes the W tokens of a window to each row's page, whose slots are divided into P/W parts.

    Args:
      cache: the cache.
      keys: keys of the window.
      values: their values.
      page: page of each row; N or more writes nothing.
      part: part of the page.
    """
    window = keys.shape[3]

    def write(keys, values, new_keys, new_values, page, part):
        in_parts = keys.reshape(*keys.shape[:-1], -1, window)  # [L, N, K, H, P/W, W]
        new = new_keys.transpose(1, 0, 2, 4, 3)  # [B, L, K, H, W]
        written = in_parts.at[:, page, :, :, part].set(new, mode="drop").reshape(keys.shape)
        layers, pages, heads, _, size = values.shape
        in_parts = values.reshape(layers, pages, heads, -1, window, size)  # [L, N, K, P/W, W, H]
        new = new_values.transpose(1, 0, 2, 3, 4)  # [B, L, K, W, H]
        return written, in_parts.at[:, page, :, part].set(new, mode="drop").reshape(values.shape)

    return PagedCache(*_on_shards(write, (cache.keys, cache.values, keys, values), page, part))


def _on_shards(write, arrays: tuple, *indices):
    """Applies `write` to each shard's own pages and rows."""
    names = [CACHE_AXES] * len(arrays) + [("batch", *(None,) * (index.ndim - 1)) for index in indices]
    return over_mesh(write, tuple(names), [CACHE_AXES, CACHE_AXES])(*arrays, *indices)


class _Parts(NamedTuple):
    """Parts of a softmax over keys, in float32: largest score, sum of weights, and weighted sum of values."""

    top: Float[Array, "... G 1"]
    total: Float[Array, "... G 1"]
    mixed: Float[Array, "... G H"]


def _attend_part(queries, keys, values, visible, rule: ScoreRule) -> _Parts:
    """Attends from queries [Z, K, G, H] to keys [Z, K, H, S] and values [Z, K, S, H]; visible is [Z, S]."""
    scaled = queries * rule.scale_for(queries.shape[-1])
    scores = rule.capped(jnp.einsum("zkgh,zkhs->zkgs", scaled, keys, preferred_element_type=jnp.float32))
    scores = scores + jnp.where(visible, 0.0, HIDDEN_SCORE)[:, None, None]
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(visible[:, None, None], jnp.exp(scores - top), 0.0)
    mixed = jnp.einsum("zkgs,zksh->zkgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return _Parts(top, jnp.sum(weights, axis=-1, keepdims=True), mixed)


def _attend_pages(queries, earliest, pages: PagedCache, layer, table: PageTable, rule: ScoreRule, size: int) -> _Parts:
    """Returns the parts of all pages [N, K, G, .], read `size` at a time; those of pages that are not read are 0."""
    num_pages = pages.keys.shape[1]
    visible = table.positions >= earliest[table.owner][:, None]  # [N, P]

    def chunk_of(x, start):
        return jax.lax.dynamic_slice_in_dim(x, start, size)

    def of_layer(x, start):
        return jax.lax.dynamic_slice(x, (layer, start, 0, 0, 0), (1, size, *x.shape[2:]))[0]

    def add(number, parts: _Parts) -> _Parts:
        start = jnp.minimum(number * size, num_pages - size)  # the last chunk may overlap the one before
        own = queries[chunk_of(table.owner, start)]  # [Z, K, G, H]
        seen = chunk_of(visible, start)
        found = _attend_part(own, of_layer(pages.keys, start), of_layer(pages.values, start), seen, rule)

        def put(whole, part):
            return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)

        return jax.tree.map(put, parts, found)

    heads = (num_pages, *queries.shape[1:3])
    nothing = _Parts(*(jnp.zeros((*heads, width), jnp.float32) for width in (1, 1, queries.shape[-1])))
    return jax.lax.fori_loop(0, -(-table.num_used[0] // size), add, nothing)


class RowView(NamedTuple):
    """What the one token of each row sees, in a layer."""

    window_mask: Bool[Array, "#B W"]
    """Which of the window's own tokens; at least one."""
    earliest: Int[Array, "B"]
    """Position from which on it sees the tokens in its pages; 0 for all."""


def paged_attend(
    queries: Float[Array, "B K G H"],
    recent: tuple[Float[Array, "B K W H"], Float[Array, "B K W H"]],
    view: RowView,
    cache: PagedCache,
    layer: Int[Array, ""],
    table: PageTable,
    rule: ScoreRule = ScoreRule(),
    kernel: str = "plain",
) -> Float[Array, "B K G H"]:
    """Returns `softmax(scores of the row's keys) v` for one query per row, softmax in float32.

    Args:
      queries: query of each row.
      recent: keys and values of the window's own tokens.
      view: what each row sees.
      cache: the tokens before the window.
      layer: index of the layer in the cache.
      table: where each row's tokens are in the cache.
      rule: from products to scores.
      kernel: name of the kernel for whole sequences, which says what device this is for.
    """

    def of_shard(queries, keys, values, window_mask, earliest, cached_keys, cached_values, layer, *table):
        table, size = PageTable(*table), chunk_size(cached_keys.shape[1], kernel)
        pages = _attend_pages(queries, earliest, PagedCache(cached_keys, cached_values), layer, table, rule, size)
        seen = jnp.broadcast_to(window_mask, (queries.shape[0], window_mask.shape[1]))
        recent = _attend_part(queries, keys.swapaxes(2, 3), values, seen, rule)
        used = (table.pages >= 0)[:, :, None, None, None]  # [B, J, 1, 1, 1]
        of_rows = jax.tree.map(lambda part: part[jnp.maximum(table.pages, 0)], pages)  # [B, J, K, G, .]
        tops = jnp.where(used, of_rows.top, HIDDEN_SCORE)
        top = jnp.maximum(jnp.max(tops, axis=1), recent.top)
        factors, factor = jnp.where(used, jnp.exp(tops - top[:, None]), 0.0), jnp.exp(recent.top - top)
        total = jnp.sum(factors * of_rows.total, axis=1) + factor * recent.total
        mixed = jnp.sum(factors * of_rows.mixed, axis=1) + factor * recent.mixed
        return (mixed / total).astype(values.dtype)

    heads = ("batch", "kv_heads", None, None)
    mask_axes = ("batch" if view.window_mask.shape[0] > 1 else None, None)
    names = (heads, heads, heads, mask_axes, ("batch",), CACHE_AXES, CACHE_AXES, (), *TABLE_AXES)
    return over_mesh(of_shard, names, heads)(queries, *recent, *view, *cache, jnp.asarray(layer), *table)
