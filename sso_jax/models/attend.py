"""Queries, keys, values and a mask in, attended values out: the plain computation, and the fast ones of GPU and TPU.

All take and give the same arrays; they differ in where the scores [T, S] live: in memory (plain), or in a kernel's registers only.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sso_jax.mesh import over_mesh

HIDDEN_SCORE = -1e30
"""Added to the score of a key that must not be seen: large enough to swallow it, small enough to stay finite."""
LANES = 128
"""Splash attention works on blocks of a multiple of this many tokens."""
LARGEST_CUDNN_HEAD = 128


@jax.checkpoint
def plain_attend(
    queries: Float[Array, "B K G T H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    mask: Bool[Array, "#B T S"],
) -> Float[Array, "B K G T H"]:
    """`softmax(q k / sqrt(H), over visible keys) v`, softmax in float32 (Vaswani et al. 2017, eq. 1).

    Nothing of size [T, S] is kept for the backward pass, which computes the scores anew. A token that sees nothing (padding may) gets
    the plain mean of the values, never NaN.
    """
    scale = 1.0 / math.sqrt(queries.shape[-1])
    scores = jnp.einsum("bkgth,bksh->bkgts", queries * scale, keys, preferred_element_type=jnp.float32)
    scores = scores + jnp.where(mask, 0.0, HIDDEN_SCORE)[:, None, None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum("bkgts,bksh->bkgth", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return (mixed / total).astype(values.dtype)


def cudnn_attend(queries, keys, values, mask, implementation: str | None = "cudnn"):
    """As `plain_attend`, by cuDNN's fused kernel through `jax.nn.dot_product_attention`; in float32, which it lacks, the plain one."""
    batch, num_kv_heads, _, length, head_size = queries.shape
    fused = queries.dtype in (jnp.bfloat16, jnp.float16) and head_size <= LARGEST_CUDNN_HEAD
    if implementation == "cudnn" and not fused:
        return plain_attend(queries, keys, values, mask)
    flat = queries.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, head_size)  # [B, T, N, H]
    keys, values = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)  # [B, S, K, H]
    whole = jnp.broadcast_to(mask[:, None], (batch, 1, *mask.shape[1:]))  # [B, 1, T, S]
    out = jax.nn.dot_product_attention(flat, keys, values, mask=whole, implementation=implementation)
    return out.reshape(batch, length, num_kv_heads, -1, head_size).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]


def _splash_row(queries, keys, values, mask, interpret: bool):
    """One row: queries [N, T, H], keys and values [K, T, H], mask [T, T], T a multiple of the lanes."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to load, and of use on TPUs only

    length = queries.shape[1]
    block = next(size for size in (512, 384, 256, 128) if length % size == 0)
    names = ("q", "kv", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in names})
    kernel = splash.make_splash_mha(mask[None], block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    # Under jit the flag comes back as a traced array, which the kernel then branches on in Python (seen in jax 0.10.2).
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    return kernel(queries, keys, values)


def splash_attend(queries, keys, values, mask, interpret: bool = False):
    """As `plain_attend` for T = S, by the splash kernel for TPUs (jax.experimental.pallas), which skips blocks that nobody sees.

    Which token sees which is data here (`tree_mask`), not a fixed pattern: the kernel gets the mask as an array, one for all heads. Each
    token is made to see itself, which real ones do anyway, so that no row of scores is empty.
    """
    length, head_size = queries.shape[3:]
    padding = -length % LANES
    mask = jnp.pad(mask, ((0, 0), (0, padding), (0, padding))) | jnp.eye(length + padding, dtype=bool)[None]

    def of_device(queries, keys, values, mask):
        rows, kv_heads, group, _, _ = queries.shape
        pad = lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, padding), (0, 0)))  # noqa: E731
        flat = pad(queries / math.sqrt(head_size)).reshape(rows, kv_heads * group, length + padding, head_size)  # [B, N, T, H]
        mask = jnp.broadcast_to(mask, (rows, *mask.shape[1:]))
        row = lambda args: _splash_row(*args, interpret)  # noqa: E731
        out = jax.lax.map(row, (flat, pad(keys), pad(values), mask))  # [B, N, T, H]
        return out[:, :, :length].reshape(queries.shape)

    heads = ("batch", "kv_heads", None, None)
    rows = "batch" if mask.shape[0] > 1 else None
    names = (("batch", "kv_heads", None, None, None), heads, heads, (rows, None, None))
    return over_mesh(of_device, names, names[0])(queries, keys, values, mask)


ATTEND: dict[str, Callable] = {
    "plain": plain_attend,
    "cudnn": cudnn_attend,
    "splash": splash_attend,
    "splash_interpreted": partial(splash_attend, interpret=True),
}
"""Attention of a whole sequence by name; `splash_interpreted` runs the TPU's kernel step by step on any machine, for tests."""


def fastest(platform: str) -> str:
    """Name of the attention to use on devices of a platform as JAX names it."""
    return {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform, "plain")
