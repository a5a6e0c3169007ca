"""Log-probs of tokens from hidden states, a slice of the vocabulary at a time, with a backward pass of their own."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sso_jax.models.transformer import project
from sso_jax.runtime.mesh import constrain, gathered, vocab_shards_in_context

LANES = 128
"""Slices with at least this many entries are multiples of it, which is how TPUs tile an array's last axis."""


def token_log_probs(
    head: Float[Array, "D V"],
    hidden: Float[Array, "R M D"],
    target: Int[Array, "R M"],
    columns: int,
    cap: float | None = None,
) -> Float[Array, "R M"]:
    """Returns `log softmax(logits)[target]` in float32, with the logits of `models.transformer.project`.

    At most `columns` entries of each vocabulary shard are processed at a time.
    """
    parted = head.reshape(head.shape[0], vocab_shards_in_context(), -1)
    return _sliced_log_probs(parted, hidden, target, columns, cap)


class _Slice(NamedTuple):
    """A slice of `size` entries of each of the S vocabulary shards, in the order of the shards; E = S * `size`."""

    start: Int[Array, ""]
    """Index of the first entry in its shard. The last slice may overlap the previous one."""
    matrix: Float[Array, "D E"]
    is_target: Bool[Array, "R M E"]
    fresh: Bool[Array, "E"] | None
    """Entries that are in no earlier slice; None for all."""


def _slice_sizes(local_size: int, columns: int) -> tuple[int, int]:
    """Returns the number of slices of a shard, and the entries of each: nearly equal, at most `columns`."""
    if columns >= local_size:
        return 1, local_size
    unit = LANES if columns >= LANES else 1
    num = -(-local_size // (columns // unit * unit))
    return num, min(local_size, -(-local_size // (num * unit)) * unit)


def _slice(head: Float[Array, "D S L"], target: Int[Array, "R M"], number: Int[Array, ""] | int, size: int) -> _Slice:
    """Returns slice `number` of the head, with its embed axis gathered on every device."""
    width, num_shards, local_size = head.shape
    if size == local_size:
        matrix = gathered(head, "embed", "vocab", None).reshape(width, -1)
        return _Slice(jnp.int32(0), matrix, target[..., None] == jnp.arange(matrix.shape[1])[None, None, :], None)
    start = jnp.minimum(number * size, local_size - size)
    sliced = jax.lax.dynamic_slice_in_dim(head, start, size, axis=2)
    matrix = gathered(sliced, "embed", "vocab", None).reshape(width, -1)
    within = start + jnp.arange(size)
    ids = (jnp.arange(num_shards)[:, None] * local_size + within[None, :]).reshape(-1)
    fresh = jnp.broadcast_to(within >= number * size, (num_shards, size)).reshape(-1)
    return _Slice(start, matrix, (target[..., None] == ids[None, None, :]) & fresh[None, None, :], fresh)


def _logits(hidden: Float[Array, "R M D"], part: _Slice, cap: float | None) -> Float[Array, "R M E"]:
    logits = project(hidden, part.matrix, cap)
    if part.fresh is not None:
        logits = jnp.where(part.fresh[None, None, :], logits, -jnp.inf)
    return constrain(logits, "batch", None, "vocab")


def _log_sum_exp(logits: Float[Array, "R M E"]) -> Float[Array, "R M"]:
    """Returns `log sum(exp(logits))`; in one pass instead of two on a GPU, where this is bound by memory bandwidth."""
    plain = partial(jax.nn.logsumexp, axis=-1)
    if vocab_shards_in_context() > 1:
        return plain(logits)
    return jax.lax.platform_dependent(logits, cuda=_log_sum_exp_in_one_pass, default=plain)


def _log_sum_exp_in_one_pass(logits: Float[Array, "R M E"]) -> Float[Array, "R M"]:
    """Reduces (largest value so far, sum of exponentials relative to it) pairs."""

    def merged(a, b):
        (top_a, sum_a), (top_b, sum_b) = a, b
        smaller = jnp.exp(-jnp.abs(top_a - top_b))
        return jnp.maximum(top_a, top_b), jnp.where(top_a >= top_b, sum_a + sum_b * smaller, sum_a * smaller + sum_b)

    # The initial maximum is finite, because the difference of two infinities is NaN.
    nothing = jnp.finfo(logits.dtype).min, jnp.zeros((), logits.dtype)
    top, total = jax.lax.reduce((logits, jnp.ones_like(logits)), nothing, merged, (logits.ndim - 1,))
    return top + jnp.log(total)


def _chosen_logits(logits: Float[Array, "R M E"], part: _Slice, target: Int[Array, "R M"]) -> Float[Array, "R M"]:
    """Returns the target's logit if it is in the slice, else 0.

    Gathers if the vocabulary is not sharded, since XLA on a CPU writes the whole masked copy to memory before summing
    it. Sums a masked copy if the vocabulary is sharded; the devices then exchange one number per token.
    """
    if vocab_shards_in_context() > 1:
        return jnp.sum(jnp.where(part.is_target, logits, 0.0), axis=-1)
    entry = target - part.start
    inside = jnp.clip(entry, 0, logits.shape[-1] - 1)
    found = jnp.take_along_axis(logits, inside[..., None], axis=-1)[..., 0]
    return jnp.where((entry == inside) & (True if part.fresh is None else part.fresh[inside]), found, 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _sliced_log_probs(
    head: Float[Array, "D S L"],
    hidden: Float[Array, "R M D"],
    target: Int[Array, "R M"],
    columns: int,
    cap: float | None,
) -> Float[Array, "R M"]:
    """Log-probs over a vocabulary in S shards of L entries, one slice of every shard at a time.

    Only one slice's logits are in memory. With p the probabilities and g the gradient of a log-prob, that of the logits
    is `g (onehot(target) - p)`, times `1 - (logit / cap)^2` if logits are capped. The backward pass computes p from the
    log-sum-exp saved by the forward pass and from the logits, which are saved if there is only one slice and recomputed
    otherwise. The head's gradient of a slice is complete when the slice is done, so that no float32 sum of the whole
    gradient is needed.
    """
    return _log_probs_forward(head, hidden, target, columns, cap)[0]


def _log_probs_forward(head, hidden, target, columns, cap):
    num, size = _slice_sizes(head.shape[2], columns)

    def of_slice(number):
        part = _slice(head, target, number, size)
        logits = _logits(hidden, part, cap)
        return _log_sum_exp(logits), _chosen_logits(logits, part, target), logits

    if num == 1:
        log_total, chosen, logits = of_slice(0)
    else:

        def add(sums, number):
            log_total, chosen, _ = of_slice(number)
            return (jnp.logaddexp(sums[0], log_total), sums[1] + chosen), None

        nothing = jnp.full(target.shape, -jnp.inf), jnp.zeros(target.shape)
        (log_total, chosen), _ = jax.lax.scan(add, nothing, jnp.arange(num))
        logits = None
    return chosen - log_total, (head, hidden, target, log_total, logits)


def _log_probs_backward(columns, cap, residuals, gradient):
    head, hidden, target, log_total, logits = residuals
    (width, num_shards, local_size), flat_hidden = head.shape, hidden.reshape(-1, hidden.shape[-1])
    num, size = _slice_sizes(local_size, columns)

    def of_slice(number):
        """Returns the slice's start, gradient of the head, and share of the hidden states' by shard, in float32."""
        part = _slice(head, target, number, size)
        own = _logits(hidden, part, cap) if logits is None else logits
        probs = jnp.exp(own - log_total[..., None])
        d_logits = gradient[..., None] * (part.is_target - probs)  # [R, M, E]
        if cap is not None:
            d_logits = jnp.where(jnp.isfinite(own), d_logits * (1.0 - (own / cap) ** 2), 0.0)
        flat = d_logits.astype(head.dtype).reshape(flat_hidden.shape[0], -1)  # [R*M, E], see `flat_product`
        d_matrix = jnp.matmul(flat_hidden.T, flat, preferred_element_type=jnp.float32)  # [D, E]
        d_matrix = d_matrix.reshape(width, num_shards, size)
        return part.start, constrain(d_matrix, "embed", "vocab", None), _by_shard(flat, part.matrix, num_shards)

    if num == 1:
        _, d_head, d_hidden = of_slice(0)
    else:

        def add(sums, number):
            d_head, d_hidden = sums
            start, d_part, d_more = of_slice(number)
            # Nonzero only where two slices overlap, and d_part is 0 there.
            so_far = jax.lax.dynamic_slice_in_dim(d_head, start, size, axis=2)
            d_head = jax.lax.dynamic_update_slice_in_dim(d_head, so_far + d_part.astype(head.dtype), start, axis=2)
            return (constrain(d_head, "embed", "vocab", None), d_hidden + d_more), None

        nothing = jnp.zeros(head.shape, head.dtype), jnp.zeros((num_shards, *flat_hidden.shape), jnp.float32)
        (d_head, d_hidden), _ = jax.lax.scan(add, nothing, jnp.arange(num))
    return d_head.astype(head.dtype), jnp.sum(d_hidden, axis=0).astype(hidden.dtype).reshape(hidden.shape), None


def _by_shard(d_logits: Float[Array, "N E"], matrix: Float[Array, "D E"], num_shards: int) -> Float[Array, "S N D"]:
    """Returns `d_logits matrix^T` for the entries of each shard separately, in float32.

    Devices then sum their shares once, not in every slice.
    """
    if num_shards == 1:
        return jnp.matmul(d_logits, matrix.T, preferred_element_type=jnp.float32)[None]

    def split(x):
        return x.reshape(x.shape[0], num_shards, -1)

    products = jnp.einsum("nse,dse->snd", split(d_logits), split(matrix), preferred_element_type=jnp.float32)
    return constrain(products, "vocab", "batch", None)


_sliced_log_probs.defvjp(_log_probs_forward, _log_probs_backward)
