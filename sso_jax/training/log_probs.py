"""Packed rows in, log-probs of responses out: one sum a cell. No [B, T, V] is ever held."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from sso_jax.mesh import batch_sharding, batch_shards_in_context, constrain, replicated
from sso_jax.models.attention import tree_mask
from sso_jax.models.transformer import Transformer, project
from sso_jax.training.batches import Rows

MAX_CHUNK_LOGITS = 2**25
"""Logits that a device holds at once; response tokens are projected to the vocabulary in chunks of about that many."""


def token_log_probs(head: Float[Array, "D V"], hidden: Float[Array, "R M D"], target: Int[Array, "R M"], chunk: int) -> Float[Array, "R M"]:
    """`log softmax(hidden head)[target]` in float32, `chunk` tokens of each row at a time."""
    num_rows, num_targets, _ = hidden.shape
    padding = -num_targets % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    target = jnp.pad(target, ((0, 0), (0, padding)))
    log_probs = _chunked_log_probs(head, _to_chunks(hidden, chunk), _to_chunks(target, chunk))  # [M/chunk, R, chunk]
    return log_probs.swapaxes(0, 1).reshape(num_rows, -1)[:, :num_targets]


def _to_chunks(x: Shaped[Array, "R M ..."], chunk: int) -> Shaped[Array, "M/chunk R chunk ..."]:
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def _logits(hidden: Float[Array, "R C D"], head: Float[Array, "D V"]) -> Float[Array, "R C V"]:
    return constrain(project(hidden, head), "batch", None, "vocab")


def _is_target(target: Int[Array, "R C"], vocab_size: int) -> Bool[Array, "R C V"]:
    return target[..., None] == jnp.arange(vocab_size, dtype=target.dtype)[None, None, :]


@jax.custom_vjp
def _chunked_log_probs(head: Float[Array, "D V"], hidden: Float[Array, "A R C D"], target: Int[Array, "A R C"]) -> Float[Array, "A R C"]:
    """Log-probs of chunks one after another; one chunk's logits are in memory.

    With p the probabilities and g the gradient of a log-prob, that of the logits is `g (onehot(target) - p)`. The backward pass has p
    from the log-sum-exp that the forward pass kept, and from the logits: kept where all tokens are one chunk, computed anew otherwise.
    """
    return _log_probs_forward(head, hidden, target)[0]


def _log_probs_forward(head, hidden, target):
    single = hidden.shape[0] == 1

    def of_chunk(part):
        logits = _logits(part[0], head)
        log_total = jax.nn.logsumexp(logits, axis=-1)
        log_probs = jnp.sum(jnp.where(_is_target(part[1], head.shape[1]), logits, 0.0), axis=-1) - log_total
        return log_probs, log_total, logits if single else None

    log_probs, log_totals, logits = _over_chunks(of_chunk, (hidden, target))
    return log_probs, (head, hidden, target, log_totals, logits)


def _over_chunks(of_chunk: Callable, parts: tuple):
    """`of_chunk` of each chunk in turn; of a single one without a loop, through which it would be copied."""
    if parts[0].shape[0] > 1:
        return jax.lax.map(of_chunk, parts)
    return jax.tree.map(lambda x: x[None], of_chunk(jax.tree.map(lambda part: part[0], parts)))


def _log_probs_backward(kept, gradient):
    head, hidden, target, log_totals, logits = kept

    def of_chunk(part):
        """Gradients of the head, float32, and of a chunk's hidden states."""
        hidden, target, log_totals, logits, gradient = part
        probs = jnp.exp((_logits(hidden, head) if logits is None else logits) - log_totals[..., None])
        d_logits = gradient[..., None] * (_is_target(target, head.shape[1]) - probs)  # [R, C, V]
        flat = d_logits.astype(head.dtype).reshape(-1, head.shape[1])  # [R*C, V], for the reason in `flat_product`
        d_hidden = (flat @ head.T).reshape(hidden.shape)
        return jnp.matmul(hidden.reshape(flat.shape[0], -1).T, flat, preferred_element_type=jnp.float32), d_hidden

    parts = (hidden, target, log_totals, logits, gradient)
    if hidden.shape[0] == 1:
        d_head, d_hidden = _over_chunks(of_chunk, parts)
        d_head = d_head[0]
    else:

        def add(total, part):
            d_head, d_hidden = of_chunk(part)
            return total + d_head, d_hidden

        d_head, d_hidden = jax.lax.scan(add, jnp.zeros(head.shape, jnp.float32), parts)
    return d_head.astype(head.dtype), d_hidden, None


_chunked_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def cell_log_probs(model: Transformer, params, rows: Rows, num_cells: int) -> Float[Array, "cells"]:
    """Sum of the log-probs of each cell's tokens under the model at temperature 1, in nats, float32."""
    return _cell_sums(model, params, rows, _hidden_at_sources(model, params, rows), num_cells)


def cell_log_probs_and_means(
    model: Transformer, params, rows: Rows, num_cells: int
) -> tuple[Float[Array, "cells"], Float[Array, "cells D"]]:
    """`cell_log_probs`, and the mean of the final hidden states over each cell's tokens but its last, in float32; 0 of a single one."""
    hidden = _hidden_at_sources(model, params, rows)
    inside = (jnp.take_along_axis(rows.branch, rows.source, axis=1) > 0).astype(jnp.float32).reshape(-1)  # 0 at the prompt's last token
    flat = hidden.astype(jnp.float32).reshape(-1, hidden.shape[-1])
    totals, counts = (
        jax.ops.segment_sum(values, rows.cell.reshape(-1), num_segments=num_cells + 1)[:num_cells]
        for values in (flat * inside[:, None], inside)
    )
    means = totals / jnp.maximum(counts, 1.0)[:, None]
    return _cell_sums(model, params, rows, hidden, num_cells), means


def _hidden_at_sources(model: Transformer, params, rows: Rows) -> Float[Array, "R M D"]:
    """Final hidden states where response tokens are predicted from."""
    mask = tree_mask(rows.tree, rows.branch)
    hidden, _ = model.apply({"params": params}, rows.tokens, rows.positions, mask)
    return jnp.take_along_axis(hidden, rows.source[..., None], axis=1)


def _cell_sums(model: Transformer, params, rows: Rows, hidden: Float[Array, "R M D"], num_cells: int) -> Float[Array, "cells"]:
    head = model.apply({"params": params}, method="head_matrix")  # gathered here, once for all chunks
    num_rows, num_targets = rows.target.shape
    rows_of_device = -(-num_rows // batch_shards_in_context())
    chunk = max(1, min(num_targets, MAX_CHUNK_LOGITS // (rows_of_device * model.architecture.vocab_size)))
    log_probs = token_log_probs(head, hidden, rows.target, chunk)
    sums = jax.ops.segment_sum(log_probs.reshape(-1), rows.cell.reshape(-1), num_segments=num_cells + 1)
    return sums[:num_cells]


def build_score(model: Transformer, mesh: jax.sharding.Mesh, param_shardings) -> Callable[..., Float[Array, "cells"]]:
    """`cell_log_probs` compiled: rows over the batch axes. One program for each row shape."""

    def score_batch(params, rows: Rows, num_cells: int):
        return cell_log_probs(model, params, rows, num_cells)

    shardings = (param_shardings, batch_sharding(mesh))
    return jax.jit(score_batch, static_argnums=2, in_shardings=shardings, out_shardings=replicated(mesh))
