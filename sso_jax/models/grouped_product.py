"""Products of rows with the matrices of their groups, as experts need them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SMALLEST_BLOCK, LARGEST_BLOCK = 8, 128
"""Limits of the number of rows that are multiplied at once on a CPU."""
SCOPE = "rows_by_block_{}_{}"
"""Name of the loops over blocks, with the number of rows and that of a block, which say how often they run."""


def grouped_product(
    x: Float[Array, "M D"], matrices: Float[Array, "E D F"], sizes: Int[Array, "E"], kernel: str
) -> Float[Array, "M F"]:
    """Returns `x_i matrices_g(i)` for rows in the order of their groups, and 0 for rows after those of the last group.

    Args:
      x: rows of the first group, then of the second, and so on.
      matrices: matrix of each group.
      sizes: number of rows of each group.
      kernel: name of the attention kernel, which says what device this is for. Accelerators have a product of their own
        (`jax.lax.ragged_dot`; see `benchmarks.experts`); on a CPU that multiplies every row with every matrix.
    """
    if kernel == "plain":
        return _by_blocks(x, matrices, sizes)
    out = jax.lax.ragged_dot(x, matrices, sizes)
    return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes), out, 0)


def _block_size(num_rows: int, num_groups: int) -> int:
    """Returns the power of two next to the mean size of a group, within limits."""
    mean = max(1, num_rows // num_groups)
    return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << (mean - 1).bit_length()))


def _blocks(sizes: Int[Array, "E"], block: int):
    """Returns the number of blocks, and a function from a block's number to its group, first row and end of the group.

    Blocks begin at the first row of their group, so that the last one of a group may reach into the next group.
    """
    ends = jnp.cumsum(sizes)
    counts = -(-sizes // block)
    block_ends = jnp.cumsum(counts)

    def place(number: Int[Array, ""]):
        group = jnp.searchsorted(block_ends, number, side="right")
        start = ends[group] - sizes[group] + (number - (block_ends[group] - counts[group])) * block
        return group, start, ends[group]

    return block_ends[-1], place


@jax.custom_vjp
def _by_blocks(x: Float[Array, "M D"], matrices: Float[Array, "E D F"], sizes: Int[Array, "E"]) -> Float[Array, "M F"]:
    """Multiplies block by block, each with the matrix of its group."""
    num_rows, block = x.shape[0], _block_size(x.shape[0], matrices.shape[0])
    num_blocks, place = _blocks(sizes, block)
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def multiply(number, out):
        group, start, _ = place(number)
        rows = jax.lax.dynamic_slice_in_dim(padded, start, block)
        product = rows @ jax.lax.dynamic_index_in_dim(matrices, group, keepdims=False)
        # Rows of the next group are overwritten by the block that begins there.
        return jax.lax.dynamic_update_slice_in_dim(out, product.astype(x.dtype), start, axis=0)

    start = jnp.zeros((num_rows + block, matrices.shape[2]), x.dtype)
    with jax.named_scope(SCOPE.format(num_rows, block)):
        out = jax.lax.fori_loop(0, num_blocks, multiply, start)
    return jnp.where(jnp.arange(num_rows)[:, None] < jnp.sum(sizes), out[:num_rows], 0)


def _by_blocks_backward(residuals, d_out):
    """With dY the gradient of the output, dX = dY W_g(i)' and dW_g = sum over the rows of g of x' dy."""
    x, matrices, sizes = residuals
    block = _block_size(x.shape[0], matrices.shape[0])
    num_blocks, place = _blocks(sizes, block)
    padded, d_padded = (jnp.pad(part, ((0, block), (0, 0))) for part in (x, d_out))

    def add(number, d_matrices):
        group, start, end = place(number)
        rows, d_rows = (jax.lax.dynamic_slice_in_dim(part, start, block) for part in (padded, d_padded))
        own = jnp.where((start + jnp.arange(block) < end)[:, None], rows, 0)
        product = jnp.matmul(own.T, d_rows, preferred_element_type=jnp.float32)
        return d_matrices.at[group].add(product)

    with jax.named_scope(SCOPE.format(x.shape[0], block)):
        d_matrices = jax.lax.fori_loop(0, num_blocks, add, jnp.zeros(matrices.shape, jnp.float32))
    return _by_blocks(d_out, matrices.swapaxes(1, 2), sizes), d_matrices.astype(matrices.dtype), None


_by_blocks.defvjp(lambda *inputs: (_by_blocks(*inputs), inputs), _by_blocks_backward)
