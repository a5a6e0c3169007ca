"""Products of rows with the matrices of their groups, held to a loop in NumPy, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sso_jax.models.grouped_product import grouped_product

SIZES = [
    [5, 0, 17, 1, 9],
    [0, 0, 32, 0, 0],
    [1, 1, 1, 1, 1],
    [0, 0, 0, 0, 0],
    [32, 0, 0, 0, 0],
    [0, 0, 0, 0, 30],
    [8, 8, 8, 8, 0],
]


@pytest.mark.parametrize("kernel", ["plain", "splash"])
@pytest.mark.parametrize("sizes", SIZES)
def test_each_row_is_multiplied_with_the_matrix_of_its_group(sizes, kernel):
    """32 rows, of which those after the last group give 0 whatever they hold."""
    draw = np.random.default_rng(0)
    x, matrices = draw.normal(size=(32, 6)).astype(np.float32), draw.normal(size=(5, 6, 7)).astype(np.float32)
    weights = draw.normal(size=(32, 7)).astype(np.float32)
    expected, d_x, d_matrices = np.zeros((32, 7)), np.zeros(x.shape), np.zeros(matrices.shape)
    row = 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            expected[row] = x[row] @ matrices[group]
            d_x[row] = matrices[group] @ weights[row]
            d_matrices[group] += np.outer(x[row], weights[row])
            row += 1

    def loss(x, matrices):
        out = grouped_product(x, matrices, jnp.array(sizes, jnp.int32), kernel)
        return jnp.sum(out * weights), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, matrices)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(gradients[0], d_x, atol=1e-5)
    np.testing.assert_allclose(gradients[1], d_matrices, atol=2e-5)


def test_on_a_cpu_nothing_of_all_rows_times_all_groups_is_made():
    """64 groups of 16 rows: dense products of every row with every matrix would hold and do 64 times as much."""
    x, matrices, sizes = jnp.zeros((1024, 32)), jnp.zeros((64, 32, 48)), jnp.full((64,), 16, jnp.int32)
    program = jax.jit(grouped_product, static_argnums=3).lower(x, matrices, sizes, "plain").compile()
    rows_in_and_out = 1024 * (32 + 48) * 4
    assert program.memory_analysis().temp_size_in_bytes < 3 * rows_in_and_out < 64 * 1024 * 48 * 4
