"""Who sees whom: the tree mask as drawn, padding that changes nothing, and kernels held to a plain softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import toy_model, toy_params

from sso_jax.models.architecture import LayerKind
from sso_jax.models.attention import causal_mask, empty_cache, layer_view, tree_mask
from sso_jax.models.kernels import (
    KERNELS,
    BySequence,
    ScoreRule,
    cudnn_attend,
    default_kernel,
    plain_attend,
    splash_attend,
)
from sso_jax.models.layer_layout import unstack
from sso_jax.models.sequences import RowForm, make_sequences
from sso_jax.training.packing import pack
from sso_jax.training.row_shapes import row_shape
from sso_jax.training.trees import Branch, Tree


def test_tree_mask_is_the_drawing_of_its_docstring():
    tree = jnp.array([[1, 1, 1, 1, 1, 2, 2]])
    branch = jnp.array([[0, 0, 1, 1, 2, 0, 1]])
    expected = [
        "x......",
        "xx.....",
        "xxx....",
        "xxxx...",
        "xx..x..",
        ".....x.",
        ".....xx",
    ]
    drawn = ["".join("x" if seen else "." for seen in row) for row in np.asarray(tree_mask(tree, branch)[0])]
    assert drawn == expected


def test_attend_equals_a_numpy_softmax_over_the_visible_keys():
    draw = np.random.default_rng(0)
    queries, keys, values = (
        draw.normal(size=size).astype(np.float32) for size in ((2, 2, 3, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8))
    )
    mask = np.tril(np.ones((2, 5, 5), bool))
    mask[1, :, 0] = mask[1, :, 0] & (np.arange(5) < 1)  # row 1: key 0 is seen by token 0 only
    expected = np.zeros_like(queries)
    for b, k, g, t in np.ndindex(2, 2, 3, 5):
        scores = np.where(mask[b, t], keys[b, k].astype(np.float64) @ queries[b, k, g, t] / np.sqrt(8), -np.inf)
        weights = np.exp(scores - scores.max())
        expected[b, k, g, t] = weights / weights.sum() @ values[b, k]
    got = plain_attend(jnp.asarray(queries), jnp.asarray(keys), jnp.asarray(values), jnp.asarray(mask))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_token_that_sees_nothing_is_no_nan():
    ones = jnp.ones((1, 1, 1, 2, 4))
    out = plain_attend(ones, ones[:, :, 0], ones[:, :, 0] * 3, jnp.zeros((1, 2, 2), bool))
    np.testing.assert_allclose(out, 3.0)


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize(
    "query_indices", [[[6], [2]], [[1, 6, 3], [0, 0, 5]], [[0, 1, 2, 3, 4, 5, 6, 2], [6, 6, 5, 4, 3, 2, 1, 0]]]
)
def test_hidden_states_of_wanted_tokens_are_those_of_all(one_device, scanned, query_indices):
    """The cache comes out the same."""
    model = toy_model(qk_norm="head")
    params, query_indices = toy_params(model, one_device), jnp.asarray(query_indices)
    if not scanned:
        model, params = model.clone(scanned=False), unstack(params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 7)))
    positions = jnp.broadcast_to(jnp.arange(7), tokens.shape)
    inputs = tokens, positions, causal_mask(7), empty_cache(model.architecture, 2, 7, model.dtype), 0
    every, expected_cache = model.apply({"params": params}, *inputs)
    some, own_cache = model.apply({"params": params}, *inputs, query_indices)
    assert some.shape == (*query_indices.shape, model.architecture.embed_dim)
    for row, at in enumerate(np.asarray(query_indices)):
        np.testing.assert_allclose(some[row], every[row, at], atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), own_cache, expected_cache)


def test_padding_behind_a_row_changes_nothing_before_it(one_device):
    model = toy_model()
    params = toy_params(model, one_device)
    tokens = np.random.default_rng(0).integers(0, 96, (1, 9))
    padded = np.concatenate([tokens, np.full((1, 7), 5)], axis=1)

    def hidden(ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return model.apply({"params": params}, jnp.asarray(ids), positions, causal_mask(ids.shape[1]))[0]

    np.testing.assert_allclose(hidden(padded)[:, :9], hidden(tokens), atol=1e-6)


@pytest.fixture(scope="module")
def packed_rows():
    """Queries, keys, values of two packed rows of 40 tokens, the last 5 padding, and which tokens are real."""
    draw = np.random.default_rng(1)
    queries = draw.normal(size=(2, 2, 3, 40, 16)).astype(np.float32)
    keys, values = draw.normal(size=(2, 2, 2, 40, 16)).astype(np.float32)
    tree = np.array([[1] * 20 + [2] * 15 + [0] * 5, [1] * 35 + [0] * 5])
    branch = np.array(
        [[0] * 8 + [1] * 6 + [2] * 6 + [0] * 5 + [1] * 10 + [0] * 5, [0] * 10 + [1] * 20 + [2] * 5 + [0] * 5]
    )
    return (
        tuple(jnp.asarray(x) for x in (queries, keys, values)),
        tree_mask(jnp.asarray(tree), jnp.asarray(branch)),
        tree > 0,
    )


def _value_and_gradients(attend, inputs, mask, real):
    """The attended real tokens, and gradients of a sum over them that weights every number differently."""
    weights = np.random.default_rng(2).normal(size=inputs[0].shape).astype(np.float32) * real[:, None, None, :, None]

    def loss(*inputs):
        return jnp.sum(attend(*inputs, mask) * weights)

    return attend(*inputs, mask) * real[:, None, None, :, None], jax.grad(loss, argnums=(0, 1, 2))(*inputs)


def dense_attend(queries, keys, values, mask):
    """All scores at once, in float32."""
    scores = jnp.einsum("bkgth,bksh->bkgts", queries, keys, preferred_element_type=jnp.float32) / np.sqrt(8)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1)
    return jnp.einsum("bkgts,bksh->bkgth", weights, values.astype(jnp.float32)).astype(values.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.1)])
def test_attention_block_by_block_equals_all_at_once_with_its_gradients(dtype, tolerance):
    draw = np.random.default_rng(3)
    size = 300  # two whole blocks of queries and a part of one
    queries = jnp.asarray(draw.normal(size=(2, 2, 2, size, 8)), dtype)
    keys, values = jnp.asarray(draw.normal(size=(2, 2, 2, size, 8)), dtype)
    tree = jnp.asarray([[1] * 140 + [2] * 150 + [0] * 10, [1] * 290 + [0] * 10])
    branch = jnp.asarray([[0] * 50 + [1] * 60 + [2] * 30 + [0] * 100 + [1] * 60, [0] * 130 + [1] * 100 + [2] * 70])
    mask = tree_mask(tree, branch)
    inputs, real = (queries, keys, values), np.asarray(tree) > 0
    got, expected = (
        _value_and_gradients(attend, inputs, mask, real) for attend in (jax.jit(plain_attend), dense_attend)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.astype("float32"), b.astype("float32"), atol=tolerance), got, expected
    )


FAST = {"splash": KERNELS["splash_interpreted"], "dot_product": lambda *a: cudnn_attend(*a, implementation="xla")}


@pytest.mark.parametrize("name", FAST)
def test_fast_attention_equals_the_plain_one_with_its_gradients(name, packed_rows):
    inputs, mask, real = packed_rows
    got, expected = (_value_and_gradients(attend, inputs, mask, real) for attend in (FAST[name], plain_attend))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


def test_splash_attention_is_cut_over_the_mesh(packed_rows, eight_devices):
    (queries, keys, values), mask, real = packed_rows

    def four(x):
        return jnp.concatenate([x, x * 0.5])

    inputs = tuple(four(x) for x in (queries, keys, values))
    mask, real = jnp.concatenate([mask, mask]), np.concatenate([real, real])
    with jax.set_mesh(eight_devices):
        got = jax.jit(lambda *inputs: splash_attend(*inputs, mask, interpret=True))(*inputs)
    expected = plain_attend(*inputs, mask)
    np.testing.assert_allclose(got * real[:, None, None, :, None], expected * real[:, None, None, :, None], atol=2e-5)


@pytest.fixture(scope="module")
def rows_with_sequences():
    """Rows of trees with one to three responses each, as arrays."""
    draw = np.random.default_rng(6)

    def ids(low, high):
        return [1] * int(draw.integers(low, high))

    trees = [Tree(ids(1, 15), [Branch(ids(1, 12), 0) for _ in range(1 + i % 3)]) for i in range(9)]
    return jax.tree.map(jnp.asarray, pack(trees, row_shape([trees], 2, form=RowForm.SEQUENCES), 1))


def _random_heads(rows, num_queries, seed=7):
    draw = np.random.default_rng(seed)

    def normal(*sizes):
        return jnp.asarray(draw.normal(size=(rows.tokens.shape[0], *sizes, 16)), "float32")

    return normal(2, 3, num_queries), normal(2, rows.tokens.shape[1]), normal(2, rows.tokens.shape[1])


def test_attention_by_sequences_equals_that_by_the_mask_with_its_gradients(rows_with_sequences):
    rows = rows_with_sequences
    assert rows.sequences.shape[1] > 3  # several trees a row
    inputs, mask = _random_heads(rows, rows.tokens.shape[1]), tree_mask(rows.tree, rows.branch)
    sequences = make_sequences(rows.sequences, rows.positions)

    def by_sequence(*a):
        return cudnn_attend(*a, ScoreRule(), BySequence(sequences), implementation="xla")

    got, expected = (
        _value_and_gradients(attend, inputs, mask, np.asarray(rows.tree) > 0) for attend in (by_sequence, plain_attend)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


@pytest.mark.parametrize("sliding_window", [1, 4, 9])
def test_a_sliding_window_of_sequences_counts_positions_with_its_gradients(rows_with_sequences, sliding_window):
    """Responses of a packed row lie right of one another, and their positions go on from the prompt's."""
    rows = rows_with_sequences
    inputs, real = _random_heads(rows, rows.tokens.shape[1]), np.asarray(rows.tree) > 0
    mask = tree_mask(rows.tree, rows.branch)
    view = layer_view(LayerKind(sliding_window=sliding_window), 8, rows.positions, rows.positions, mask)
    distance = np.asarray(rows.positions)[:, :, None] - np.asarray(rows.positions)[:, None]
    np.testing.assert_array_equal(view.mask, np.asarray(mask) & (distance < sliding_window))
    assert (np.asarray(mask) & ~np.asarray(view.mask))[real].any()
    within = BySequence(make_sequences(rows.sequences, rows.positions), sliding_window)

    def by_sequence(*a):
        return cudnn_attend(*a, ScoreRule(), within, implementation="xla")

    got, expected = (_value_and_gradients(attend, inputs, view.mask, real) for attend in (by_sequence, plain_attend))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


@pytest.mark.parametrize("rule", [ScoreRule(scale=0.6), ScoreRule(cap=0.8), ScoreRule(scale=1.5, cap=2.0)])
@pytest.mark.parametrize("name", ["plain", "splash_interpreted", "xla"])
def test_scaled_and_capped_scores_with_their_gradients(rule, name, packed_rows):
    """Held to a softmax of all scores at once that autodiff differentiates."""
    inputs, mask, real = packed_rows

    def dense(queries, keys, values, mask):
        products = jnp.einsum("bkgth,bksh->bkgts", queries, keys) * (rule.scale or queries.shape[-1] ** -0.5)
        scores = products if rule.cap is None else rule.cap * jnp.tanh(products / rule.cap)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1)
        return jnp.einsum("bkgts,bksh->bkgth", weights, values)

    def attend(*a):
        return cudnn_attend(*a, rule, implementation="xla") if name == "xla" else KERNELS[name](*a, rule)

    got, expected = (_value_and_gradients(function, inputs, mask, real) for function in (attend, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), got, expected)


def test_queries_of_no_sequence_find_nothing_and_leave_no_gradient(rows_with_sequences):
    rows = rows_with_sequences
    inputs, padding = _random_heads(rows, rows.tokens.shape[1]), np.asarray(rows.tree) == 0
    assert padding.any()
    sequences = make_sequences(rows.sequences, rows.positions)

    def attend(*a):
        return cudnn_attend(*a, None, ScoreRule(), BySequence(sequences), implementation="xla")

    gradients = jax.grad(lambda *a: jnp.sum(attend(*a) ** 2), argnums=(0, 1, 2))(*inputs)
    for x in (attend(*inputs), *gradients):
        entries = np.moveaxis(np.asarray(x), -2, 1)  # [B, T, ...]
        assert np.isfinite(entries).all() and not entries[padding].any() and entries[~padding].any()


def test_attention_by_sequences_is_cut_over_the_mesh(rows_with_sequences, eight_devices):
    rows = jax.tree.map(lambda x: jnp.concatenate([x, x]), rows_with_sequences)
    inputs, mask, real = (
        _random_heads(rows, rows.tokens.shape[1]),
        tree_mask(rows.tree, rows.branch),
        np.asarray(rows.tree) > 0,
    )

    def attend(*a):
        return cudnn_attend(
            *a, None, ScoreRule(), BySequence(make_sequences(rows.sequences, rows.positions)), implementation="xla"
        )

    with jax.set_mesh(eight_devices):
        got = jax.jit(attend)(*inputs)
    keep = real[:, None, None, :, None]
    np.testing.assert_allclose(got * keep, plain_attend(*inputs, mask) * keep, atol=2e-5)


def test_cudnn_attention_leaves_float32_to_the_plain_one(packed_rows):
    inputs, mask, _ = packed_rows  # the kernel itself needs a GPU; what it does not take must not reach it
    np.testing.assert_array_equal(cudnn_attend(*inputs, mask), plain_attend(*inputs, mask))


def test_a_decoder_gives_the_same_hidden_states_with_either_attention(one_device):
    plain = toy_model()
    params = toy_params(plain, one_device, scale=2.0)
    tokens = jnp.arange(48).reshape(2, 24)
    positions = jnp.broadcast_to(jnp.arange(24), (2, 24))

    def run(model):
        return model.apply({"params": params}, tokens, positions, causal_mask(24))[0]

    np.testing.assert_allclose(run(plain.clone(attend="splash_interpreted")), run(plain), atol=1e-5)


def test_each_platform_has_its_attention():
    assert [default_kernel(name) for name in ("cpu", "gpu", "cuda", "tpu")] == ["plain", "cudnn", "cudnn", "splash"]
