"""Attention on TPUs, by the splash kernel of jax.experimental.pallas: by segments for packed rows, else by a mask."""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sso_jax.models.places import Places, spread
from sso_jax.models.remat_policy import NAME
from sso_jax.runtime.mesh import over_mesh

LANES = 128
"""Blocks are multiples of this many tokens."""
BLOCK = 512
"""Tokens of a block in rows that are longer than two of them."""
KEY_AXES = ("batch", "kv_heads", None, None)
"""Logical axes of keys and values, [B, K, T, H]."""
QUERY_AXES = ("batch", "kv_heads", None, None, None)
"""Those of queries, [B, K, G, T, H]."""


@dataclass(frozen=True)
class Seen:
    """Which place a query sees, from the number of its own: those before it, or the latest of them.

    The kernel takes it as a static argument, of which equal ones must compare equal: hence no lambda.
    """

    sliding_window: int | None = None

    def __call__(self, own: Int[Array, "Q S"], place: Int[Array, "Q S"]) -> Bool[Array, "Q S"]:
        seen = place <= own
        return seen if self.sliding_window is None else seen & (place > own - self.sliding_window)


def attend_by_segment(
    queries: Float[Array, "B K G T H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    places: Places,
    scale: float,
    cap: float | None,
    sliding_window: int | None,
    interpret: bool,
) -> Float[Array, "B K G T H"]:
    """Attends within segments: all rows in one call, blocks of places that no query of a block sees left out.

    No array has a size of [T, T] or [T, P]; docs/hardware.md has what that saves.

    Args:
      queries: in the order of the rows.
      keys: likewise; prompts are copied here.
      values: like the keys.
      places: where each token stands.
      scale: factor of the products of queries and keys.
      cap: limit of the scores (`ScoreRule`).
      sliding_window: number of places that a query sees, its own included; None for all of its sequence before it.
      interpret: whether to interpret the kernel, for tests.
    """

    def of_device(queries, keys, values, places: Places):
        (batch, num_kv_heads, group, length, _), num_places = queries.shape, places.token.shape[1]
        block, place_block = _block(length), _block(num_places)
        width, place_width = _padded(length, block), _padded(num_places, place_block)
        own, start = (_pad(x, width, 0) for x in (places.own, places.start))
        segment = _pad(places.segment, place_width, -1)
        first = start if sliding_window is None else jnp.maximum(start, own - sliding_window + 1)
        sees = _blocks_seen(first, own, block, place_width // place_block, place_block)
        kernel = _segment_kernel(
            sees,
            (own + jnp.arange(batch)[:, None] * place_width).reshape(-1),
            block_sizes=_block_sizes(block, place_block),
            attn_logits_soft_cap=cap,
            mask_function=Seen(sliding_window),
            interpret=interpret,
        )
        ids = _segment_ids(jnp.take_along_axis(segment, own, axis=1).reshape(-1), segment.reshape(-1))
        flat = _one_row(jnp.moveaxis(queries * scale, 3, 1), width).reshape(num_kv_heads * group, batch * width, -1)
        out = kernel(flat, *(_one_row(_at_places(x, places), place_width) for x in (keys, values)), ids)
        out = out.reshape(num_kv_heads, group, batch, width, -1)[:, :, :, :length]
        return jnp.moveaxis(out, 2, 0)  # [B, K, G, T, H]

    names = (QUERY_AXES, KEY_AXES, KEY_AXES, ("batch",))
    return over_mesh(of_device, names, names[0])(queries, keys, values, places)


def _block(length: int) -> int:
    return BLOCK if length > 2 * BLOCK else LANES


def _padded(length: int, block: int) -> int:
    return -(-length // block) * block


def _pad(x: Int[Array, "B N"], width: int, value: int) -> Int[Array, "B W"]:
    return jnp.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=value)


def _at_places(x: Float[Array, "B K T H"], places: Places) -> Float[Array, "B P K H"]:
    by_token = jnp.moveaxis(x, 2, 1)  # [B, T, K, H]
    flat = spread(by_token.reshape(*by_token.shape[:2], -1), places)
    return flat.reshape(*flat.shape[:2], *by_token.shape[2:])


def _one_row(x: Float[Array, "B N ... H"], width: int) -> Float[Array, "... W H"]:
    """Pads rows to a width and puts them one after another, behind the heads."""
    padded = jnp.pad(x, ((0, 0), (0, width - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(padded.reshape(-1, *x.shape[2:]), 0, -2)


def _blocks_seen(
    first: Int[Array, "B T"], last: Int[Array, "B T"], block: int, num_blocks: int, place_block: int
) -> Bool[Array, "B X Y"]:
    """Returns whether any query of a block (second axis) sees a place of a block (third axis)."""
    number = jnp.arange(num_blocks)[None, None, :]
    seen = (first[..., None] // place_block <= number) & (number <= last[..., None] // place_block)  # [B, T, Y]
    return jnp.any(seen.reshape(first.shape[0], -1, block, num_blocks), axis=2)


def _next_seen(seen: Bool[Array, "B X Y"], axis: int) -> Int[Array, "B X Y"]:
    """Returns for each block the next one that is read along an axis, itself included, or else the last one.

    A block that is left out then costs no transfer: the kernel waits for the next that it needs.
    """
    number = jax.lax.broadcasted_iota(jnp.int32, seen.shape, axis)
    following = jax.lax.cummin(jnp.where(seen, number, seen.shape[axis]), axis=axis, reverse=True)
    last = jnp.max(jnp.where(seen, number, 0), axis=axis, keepdims=True)
    return jnp.where(following < seen.shape[axis], following, last)


def _segment_kernel(seen: Bool[Array, "B X Y"], own: Int[Array, "Q"], **options):
    """Returns the splash kernel that reads these blocks; all rows are one to it."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    batch, num_blocks, num_place_blocks = seen.shape
    row = jnp.arange(batch, dtype=jnp.int32)[:, None, None]

    def by_query(x):
        return x.astype(jnp.int32).reshape(1, -1, num_place_blocks)

    def by_place(x):
        return jnp.moveaxis(x.astype(jnp.int32), 0, 1).reshape(1, num_blocks, -1)

    def info(next_block, is_seen):
        return MaskInfo(next_block, None, is_seen, None, own)

    forward = info(by_query(row * num_place_blocks + _next_seen(seen, 2)), by_query(seen))
    backward = info(by_place(row * num_blocks + _next_seen(seen, 1)), by_place(seen))
    return kernels.SplashAttentionKernel(
        forward,
        forward,
        backward,
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        residual_checkpoint_name=NAME,
        **options,
    )


def _segment_ids(of_queries: Int[Array, "Q"], of_places: Int[Array, "S"]):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash.SegmentIds(of_queries, of_places)


@cache
def _block_sizes(block: int, key_block: int):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import, only for TPUs

    queries = {f"block_{name}": block for name in ("q", "q_dkv", "q_dq")}
    keys = {f"block_{name}": key_block for name in ("kv", "kv_dkv", "kv_dkv_compute", "kv_dq")}
    return splash.BlockSizes(**queries, **keys)


def _row_by_mask(queries, keys, values, mask, cap: float | None, interpret: bool):
    """Attends within one row: queries [N, T, H], keys and values [K, T, H], mask [T, T], T a multiple of LANES."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length = queries.shape[1]
    block = next(size for size in (512, 384, 256, 128) if length % size == 0)
    kernel = splash.make_splash_mha(
        mask[None],
        block_sizes=_block_sizes(block, block),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=NAME,
        interpret=interpret,
    )
    # Under jit the flag is returned as a traced array, on which the kernel branches in Python (seen in jax 0.10.2).
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    return kernel(queries, keys, values)


def attend_by_mask(
    queries: Float[Array, "B K G T H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    mask: Bool[Array, "#B T T"],
    scale: float,
    cap: float | None,
    interpret: bool,
) -> Float[Array, "B K G T H"]:
    """Attends as a mask says, one row after another; for prompts, and wherever rows have no places.

    The kernel leaves out blocks that no token sees. Each token is made to see itself, which real tokens do anyway, so
    that no row of scores is empty.
    """
    length = queries.shape[3]
    padding = -length % LANES
    mask = jnp.pad(mask, ((0, 0), (0, padding), (0, padding))) | jnp.eye(length + padding, dtype=bool)[None]

    def of_device(queries, keys, values, mask):
        rows, kv_heads, group, _, head_size = queries.shape

        def pad(x):
            return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, padding), (0, 0)))

        flat = pad(queries * scale).reshape(rows, kv_heads * group, length + padding, head_size)  # [B, N, T, H]
        mask = jnp.broadcast_to(mask, (rows, *mask.shape[1:]))

        def row(args):
            return _row_by_mask(*args, cap, interpret)

        out = jax.lax.map(row, (flat, pad(keys), pad(values), mask))  # [B, N, T, H]
        return out[:, :, :length].reshape(queries.shape)

    names = (QUERY_AXES, KEY_AXES, KEY_AXES, ("batch" if mask.shape[0] > 1 else None, None, None))
    return over_mesh(of_device, names, names[0])(queries, keys, values, mask)
