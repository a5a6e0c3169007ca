"""Attention by segments, the TPU kernel interpreted: equal to that by the mask, without blocks that nobody sees."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import FAMILIES, toy_model, toy_params

from sso_jax.models import splash
from sso_jax.models.architecture import LayerKind
from sso_jax.models.attention import layer_view, tree_mask
from sso_jax.models.kernels import BySequence, ScoreRule, plain_attend, splash_attend
from sso_jax.models.places import make_places, spread
from sso_jax.models.sequences import RowForm
from sso_jax.training.log_probs import cell_log_probs
from sso_jax.training.packing import pack
from sso_jax.training.row_shapes import row_shape
from sso_jax.training.trees import Branch, Tree

interpreted = partial(splash_attend, interpret=True)


def ragged_trees(seed=6, count=7):
    """Trees with one to three responses, some prompts longer than a block."""
    draw = np.random.default_rng(seed)

    def ids(low, high):
        return draw.integers(1, 90, int(draw.integers(low, high))).tolist()

    cells = iter(range(3 * count))
    return [
        Tree(ids(1, 150 if i % 4 == 0 else 20), [Branch(ids(1, 120), next(cells)) for _ in range(1 + i % 3)])
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def rows():
    """Four rows of several trees each; the last is empty."""
    trees = ragged_trees()
    shape = row_shape([trees], form=RowForm.PLACES)
    packed = pack(trees, shape._replace(num_rows=shape.num_rows + 1), 30)
    assert shape.num_tokens > 2 * splash.LANES and (packed.tree[:, -1] == 0).all() and not packed.tree[-1].any()
    return jax.tree.map(jnp.asarray, packed)


def random_heads(rows, seed=7):
    """Queries, keys and values; two heads of keys, each for two of queries."""
    draw, (batch, length) = np.random.default_rng(seed), rows.tokens.shape

    def normal(*sizes):
        return jnp.asarray(draw.normal(size=(batch, *sizes, length, 16)), "float32")

    return normal(2, 2), normal(2), normal(2)


def attended(attend, inputs, real):
    """The attended real tokens, and gradients of a sum over them that weights every number differently."""
    keep = real[:, None, None, :, None]
    weights = np.random.default_rng(2).normal(size=inputs[0].shape).astype(np.float32) * keep

    def loss(*inputs):
        out = attend(*inputs)
        return jnp.sum(out * weights), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return out * keep, gradients


def assert_close(got, expected, atol=3e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, expected)


@pytest.mark.parametrize(
    ("rule", "window", "block"),
    [(ScoreRule(), None, 128), (ScoreRule(scale=0.6, cap=2.0), 40, 128), (ScoreRule(), 130, 256)],
)
def test_attention_by_segments_is_that_by_the_mask_with_its_gradients(rows, rule, window, block, monkeypatch):
    monkeypatch.setattr(splash, "LANES", block)
    inputs, real = random_heads(rows), np.asarray(rows.tree) > 0
    mask = tree_mask(rows.tree, rows.branch)
    view = layer_view(LayerKind(sliding_window=window), 8, rows.positions, rows.positions, mask)
    within = BySequence(make_places(rows.columns, rows.positions), window)
    got = attended(lambda *a: interpreted(*a, None, rule, within), inputs, real)
    assert_close(got, attended(lambda *a: plain_attend(*a, view.mask, rule), inputs, real))


def test_tokens_of_no_sequence_are_finite_and_leave_no_gradient(rows):
    inputs, padding = random_heads(rows), np.asarray(rows.tree) == 0
    within = BySequence(make_places(rows.columns, rows.positions))
    keep = ~padding[:, None, None, :, None]

    def loss(*a):
        out = interpreted(*a, None, ScoreRule(), within)
        return jnp.sum((out * keep) ** 2), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    assert np.isfinite(out).all()
    for gradient in gradients:
        entries = np.moveaxis(np.asarray(gradient), -2, 1)  # [B, T, ...]
        assert np.isfinite(entries).all() and not entries[padding].any() and entries[~padding].any()


def test_attention_by_segments_is_cut_over_the_mesh(rows, eight_devices):
    whole = jax.tree.map(lambda x: jnp.concatenate([x] * 4), rows)
    inputs, real = random_heads(whole), np.asarray(whole.tree) > 0

    def attend(*a):
        return interpreted(*a, None, ScoreRule(), BySequence(make_places(whole.columns, whole.positions)))

    with jax.set_mesh(eight_devices):
        got = attended(attend, inputs, real)
    mask = tree_mask(whole.tree, whole.branch)
    assert_close(got, attended(lambda *a: plain_attend(*a, mask), inputs, real))


def test_blocks_are_left_out_if_and_only_if_no_query_of_theirs_sees_them(rows):
    """Held to the mask, its columns put on the places; a prompt's copies count for the queries behind them."""
    places = make_places(rows.columns, rows.positions)
    block, num_places = 32, places.token.shape[1]
    seen = splash._blocks_seen(places.start, places.own, block, num_places // block, block)
    mask = np.asarray(tree_mask(rows.tree, rows.branch))
    segments, owners = np.asarray(places.segment), np.asarray(places.own)
    expected = np.zeros_like(seen)
    for row, query in zip(*np.nonzero(np.asarray(rows.tree)), strict=True):
        at = np.flatnonzero(segments[row] == segments[row, owners[row, query]])
        tokens = np.asarray(rows.columns.token_at)[row, at]
        expected[row, query // block, at[mask[row, query, tokens]] // block] = True
    for row, query in zip(*np.nonzero(np.asarray(rows.tree) == 0), strict=True):
        expected[row, query // block, 0] = True
    np.testing.assert_array_equal(seen, expected)
    assert seen.mean() < 0.4


def test_a_block_that_is_left_out_waits_for_the_next_that_is_not():
    seen = jnp.asarray([[[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]], bool)
    assert splash._next_seen(seen, 2)[0].tolist() == [[0, 3, 3, 3, 3], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert splash._next_seen(seen, 1)[0].T.tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_prompts_are_copied_and_their_gradients_summed(rows):
    places = make_places(rows.columns, rows.positions)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(*rows.tokens.shape, 4)), "float32")
    token_at = np.asarray(rows.columns.token_at)
    out, pull = jax.vjp(lambda x: spread(x, places), x)
    for row, column in zip(*np.nonzero(token_at >= 0), strict=True):
        np.testing.assert_array_equal(out[row, column], x[row, token_at[row, column]])
    d_out = jnp.asarray(np.random.default_rng(4).normal(size=out.shape), "float32")
    expected = np.zeros(x.shape)
    for row, column in zip(*np.nonzero(token_at >= 0), strict=True):
        expected[row, token_at[row, column]] += np.asarray(d_out)[row, column]
    np.testing.assert_allclose(pull(d_out)[0], expected, atol=1e-5)


def test_log_probs_and_gradients_by_segments_are_those_by_the_mask(one_device):
    model = toy_model(**FAMILIES["gemma3"])  # windowed and other layers
    params = toy_params(model, one_device, scale=2.0)
    trees = ragged_trees(count=3)
    rows = jax.tree.map(jnp.asarray, pack(trees, row_shape([trees], form=RowForm.PLACES), 18))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=18), jnp.float32)

    def found(model):
        def loss(params):
            sums = cell_log_probs(model, params, rows, 18)
            return jnp.sum(weights * sums), sums

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    by_segment = model.clone(attend="splash_interpreted")
    assert by_segment.row_form == RowForm.PLACES
    (got, got_sums), (expected, expected_sums) = found(by_segment), found(model)
    np.testing.assert_allclose(got_sums, expected_sums, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()) + 1e-6)


def test_no_array_of_the_square_of_the_row_is_made(rows):
    """The mask is there in the program that is traced, and in none that is compiled."""
    inputs = random_heads(rows)
    length, num_places = rows.tokens.shape[1], rows.columns.token_at.shape[1]

    def attend(*a):
        mask = tree_mask(rows.tree, rows.branch)
        return interpreted(*a, mask, ScoreRule(), BySequence(make_places(rows.columns, rows.positions)))

    text = jax.jit(attend).lower(*inputs).compile().as_text()
    batch = rows.tokens.shape[0]
    for columns in (length, num_places):
        assert f"[{batch},{length},{columns}]" not in text
