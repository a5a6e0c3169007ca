"""The attention layer: projections, rotary positions, key/value cache, and masks for packed and plain rows."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from sso_jax.models.architecture import Architecture, LayerKind
from sso_jax.models.kernels import KERNELS, BySequence, ScoreRule
from sso_jax.models.layers import (
    Adapters,
    HeadsNorm,
    Projection,
    RMSNorm,
    Rotation,
    apply_rope,
    projection_options,
    rotation,
)
from sso_jax.models.paged_cache import CACHE_AXES, PagedCache, PageTable, RowView, paged_attend
from sso_jax.models.places import Places
from sso_jax.models.remat_policy import save_for_backward
from sso_jax.models.sequences import Sequences
from sso_jax.runtime.mesh import constrain


class Cache(NamedTuple):
    """Keys and values that all layers write: of a prompt's tokens, or of a window of decode steps."""

    keys: Float[Array, "L B K S H"]
    values: Float[Array, "L B K S H"]


class Pages(NamedTuple):
    """What decoding reads besides the cache that it writes: the tokens before the window."""

    cache: PagedCache
    table: PageTable
    window_positions: Int[Array, "B W"]
    """Position of the token in each slot of the cache that is written."""


def empty_cache(architecture: Architecture, batch_size: int, num_slots: int, dtype: jnp.dtype) -> Cache:
    """Returns a cache of zeros for all layers."""
    shape = (architecture.num_layers, batch_size, architecture.num_kv_heads, num_slots, architecture.head_size)
    zeros = constrain(jnp.zeros(shape, dtype), *CACHE_AXES)
    return Cache(keys=zeros, values=zeros)


def _written(cache: Cache, keys: Float[Array, "B K T H"], values: Float[Array, "B K T H"], layer, slot) -> Cache:
    """Writes the keys and values of a layer from `slot` on."""

    def write(whole, part):
        return jax.lax.dynamic_update_slice(whole, part[None].astype(whole.dtype), (layer, 0, 0, slot, 0))

    return Cache(write(cache.keys, keys), write(cache.values, values))


def _layer_of(cache: Cache, layer: Int[Array, ""]) -> Cache:
    """Returns the keys and values of one layer, without the first axis."""
    return jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False), cache)


def tree_mask(tree: Int[Array, "B T"], branch: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Returns which token (second axis) sees which (third): earlier ones of its tree, on the trunk or on its branch.

    A row holds several trees side by side. A tree is a prompt (branch 0) and its responses (branches 1, 2, ...), which
    do not see each other. For one tree `p p a a b`, with p on the trunk:

            p p a a b
        p   x . . . .
        p   x x . . .
        a   x x x . .
        a   x x x x .
        b   x x . . x
    """
    length = tree.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same_tree = tree[:, :, None] == tree[:, None, :]
    visible = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    return causal[None] & same_tree & visible


def causal_mask(num_tokens: int) -> Bool[Array, "1 T T"]:
    """Returns the mask with which each token sees itself and all tokens before it."""
    return jnp.tril(jnp.ones((1, num_tokens, num_tokens), bool))


class LayerView(NamedTuple):
    """What the attention of all layers of a kind reads besides the activations."""

    rotation: Rotation
    mask: Bool[Array, "#B T S"]
    """Which token sees which; with pages, which slot of the cache that is written."""
    earliest: Int[Array, "B"]
    """With pages, the position from which on a row's token sees the tokens in its pages."""


def layer_view(
    kind: LayerKind,
    num_rotated: int,
    positions: Int[Array, "B T"],
    key_positions: Int[Array, "#B S"],
    mask: Bool[Array, "#B T S"],
) -> LayerView:
    """Returns what layers of a kind read.

    A sliding window counts positions, not columns: in a packed row the positions of a response go on from those of its
    prompt, which may lie far to the left.

    Args:
      kind: the kind of layers.
      num_rotated: rotated features of a head.
      positions: position of each token.
      key_positions: position of the token in each column of the mask.
      mask: which token sees which without a sliding window.
    """
    turns = rotation(positions, kind.rope, num_rotated)
    if kind.sliding_window is None:
        return LayerView(turns, mask, jnp.zeros_like(positions[:, 0]))
    earliest = jnp.maximum(0, positions - kind.sliding_window + 1)  # [B, T]
    return LayerView(turns, mask & (key_positions[:, None, :] >= earliest[:, :, None]), earliest[:, 0])


class AttentionInputs(NamedTuple):
    """What the attention of every layer reads besides the activations."""

    views: tuple[LayerView, ...]
    """One for each kind of layers."""
    slot: Int[Array, ""]
    """Cache slot of the first token."""
    sequences: Sequences | Places | None = None
    """The visibility as sequences, without sliding windows, for kernels that take them."""
    pages: Pages | None = None


def _kind(architecture: Architecture, layer: Int[Array, ""] | int) -> Int[Array, ""] | int:
    """Returns the index of a layer's kind: a Python number if there is one kind, or if layers are unrolled."""
    if len(architecture.kinds) == 1:
        return 0
    indices = architecture.kind_indices()
    return indices[layer] if isinstance(layer, int) else jnp.asarray(indices)[layer]


def _of_kind(kind: Int[Array, ""] | int, views: tuple[LayerView, ...]) -> LayerView:
    """Returns the view of a kind of layers."""
    if isinstance(kind, int):
        return views[kind]
    return jax.tree.map(lambda *parts: jax.lax.select_n(kind, *jnp.broadcast_arrays(*parts)), *views)


def _switch(kind: Int[Array, ""] | int, branches: list[Callable], *arrays):
    """Calls the branch for a kind of layers."""
    return branches[kind](*arrays) if isinstance(kind, int) else jax.lax.switch(kind, branches, *arrays)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; with a cache, writes its keys and values at `slot`.

    Without pages, tokens see each other as the mask says; a cache is then only filled. With pages, each row has one
    token, which sees its row's pages and what the mask shows of the cache.
    """

    architecture: Architecture
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    attend: str = "plain"
    """Name in `KERNELS` of the kernel for whole sequences."""
    adapters: Adapters = Adapters()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        inputs: AttentionInputs,
        cache: Cache | None,
        layer: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Returns the attention output and the cache with the keys and values of these tokens."""
        a, (batch, length) = self.architecture, x.shape[:2]
        queries = self._heads("query", a.num_heads, "heads", x)  # [B, N, T, H]
        keys = self._heads("key", a.num_kv_heads, "kv_heads", x)  # [B, K, T, H]
        values = save_for_backward(self._heads("value", a.num_kv_heads, "kv_heads", x))  # [B, K, T, H]
        if a.qk_norm != "none":
            queries = self._norm("query", "heads")(save_for_backward(queries))
            keys = self._norm("key", "kv_heads")(save_for_backward(keys))
        kind = _kind(a, layer)
        view = _of_kind(kind, inputs.views)
        queries, keys = (save_for_backward(apply_rope(part, view.rotation)) for part in (queries, keys))
        grouped = queries.reshape(batch, a.num_kv_heads, -1, length, a.head_size)  # [B, K, G, T, H]
        grouped = constrain(grouped, "batch", "kv_heads", None, None, None)
        if cache is not None:
            cache = _written(cache, keys, values, layer, inputs.slot)
        rule = ScoreRule((a.query_scalar or a.head_size) ** -0.5, a.score_cap)
        if inputs.pages is None:
            out = self._attend_whole(kind, grouped, keys, values, view.mask, rule, inputs.sequences)
        else:
            own, pages = _layer_of(cache, layer), inputs.pages
            seen = RowView(view.mask[:, 0], view.earliest)
            query = grouped[:, :, :, 0]
            out = paged_attend(query, (own.keys, own.values), seen, pages.cache, layer, pages.table, rule, self.attend)
            out = out[:, :, :, None]  # [B, K, G, T, H]
        out = out.transpose(0, 3, 1, 2, 4).reshape(batch, length, a.num_heads, a.head_size)  # [B, T, N, H]
        shape, axes = (a.num_heads, a.head_size, a.embed_dim), ("heads", "head_size", "embed")
        return Projection(shape, axes, **projection_options(self), name="out")(out), cache

    def _attend_whole(self, kind, queries, keys, values, mask, rule: ScoreRule, sequences: Sequences | Places | None):
        """Attends within whole sequences; a kernel that takes sequences is compiled for each sliding window."""
        kernel = KERNELS[self.attend]
        if sequences is None:
            return kernel(queries, keys, values, mask, rule)

        def attend(window: int | None, *arrays):
            return kernel(*arrays, rule, BySequence(sequences, window))

        branches = [partial(attend, kind.sliding_window) for kind in self.architecture.kinds]
        return _switch(kind, branches, queries, keys, values, mask)

    def _norm(self, part: str, axis: str) -> nn.Module:
        """Returns the norm of the queries or the keys."""
        a = self.architecture
        if a.qk_norm == "head":
            return RMSNorm(a.norm_eps, a.norm_offset, self.param_dtype, name=f"{part}_norm")
        return HeadsNorm(a.norm_eps, axis, self.param_dtype, name=f"all_{part}_norm")

    def _heads(self, name: str, num_heads: int, axis: str, x: Float[Array, "B T D"]) -> Float[Array, "B M T H"]:
        """Applies the projection `name` and moves the heads before the tokens."""
        shape = (self.architecture.embed_dim, num_heads, self.architecture.head_size)
        bias_axes = (axis, "head_size") if self.architecture.qkv_bias else ()
        projection = Projection(shape, ("embed", axis, "head_size"), bias_axes, **projection_options(self), name=name)
        return projection(x).transpose(0, 2, 1, 3)
