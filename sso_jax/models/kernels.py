"""Attention kernels: a plain computation for any device, and fused kernels for GPUs and TPUs.

All map (queries, keys, values, mask, rule) to the attention output. They differ in where the scores [T, S] are
stored: in memory (plain), or only in a kernel's registers.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sso_jax.models.places import Places
from sso_jax.models.remat_policy import save_for_backward
from sso_jax.models.sequences import RowForm, Sequences, copied, moved
from sso_jax.models.splash import KEY_AXES, QUERY_AXES, attend_by_mask, attend_by_segment
from sso_jax.runtime.mesh import over_mesh

HIDDEN_SCORE = -1e30
"""Added to the score of a masked key: large enough to make its weight 0, small enough to stay finite."""
LARGEST_CUDNN_HEAD = 128
"""Largest head size of cuDNN's fused kernel."""
SMALLEST_BLOCK, MOST_BLOCKS = 64, 8
"""Least number of queries in a block, and most blocks of a sequence: whole sequences are attended block by block."""


class ScoreRule(NamedTuple):
    """How the product of a query and a key becomes a score: `cap * tanh(scale * q k / cap)`."""

    scale: float | None = None
    """None for `1 / sqrt(H)`."""
    cap: float | None = None
    """None for no cap: the score is `scale * q k`."""

    def scale_for(self, head_size: int) -> float:
        """Returns the scale for heads of a size."""
        return 1.0 / math.sqrt(head_size) if self.scale is None else self.scale

    def capped(self, scores: Float[Array, "..."]) -> Float[Array, "..."]:
        """Caps scaled products."""
        return scores if self.cap is None else self.cap * jnp.tanh(scores / self.cap)

    def slope(self, capped: Float[Array, "..."]) -> Float[Array, "..."] | float:
        """Returns the derivative of `capped` by its argument, from its result: `1 - (capped / cap)^2`."""
        return 1.0 if self.cap is None else 1.0 - (capped / self.cap) ** 2


def _hidden(mask: Bool[Array, "#B T S"]) -> Float[Array, "#B 1 1 T S"]:
    """Returns what is added to the scores: 0 for visible keys."""
    return jnp.where(mask, 0.0, HIDDEN_SCORE)[:, None, None]


def _scores(queries, keys, rule: ScoreRule) -> Float[Array, "B K G T S"]:
    """Returns the scores of all keys, hidden or not."""
    scaled = queries * rule.scale_for(queries.shape[-1])
    return rule.capped(jnp.einsum("bkgth,bksh->bkgts", scaled, keys, preferred_element_type=jnp.float32))


def _attend_block(queries, keys, values, mask, rule) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T 1"]]:
    """Returns the attention output, and the log-sum-exp of each query's scores, float32."""
    return _mixed(_scores(queries, keys, rule) + _hidden(mask), values)


def _mixed(scores: Float[Array, "B K G T S"], values: Float[Array, "B K S H"]):
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum("bkgts,bksh->bkgth", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return (mixed / total).astype(values.dtype), top + jnp.log(total)


def _blocks(num_tokens: int) -> list[tuple[int, int]]:
    """Returns the first token and the end of each block of queries; they see keys up to the block's end."""
    size = max(SMALLEST_BLOCK, -(-num_tokens // (MOST_BLOCKS * SMALLEST_BLOCK)) * SMALLEST_BLOCK)
    return [(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def plain_attend(
    queries: Float[Array, "B K G T H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    mask: Bool[Array, "#B T T"],
    rule: ScoreRule = ScoreRule(),
) -> Float[Array, "B K G T H"]:
    """Returns `softmax(scores of visible keys) v`, softmax in float32 (Vaswani et al. 2017, eq. 1).

    No token sees a later one. A token that sees nothing, as padding may, gets the mean of the values, never NaN.

    Processes the queries in blocks, each with the keys up to the block's end: blocks above the diagonal are skipped,
    and only one block's scores are in memory. Nothing of size [T, S] is saved for the backward pass, which recomputes
    the weights from each query's log-sum-exp (Dao 2023, alg. 2).
    """
    return _attend_forward(queries, keys, values, mask, rule)[0]


def _attend_forward(queries, keys, values, mask, rule):
    parts = [
        _attend_block(queries[..., start:end, :], keys[:, :, :end], values[:, :, :end], mask[:, start:end, :end], rule)
        for start, end in _blocks(queries.shape[3])
    ]
    out, log_totals = (save_for_backward(jnp.concatenate(pieces, axis=3)) for pieces in zip(*parts, strict=True))
    return out, (queries, keys, values, mask, out, log_totals)


def _attend_backward(rule, residuals, d_out):
    """With P the weights, dV = P' dO, dS = P * (dO V' - sum(dO * O)), dQ = scale dS K, dK = scale dS' Q.

    With a cap, dS is also multiplied by the cap's slope.
    """
    queries, keys, values, mask, out, log_totals = residuals
    scale = rule.scale_for(queries.shape[-1])
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)  # [B, K, G, T, 1]
    d_queries, d_keys, d_values = [], jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
    for start, end in _blocks(queries.shape[3]):
        q, k, v, do = queries[..., start:end, :], keys[:, :, :end], values[:, :, :end], d_out[..., start:end, :]
        scores, hidden = _scores(q, k, rule), _hidden(mask[:, start:end, :end])
        weights = jnp.exp(scores + hidden - log_totals[..., start:end, :])  # [B, K, G, T, S]
        d_weights = dot("bkgth,bksh->bkgts", do, v)
        d_scores = weights * (d_weights - inner[..., start:end, :]) * rule.slope(scores)
        d_products = (d_scores * scale).astype(q.dtype)
        d_queries.append(dot("bkgts,bksh->bkgth", d_products, k).astype(q.dtype))
        d_keys = d_keys.at[:, :, :end].add(dot("bkgts,bkgth->bksh", d_products, q))
        d_values = d_values.at[:, :, :end].add(dot("bkgts,bkgth->bksh", weights.astype(v.dtype), do))
    return jnp.concatenate(d_queries, axis=3), d_keys.astype(keys.dtype), d_values.astype(values.dtype), None


plain_attend.defvjp(_attend_forward, _attend_backward)


class BySequence(NamedTuple):
    """Visibility as sequences, in place of a mask: a token sees those before it in its sequence, or the latest ones."""

    sequences: Sequences | Places
    sliding_window: int | None = None
    """Number of tokens that a token sees, its own included; None for all before it."""


def cudnn_attend(
    queries,
    keys,
    values,
    mask,
    rule=ScoreRule(),
    within: BySequence | None = None,
    implementation: str | None = "cudnn",
):
    """Like `plain_attend`, with cuDNN's fused kernel by way of `jax.nn.dot_product_attention`.

    Falls back to the plain kernel for float32, for head sizes that cuDNN does not support, and for capped scores. With
    a mask besides its own causal one, the cuDNN kernel runs at half speed. Where `within` describes the same visibility
    as the mask, each sequence is therefore attended separately; the queries may then be those of some tokens only.
    """
    head_size = keys.shape[3]
    fused = queries.dtype in (jnp.bfloat16, jnp.float16) and head_size <= LARGEST_CUDNN_HEAD
    if rule.cap is not None or (implementation == "cudnn" and not fused):
        return plain_attend(queries, keys, values, mask, rule)
    scale = rule.scale_for(head_size)
    if within is not None:
        return _attend_sequences(queries, keys, values, scale, within, implementation)
    whole = jnp.broadcast_to(mask[:, None], (queries.shape[0], 1, *mask.shape[1:]))  # [B, 1, T, S]
    flat = (_by_token(x) for x in (queries, keys[:, :, None], values[:, :, None]))
    out = jax.nn.dot_product_attention(*flat, mask=whole, is_causal=True, scale=scale, implementation=implementation)
    return _by_head(out, queries.shape)


def _by_token(x: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    return x.transpose(0, 3, 1, 2, 4).reshape(x.shape[0], x.shape[3], -1, x.shape[4])


def _by_head(x: Float[Array, "B T N H"], shape: tuple[int, ...]) -> Float[Array, "B K G T H"]:
    batch, num_kv_heads, group, length, head_size = shape
    return x.reshape(batch, length, num_kv_heads, group, head_size).transpose(0, 2, 3, 1, 4)


def _attend_sequences(queries, keys, values, scale: float, within: BySequence, implementation: str | None):
    """Attends within each sequence separately; queries that belong to none get 0."""
    reach = None if within.sliding_window is None else (within.sliding_window - 1, 0)

    def of_device(queries, keys, values, sequences: Sequences):
        (batch, num_queries), (_, num_sequences) = sequences.place.shape, sequences.lengths.shape

        def flat(x):
            return _by_token(x).reshape(batch, x.shape[3], -1)  # [B, T, N*H]

        placed = (
            moved(flat(queries), sequences.query, sequences.place),
            copied(flat(keys[:, :, None]), sequences),
            copied(flat(values[:, :, None]), sequences),
        )
        head_size = queries.shape[4]

        def apart(x):
            return x.reshape(batch * num_sequences, -1, x.shape[2] // head_size, head_size)  # [B*Z, U, N, H]

        lengths = sequences.lengths.reshape(-1)
        out = jax.nn.dot_product_attention(
            *map(apart, placed),
            is_causal=True,
            scale=scale,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            local_window_size=reach,
            implementation=implementation,
        )
        found = moved(out.reshape(batch, sequences.query.shape[1], -1), sequences.place, sequences.query)  # [B, W, N*H]
        return _by_head(found.reshape(batch, num_queries, -1, queries.shape[4]), queries.shape)

    names = (QUERY_AXES, KEY_AXES, KEY_AXES, ("batch",))
    return over_mesh(of_device, names, names[0])(queries, keys, values, within.sequences)


def splash_attend(
    queries, keys, values, mask, rule=ScoreRule(), within: BySequence | None = None, interpret: bool = False
):
    """Like `plain_attend`, with the splash kernel for TPUs: by segments where `within` has places, else by the mask."""
    scale = rule.scale_for(queries.shape[-1])
    if within is None:
        return attend_by_mask(queries, keys, values, mask, scale, rule.cap, interpret)
    places, window = within.sequences, within.sliding_window
    return attend_by_segment(queries, keys, values, places, scale, rule.cap, window, interpret)


KERNELS: dict[str, Callable] = {
    "plain": plain_attend,
    "cudnn": cudnn_attend,
    "splash": splash_attend,
    "splash_interpreted": partial(splash_attend, interpret=True),
}
"""Kernels for whole sequences, by name; `splash_interpreted` runs the TPU kernel in an interpreter, for tests."""
ROW_FORMS = {
    "cudnn": RowForm.SEQUENCES,
    "splash": RowForm.PLACES,
    "splash_interpreted": RowForm.PLACES,
}
"""What packed rows hold for the kernels that can take `BySequence`."""


def default_kernel(platform: str) -> str:
    """Returns the name of the kernel for devices of a platform, as JAX names it."""
    return {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform, "plain")
