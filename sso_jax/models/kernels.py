"""Queries, keys, values and a mask in, attended values out: the plain computation, and the fast ones of GPU and TPU.

All take and give the same arrays; they differ in where the scores [T, S] live: in memory (plain), or in a kernel's
registers only.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sso_jax.models.remat_policy import NAME, save_for_backward
from sso_jax.models.sequences import Sequences, copied, moved
from sso_jax.runtime.mesh import over_mesh

HIDDEN_SCORE = -1e30
"""Added to the score of a key that must not be seen: large enough to swallow it, small enough to stay finite."""
LANES = 128
"""Splash attention works on blocks of a multiple of this many tokens."""
LARGEST_CUDNN_HEAD = 128


SMALLEST_BLOCK, MOST_BLOCKS = 64, 8
"""Whole sequences are attended a block of queries at a time."""


def step_attend(
    queries: Float[Array, "B K G T H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    mask: Bool[Array, "#B T S"],
) -> Float[Array, "B K G T H"]:
    """`softmax(q k / sqrt(H), over visible keys) v`, softmax in float32 (Vaswani et al. 2017, eq. 1).

    A token that sees nothing (padding may) gets the plain mean of the values, never NaN.
    """
    return _attend_block(queries, keys, values, mask)[0]


def _hidden(mask: Bool[Array, "#B T S"]) -> Float[Array, "#B 1 1 T S"]:
    """What is added to scores: nothing where a key is seen."""
    return jnp.where(mask, 0.0, HIDDEN_SCORE)[:, None, None]


def _scores(queries, keys, mask) -> Float[Array, "B K G T S"]:
    scale = 1.0 / math.sqrt(queries.shape[-1])
    scores = jnp.einsum("bkgth,bksh->bkgts", queries * scale, keys, preferred_element_type=jnp.float32)
    return scores + _hidden(mask)


def _attend_block(queries, keys, values, mask) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T 1"]]:
    """Attended values, and the log of the sum of the exponentials of each query's scores, float32."""
    return _mixed(_scores(queries, keys, mask), values)


def _mixed(scores: Float[Array, "B K G T S"], values: Float[Array, "B K S H"]):
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum("bkgts,bksh->bkgth", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return (mixed / total).astype(values.dtype), top + jnp.log(total)


def _blocks(num_queries: int, num_keys: int) -> list[tuple[int, int, int]]:
    """Of each block the first query, the end of its queries, and the end of the keys that they may see."""
    size = max(SMALLEST_BLOCK, -(-num_queries // (MOST_BLOCKS * SMALLEST_BLOCK)) * SMALLEST_BLOCK)
    ends = [(start, min(start + size, num_queries)) for start in range(0, num_queries, size)]
    return [(start, end, num_keys - num_queries + end) for start, end in ends]


@jax.custom_vjp
def plain_attend(queries, keys, values, mask):
    """As `step_attend` for a whole sequence, or the last T of its S tokens, in which no token sees a later one.

    Queries are taken a block at a time with the keys up to the block's end: blocks above the diagonal are not computed,
    and only one block's scores are in memory. Nothing of size [T, S] is kept for the backward pass, which computes the
    weights again from each query's log-sum-exp (Dao 2023, alg. 2).
    """
    return _attend_forward(queries, keys, values, mask)[0]


def _attend_forward(queries, keys, values, mask):
    parts = [
        _attend_block(queries[..., a:b, :], keys[:, :, :end], values[:, :, :end], mask[:, a:b, :end])
        for a, b, end in _blocks(queries.shape[3], keys.shape[2])
    ]
    out, log_totals = (save_for_backward(jnp.concatenate(pieces, axis=3)) for pieces in zip(*parts, strict=True))
    return out, (queries, keys, values, mask, out, log_totals)


def _attend_backward(residuals, d_out):
    """With P the weights, dV = P' dO, dS = P * (dO V' - sum(dO * O)), dQ = dS K / sqrt(H), dK = dS' Q / sqrt(H)."""
    queries, keys, values, mask, out, log_totals = residuals
    scale = 1.0 / math.sqrt(queries.shape[-1])
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)  # [B, K, G, T, 1]
    d_queries, d_keys, d_values = [], jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
    for a, b, end in _blocks(queries.shape[3], keys.shape[2]):
        q, k, v, do = queries[..., a:b, :], keys[:, :, :end], values[:, :, :end], d_out[..., a:b, :]
        weights = jnp.exp(_scores(q, k, mask[:, a:b, :end]) - log_totals[..., a:b, :])  # [B, K, G, T, S]
        d_weights = dot("bkgth,bksh->bkgts", do, v)
        d_scores = (weights * (d_weights - inner[..., a:b, :]) * scale).astype(q.dtype)
        d_queries.append(dot("bkgts,bksh->bkgth", d_scores, k).astype(q.dtype))
        d_keys = d_keys.at[:, :, :end].add(dot("bkgts,bkgth->bksh", d_scores, q))
        d_values = d_values.at[:, :, :end].add(dot("bkgts,bkgth->bksh", weights.astype(v.dtype), do))
    return jnp.concatenate(d_queries, axis=3), d_keys.astype(keys.dtype), d_values.astype(values.dtype), None


plain_attend.defvjp(_attend_forward, _attend_backward)


def cudnn_attend(queries, keys, values, mask, sequences: Sequences | None = None, implementation: str | None = "cudnn"):
    """As `plain_attend`, by cuDNN's fused kernel through `jax.nn.dot_product_attention`; in float32, which it lacks,
    the plain one.

    With a mask beside its own that no token sees a later one the kernel runs at half of its speed: where `sequences`
    say the same as the mask, each is attended for itself. The queries may then be those of some tokens.
    """
    num_tokens, head_size = keys.shape[2:]
    fused = queries.dtype in (jnp.bfloat16, jnp.float16) and head_size <= LARGEST_CUDNN_HEAD
    if implementation == "cudnn" and not fused:
        return plain_attend(queries, keys, values, mask)
    if sequences is not None:
        return _attend_sequences(queries, keys, values, sequences, implementation)
    whole = jnp.broadcast_to(mask[:, None], (queries.shape[0], 1, *mask.shape[1:]))  # [B, 1, T, S]
    flat = (_by_token(x) for x in (queries, keys[:, :, None], values[:, :, None]))
    out = jax.nn.dot_product_attention(*flat, mask=whole, is_causal=True, implementation=implementation)
    return _by_head(out, queries.shape)


def _by_token(x: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    return x.transpose(0, 3, 1, 2, 4).reshape(x.shape[0], x.shape[3], -1, x.shape[4])


def _by_head(x: Float[Array, "B T N H"], shape: tuple[int, ...]) -> Float[Array, "B K G T H"]:
    batch, num_kv_heads, group, length, head_size = shape
    return x.reshape(batch, length, num_kv_heads, group, head_size).transpose(0, 2, 3, 1, 4)


def _attend_sequences(queries, keys, values, sequences: Sequences, implementation: str | None):
    """Each sequence for itself; queries that are asked nowhere find 0."""

    def of_device(queries, keys, values, sequences: Sequences):
        (batch, num_queries), (_, num_sequences) = sequences.place.shape, sequences.lengths.shape

        def flat(x):
            return _by_token(x).reshape(batch, x.shape[3], -1)  # [B, T, N*H]

        placed = (
            moved(flat(queries), sequences.query, sequences.place),
            copied(flat(keys[:, :, None]), sequences),
            copied(flat(values[:, :, None]), sequences),
        )
        apart = (
            x.reshape(batch * num_sequences, -1, x.shape[2] // queries.shape[4], queries.shape[4]) for x in placed
        )  # [B*Z, U, N, H]
        lengths = sequences.lengths.reshape(-1)
        out = jax.nn.dot_product_attention(
            *apart,
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation=implementation,
        )
        found = moved(out.reshape(batch, sequences.query.shape[1], -1), sequences.place, sequences.query)  # [B, W, N*H]
        return _by_head(found.reshape(batch, num_queries, -1, queries.shape[4]), queries.shape)

    heads = ("batch", "kv_heads", None, None)
    names = (("batch", "kv_heads", None, None, None), heads, heads, ("batch",))
    return over_mesh(of_device, names, names[0])(queries, keys, values, sequences)


def _splash_row(queries, keys, values, mask, interpret: bool):
    """One row: queries [N, T, H], keys and values [K, T, H], mask [T, T], T a multiple of the lanes."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to load, and of use on TPUs only

    length = queries.shape[1]
    block = next(size for size in (512, 384, 256, 128) if length % size == 0)
    names = ("q", "kv", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in names})
    kernel = splash.make_splash_mha(
        mask[None], block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name=NAME, interpret=interpret
    )
    # Under jit the flag comes back as a traced array, which the kernel then branches on in Python (seen in jax 0.10.2).
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    return kernel(queries, keys, values)


def splash_attend(queries, keys, values, mask, interpret: bool = False):
    """As `plain_attend` for T = S, by the splash kernel for TPUs (jax.experimental.pallas), which skips blocks that
    nobody sees.

    Which token sees which is data here (`tree_mask`), not a fixed pattern: the kernel gets the mask as an array, one
    for all heads. Each token is made to see itself, which real ones do anyway, so that no row of scores is empty.
    """
    length, head_size = queries.shape[3:]
    padding = -length % LANES
    mask = jnp.pad(mask, ((0, 0), (0, padding), (0, padding))) | jnp.eye(length + padding, dtype=bool)[None]

    def of_device(queries, keys, values, mask):
        rows, kv_heads, group, _, _ = queries.shape

        def pad(x):
            return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, padding), (0, 0)))

        flat = pad(queries / math.sqrt(head_size)).reshape(
            rows, kv_heads * group, length + padding, head_size
        )  # [B, N, T, H]
        mask = jnp.broadcast_to(mask, (rows, *mask.shape[1:]))

        def row(args):
            return _splash_row(*args, interpret)

        out = jax.lax.map(row, (flat, pad(keys), pad(values), mask))  # [B, N, T, H]
        return out[:, :, :length].reshape(queries.shape)

    heads = ("batch", "kv_heads", None, None)
    rows = "batch" if mask.shape[0] > 1 else None
    names = (("batch", "kv_heads", None, None, None), heads, heads, (rows, None, None))
    return over_mesh(of_device, names, names[0])(queries, keys, values, mask)


KERNELS: dict[str, Callable] = {
    "plain": plain_attend,
    "cudnn": cudnn_attend,
    "splash": splash_attend,
    "splash_interpreted": partial(splash_attend, interpret=True),
}
"""Attention of a whole sequence by name; `splash_interpreted` runs the TPU's kernel step by step on any machine, for
tests."""
BY_SEQUENCE = ("cudnn",)
"""Of these the ones that take `Sequences`."""


def default_kernel(platform: str) -> str:
    """Name of the attention to use on devices of a platform as JAX names it."""
    return {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform, "plain")
