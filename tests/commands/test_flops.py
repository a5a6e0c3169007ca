"""Operations counted from the program: products, loops, branches and the passes of a gradient, each against
arithmetic.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from toys import FAMILIES, toy_model, toy_params

from sso_jax.commands.flops import _of_equation, count_flops
from sso_jax.models.attention import causal_mask
from sso_jax.models.experts import ExpertsMLP
from sso_jax.models.grouped_product import grouped_product
from sso_jax.models.transformer import abstract_params
from sso_jax.runtime.mesh import make_mesh

A, B = jnp.zeros((4, 8)), jnp.zeros((8, 16))
PRODUCT = 2 * 4 * 8 * 16


def count(function, *args, **kwargs):
    return count_flops(jax.make_jaxpr(function)(*args), **kwargs)


def test_a_product_counts_two_a_multiply_add():
    assert count(jnp.matmul, A, B) == PRODUCT
    assert (
        count(lambda a, b: jnp.einsum("gij,gjk->gik", a, b), jnp.zeros((3, 4, 8)), jnp.zeros((3, 8, 16))) == 3 * PRODUCT
    )


def test_loops_count_their_trips():
    def scanned(a, b):
        return jax.lax.scan(lambda carry, _: (carry + jnp.sum(a @ b), None), 0.0, None, length=10)[0]

    def looped(a, b):
        return jax.lax.while_loop(lambda carry: carry < 1, lambda carry: carry + jnp.sum(a @ b), 0.0)

    assert count(scanned, A, B) == 10 * PRODUCT
    assert count(looped, A, B, while_trips=7) == 7 * PRODUCT
    assert count(lambda a, b: looped(a, b) + looped(a, b), A, B, while_trips=[7, 2]) == 9 * PRODUCT


def test_a_branch_counts_as_the_dearer_one():
    def choose(flag, a, b):
        return jax.lax.cond(flag, lambda: jnp.sum(a @ b), lambda: 0.0)

    assert count(choose, True, A, B) == PRODUCT


def test_a_gradient_counts_three_products_and_a_checkpoint_a_fourth():
    def loss(a, b):
        return jnp.sum(jnp.sin(a @ b))

    assert count(jax.grad(loss, argnums=(0, 1)), A, B) == 3 * PRODUCT
    assert count(jax.grad(jax.checkpoint(loss), argnums=(0, 1)), A, B) == 4 * PRODUCT


def test_rows_of_experts_count_once_each_and_their_gradients_likewise():
    """Six rows, two groups: each row meets one matrix; the gradients of rows and matrices are a product each."""
    rows, matrices, sizes = jnp.zeros((6, 8)), jnp.zeros((2, 8, 16)), jnp.array([4, 2])

    def product(rows, matrices):
        return grouped_product(rows, matrices, sizes, "splash")

    each = 2 * 6 * 8 * 16
    assert count(product, rows, matrices) == each
    assert count(jax.grad(lambda *a: jnp.sum(jnp.sin(product(*a))), argnums=(0, 1)), rows, matrices) == 3 * each


@pytest.mark.parametrize("expert", [1, 2, 4])
def test_experts_on_several_devices_count_as_on_one(expert):
    """A device has the rows of all that split the experts with it, but computes its share."""
    model = toy_model(**FAMILIES["qwen3_moe"]).clone(attend="splash_interpreted")
    tokens = jnp.zeros((8, 128), jnp.int32)

    def run(params):
        return model.apply({"params": params}, tokens, tokens, causal_mask(128))[0]

    params = nn.unbox(abstract_params(model))
    alone = count(run, params)
    with jax.set_mesh(make_mesh(1, 8 // expert, 1, expert=expert)):
        assert count(run, params) == alone


def test_a_decoder_counts_what_its_sizes_say(one_device):
    model = toy_model()
    a, length = model.architecture, 24
    params = toy_params(model, one_device)
    tokens = jnp.zeros((2, length), jnp.int32)

    def run(p):
        return model.apply(
            {"params": p}, model.apply({"params": p}, tokens, tokens, causal_mask(length))[0], method="logits"
        )

    heads = a.num_heads * a.head_size
    matrices = a.embed_dim * (
        2 * heads + 2 * a.num_kv_heads * a.head_size + 3 * a.mlp_dim
    )  # multiply-adds a token, one layer
    attention = 2 * heads * length  # a token meets every key, then every value
    expected = 2 * 2 * length * (a.num_layers * (matrices + attention) + a.embed_dim * a.vocab_size)
    assert count(run, params) == expected


def test_cudnn_attention_counts_half_of_each_square():
    """Two products forward and five backward, each over 3 x 4 pairs of tokens of 2 rows and 6 heads, 8 wide, half of
    two operations.
    """
    operands = [SimpleNamespace(aval=jnp.zeros(shape)) for shape in ((2, 3, 6, 8), (2, 4, 2, 8), (2, 4, 2, 8))]
    for name, products in (("dot_product_attention_fwd_wrapper", 2), ("dot_product_attention_bwd_wrapper", 5)):
        equation = SimpleNamespace(primitive=SimpleNamespace(name=name), params={}, invars=operands)
        assert _of_equation(equation, 1) == products * (2 * 6 * 3 * 4 * 8)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 8), (1, 2, 2, 2), (2, 4, 1, 1)])
@pytest.mark.parametrize("length", [1, 12])
@pytest.mark.parametrize("kernel", ["splash", "plain"])
def test_of_experts_the_active_ones_count_however_they_are_split(sizes, length, kernel):
    """The router meets every expert; three of eight experts, of three matrices each, compute a token."""
    data, fsdp, tensor, expert = sizes
    mesh, a = make_mesh(data, fsdp, tensor, expert=expert), toy_model(**FAMILIES["qwen3_moe"]).architecture
    mlp, x = ExpertsMLP(a, kernel), jnp.zeros((16, length, a.embed_dim))
    params = nn.unbox(mlp.init(jax.random.key(0), x))
    expected = 2 * 16 * length * a.embed_dim * (8 + 3 * 3 * a.experts.mlp_dim)
    with jax.set_mesh(mesh):
        assert count(mlp.apply, params, x, while_trips=[]) == expected
        gradient = count(
            jax.grad(lambda params, x: jnp.sum(mlp.apply(params, x)), argnums=(0, 1)), params, x, while_trips=[]
        )
    assert gradient == 3 * expected
