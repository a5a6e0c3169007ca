"""Packed rows with shared prompts against plain rows, one response each: same log-probs, same gradients, no token
lost.
"""

import itertools
import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from toys import FAMILIES, toy_model, toy_params

from sso_jax.commands.flops import count_flops
from sso_jax.models.attention import causal_mask
from sso_jax.models.kernels import KERNELS, cudnn_attend
from sso_jax.models.sequences import RowForm
from sso_jax.models.transformer import Transformer
from sso_jax.runtime.mesh import spec
from sso_jax.training.log_probs import cell_log_probs
from sso_jax.training.packing import Rows, pack
from sso_jax.training.row_shapes import RowShape, row_shape
from sso_jax.training.token_log_probs import _log_sum_exp_in_one_pass, token_log_probs
from sso_jax.training.trees import Branch, Tree, first_fit, steered_trees


def random_trees(seed=0, num_trees=9):
    draw = np.random.default_rng(seed)

    def ids(low, high):
        return draw.integers(3, 96, draw.integers(low, high)).tolist()

    cells = iter(range(1000))
    return [Tree(ids(1, 15), [Branch(ids(1, 12), next(cells)) for _ in range(1 + i % 3)]) for i in range(num_trees)]


def plain_log_prob(model, params, prompt, response):
    """Sum of a response's log-probs by one unpadded causal pass and a full softmax."""
    ids = jnp.asarray([prompt + response])
    positions = jnp.arange(ids.shape[1])[None]
    hidden, _ = model.apply({"params": params}, ids, positions, causal_mask(ids.shape[1]))
    logits = model.apply({"params": params}, hidden, method="logits")[0]
    log_probs = jax.nn.log_softmax(logits[len(prompt) - 1 : -1], axis=-1)
    return jnp.take_along_axis(log_probs, jnp.asarray(response)[:, None], axis=1).sum()


DISTINCT = ("qwen2", "qwen2_windowed", "gemma2", "gemma3", "olmo3", "smollm3", "phi3", "qwen3_moe")
"""Families that have between them everything that any family has."""


@pytest.mark.parametrize("changes", [{}, *map(FAMILIES.get, DISTINCT)], ids=["untied", *DISTINCT])
def test_shared_and_packed_rows_equal_plain_ones_in_log_probs_and_gradients(one_device, changes):
    model = toy_model(num_layers=2, **changes)
    params = toy_params(
        model, one_device, scale=2.0
    )  # at ten times the usual scale gradients are too ill-conditioned for float32
    trees = random_trees(num_trees=4)
    num_cells = sum(len(tree.branches) for tree in trees)
    rows = pack(trees, row_shape([trees]), num_cells)
    assert rows.tokens.shape[0] < num_cells  # they are packed
    weights = jnp.asarray(np.random.default_rng(1).normal(size=num_cells), jnp.float32)

    def packed(params):
        return cell_log_probs(model, params, jax.tree.map(jnp.asarray, rows), num_cells)

    def plain(params):
        return jnp.stack(
            [plain_log_prob(model, params, t.prompt_ids, b.response_ids) for t in trees for b in t.branches]
        )

    np.testing.assert_allclose(jax.jit(packed)(params), jax.jit(plain)(params), rtol=1e-6, atol=1e-5)
    ours, theirs = (jax.jit(jax.grad(lambda p, f=f: jnp.sum(weights * f(p))))(params) for f in (packed, plain))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("changes", [{}, FAMILIES["qwen2_windowed"]], ids=["full", "windowed"])
def test_rows_by_sequences_equal_rows_by_the_mask_in_log_probs_and_gradients(one_device, monkeypatch, changes):
    """cuDNN itself needs a GPU; the same call without it stands in."""
    monkeypatch.setitem(KERNELS, "cudnn", partial(cudnn_attend, implementation="xla"))
    model = toy_model(num_layers=2, **changes)
    params = toy_params(model, one_device, scale=2.0)
    trees = random_trees()
    rows = jax.tree.map(jnp.asarray, pack(trees, row_shape([trees], form=RowForm.SEQUENCES), 40))
    without = jax.tree.map(jnp.asarray, pack(trees, row_shape([trees]), 40))
    assert rows.sequences.size and not without.sequences.size
    weights = jnp.asarray(np.random.default_rng(1).normal(size=40), jnp.float32)

    def found(model, rows):
        def loss(params):
            return jnp.sum(weights * cell_log_probs(model, params, rows, 40))

        return cell_log_probs(model, params, rows, 40), jax.jit(jax.grad(loss))(params)

    fused = model.clone(attend="cudnn")
    expected = found(model, rows)
    for other in (found(fused, rows), found(fused, without)):
        for a, b in zip(*map(jax.tree.leaves, (other, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_the_log_sum_exp_in_one_pass_is_numpys_in_two(scale):
    """Exponentials of 300 overflow; entries of minus infinity, which a slice has where another one has them, count for
    nothing.
    """
    logits = (np.random.default_rng(8).normal(size=(2, 3, 1000)) * scale).astype(np.float32)
    logits[..., ::7] = -np.inf
    top = logits.astype(np.float64).max(-1, keepdims=True)
    expected = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[..., 0]
    np.testing.assert_allclose(jax.jit(_log_sum_exp_in_one_pass)(logits), expected, rtol=1e-6)


def test_rematerialised_layers_give_the_same_gradients(one_device):
    model = toy_model()
    params = toy_params(model, one_device)
    trees = random_trees()
    rows = jax.tree.map(jnp.asarray, pack(trees, row_shape([trees]), 40))
    gradients = [
        jax.jit(jax.grad(lambda p, m=m: cell_log_probs(m, p, rows, 40).sum()))(params)
        for m in (model, Transformer(model.architecture, remat=True))
    ]
    for a, b in zip(
        *map(jax.tree.leaves, gradients), strict=True
    ):  # entries of up to 500 are sums of many: float32 against the largest
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def log_probs_by_numpy(head, hidden, target, weights, cap=None):
    """Log-probs in float64, and the gradients of `sum(weights * log_probs)` by head and hidden states."""
    logits = np.einsum("rmd,dv->rmv", hidden.astype(np.float64), head.astype(np.float64))
    slope = np.ones_like(logits) if cap is None else 1 / np.cosh(logits / cap) ** 2
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    d_logits = weights[..., None] * (
        np.eye(head.shape[1])[target] - probs
    )  # of w log p by a logit: w (onehot(target) - p)
    d_logits = d_logits * slope
    log_probs = np.log(np.take_along_axis(probs, target[..., None], -1)[..., 0])
    return log_probs, np.einsum("rmd,rmv->dv", hidden, d_logits), d_logits @ head.T


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("columns", [1, 4, 7, 100])
@pytest.mark.parametrize("devices", ["one", "eight"])
def test_log_probs_do_not_depend_on_the_slices_of_the_vocabulary(devices, columns, cap, eight_devices):
    draw = np.random.default_rng(0)
    hidden, head = draw.normal(size=(4, 10, 8)).astype(np.float32), draw.normal(size=(8, 50)).astype(np.float32)
    target, weights = draw.integers(0, 50, (4, 10)), draw.normal(size=(4, 10)).astype(np.float32)
    log_probs, d_head, d_hidden = log_probs_by_numpy(head, hidden, target, weights, cap)

    def weighted(head, hidden):
        got = token_log_probs(head, hidden, jnp.asarray(target), columns, cap)
        return jnp.sum(got * weights), got

    gradients = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))
    if devices == "one":
        got_gradients, got = gradients(head, hidden)
    else:  # rows over data and fsdp, the head's width over fsdp and its entries over tensor
        lies = [NamedSharding(eight_devices, spec(*axes)) for axes in (("embed", "vocab"), ("batch", None, None))]
        with jax.set_mesh(eight_devices):
            got_gradients, got = gradients(*map(jax.device_put, (head, hidden), lies))
    np.testing.assert_allclose(got, log_probs, atol=1e-5)
    np.testing.assert_allclose(got_gradients[0], d_head, atol=2e-5)
    np.testing.assert_allclose(got_gradients[1], d_hidden, atol=1e-5)


def largest_array(jaxpr, found=0):
    """Elements of the largest array that a program makes, looking into its loops."""
    for equation in jaxpr.eqns:
        found = max([found, *(int(np.prod(v.aval.shape)) for v in equation.outvars if hasattr(v.aval, "shape"))])
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found = largest_array(inner, found)
    return found


def test_no_array_of_all_tokens_times_the_vocabulary_is_made():
    hidden, head = jnp.zeros((2, 64, 4)), jnp.zeros((4, 1000))
    target = jnp.zeros((2, 64), jnp.int32)
    program = jax.make_jaxpr(jax.grad(lambda h: token_log_probs(head, h, target, 60).sum()))(hidden)
    assert largest_array(program.jaxpr) <= 2 * 64 * 60 < 2 * 64 * 1000


def test_logits_that_are_all_in_memory_at_once_are_not_computed_anew():
    """Three products of 128 tokens with a head of [4, 1000], though slices are multiples of 128; two slices of 512
    would have four.
    """
    hidden, head, target = jnp.zeros((2, 64, 4)), jnp.zeros((4, 1000)), jnp.zeros((2, 64), jnp.int32)
    operations = [
        count_flops(
            jax.make_jaxpr(jax.grad(lambda *x, n=columns: token_log_probs(*x, target, n).sum(), argnums=(0, 1)))(
                head, hidden
            )
        )
        for columns in (1000, 999)
    ]
    assert operations == [3 * 2 * 128 * 4 * 1000, 4 * 2 * 128 * 4 * 2 * 512]


def unpack(rows: Rows, num_cells: int) -> dict[int, tuple[list[int], list[int]]]:
    """(prompt, response) of each cell, read back from the arrays alone."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for row in range(rows.tokens.shape[0]):
        for source, target, cell in zip(rows.source[row], rows.target[row], rows.cell[row], strict=True):
            if cell == num_cells:
                continue
            trunk = (rows.tree[row] == rows.tree[row, source]) & (rows.branch[row] == 0)
            prompt = rows.tokens[row][trunk].tolist()
            found.setdefault(int(cell), (prompt, []))[1].append(int(target))
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_packing_loses_and_invents_no_token(seed, num_trees):
    trees = random_trees(seed, num_trees)
    num_cells = sum(len(tree.branches) for tree in trees)
    rows = pack(trees, row_shape([trees]), num_cells)
    expected = {branch.cell: (tree.prompt_ids, branch.response_ids) for tree in trees for branch in tree.branches}
    assert unpack(rows, num_cells) == expected
    assert int((rows.tree > 0).sum()) == sum(tree.num_tokens() for tree in trees)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40))
def test_first_fit_fills_bins_and_leaves_no_two_that_could_be_one(sizes):
    bins = first_fit(sizes, 20)
    assert sorted(i for bin_ in bins for i in bin_) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in bin_) for bin_ in bins]
    assert all(load <= 20 for load in loads)
    assert all(a + b > 20 for n, a in enumerate(loads) for b in loads[n + 1 :])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_sequences_are_each_response_behind_its_prompt(seed, num_trees):
    trees = random_trees(seed, num_trees)
    num_cells = sum(len(tree.branches) for tree in trees)
    shape = row_shape([trees], form=RowForm.SEQUENCES)
    if not shape.num_sequences:  # they would be most of them padding
        shape = shape._replace(num_sequences=num_cells, sequence_tokens=32)
    rows = pack(trees, shape, num_cells)
    found = [
        rows.tokens[row][own[own >= 0]].tolist()
        for row, of_row in enumerate(rows.sequences)
        for own in of_row
        if own[0] >= 0
    ]
    assert sorted(found) == sorted(tree.prompt_ids + branch.response_ids for tree in trees for branch in tree.branches)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_places_are_each_response_behind_its_prompt(seed, num_trees):
    trees = random_trees(seed, num_trees)
    num_cells = sum(len(tree.branches) for tree in trees)
    rows = pack(trees, row_shape([trees], form=RowForm.PLACES), num_cells)
    found = []
    for row, token_at in enumerate(rows.columns.token_at):
        filled = token_at[token_at >= 0]
        assert (token_at[: len(filled)] >= 0).all()
        starts = [*np.flatnonzero(rows.positions[row][filled] == 0), len(filled)]
        found += [rows.tokens[row][filled[a:b]].tolist() for a, b in itertools.pairwise(starts)]
        for token, places in enumerate(rows.columns.places[row]):
            own = [place for place in places if place < len(token_at)]
            assert own == np.flatnonzero(token_at == token).tolist() and places[: len(own)].tolist() == own
    assert sorted(found) == sorted(tree.prompt_ids + branch.response_ids for tree in trees for branch in tree.branches)


def test_a_shape_has_sequences_where_they_would_not_be_most_of_them_padding():
    def tree(prompt, *lengths):
        return Tree([1] * prompt, [Branch([2] * length, 0) for length in lengths])

    even = [tree(64, 32, 32) for _ in range(4)]  # a row of 128 tokens each, with two sequences of 96
    assert row_shape([even], form=RowForm.SEQUENCES) == RowShape(4, 128, 64, 2, 96)
    assert row_shape([even]) == RowShape(4, 128, 64)
    uneven = [
        tree(100, 28),
        *(tree(2, 1, 1, 1, 1) for _ in range(20)),
    ]  # 81 sequences in a row, one of them of 128 tokens
    assert row_shape([uneven], form=RowForm.SEQUENCES).num_sequences == 0


def test_trees_of_a_steered_example_share_each_prompt_once():
    prompts = {"plain": [1], "positive": [2, 2], "negative": [3, 3, 3]}
    responses = {"chosen": [7], "rejected": [8, 8], "original": [9]}
    cells = [("plain", "chosen"), ("plain", "rejected"), ("negative", "original"), ("negative", "chosen")]
    assert steered_trees(prompts, responses, cells, 10) == [
        Tree([1], [Branch([7], 10), Branch([8, 8], 11)]),
        Tree([3, 3, 3], [Branch([9], 12), Branch([7], 13)]),
    ]


def test_rows_that_do_not_hold_their_trees_are_refused():
    """One of anything less than the trees fill: two sequences in a row, of 16 and of 14 tokens."""
    tree = Tree([1] * 10, [Branch([2] * 6, 0), Branch([3] * 4, 1)])
    shape = RowShape(2, 20, 10, num_sequences=2, sequence_tokens=16, num_places=30, num_copies=2)
    assert pack([tree, tree], shape, 2).tree.all()
    for field in RowShape._fields:
        with pytest.raises(ValueError, match="2 trees of 40 tokens, the longest of 20, do not fit into RowShape"):
            pack([tree, tree], shape._replace(**{field: getattr(shape, field) - 1}), 2)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 12), st.sampled_from(RowForm))
def test_every_batch_packs_into_the_shape_of_all(seed, num_batches, num_trees, form):
    """Prompts and responses of very different lengths, as a limit of new tokens gives them."""
    draw = random.Random(seed)

    def tree():
        return Tree(
            [1] * draw.choice((2, 40, 300)),
            [Branch([2] * draw.choice((1, 30, 90)), 0) for _ in range(draw.choice((1, 2, 3)))],
        )

    batches = [[tree() for _ in range(num_trees)] for _ in range(num_batches)]
    shape = row_shape(batches, form=form)
    assert all((pack(batch, shape, 1).tree > 0).sum() == sum(t.num_tokens() for t in batch) for batch in batches)


def test_rows_are_longer_than_the_longest_tree_where_that_leaves_less_of_them_empty():
    def tree(length):
        return Tree([1] * (length - 2), [Branch([2, 3], 0)])

    uneven = [
        tree(128),
        *(tree(66) for _ in range(12)),
    ]  # in rows of 128 each of these has one to itself: 13 * 128 = 1664 tokens
    shape = row_shape([uneven])
    assert shape.num_tokens > 128 and shape.num_rows * shape.num_tokens <= 1200  # there are 920
    assert int((pack(uneven, shape, 1).tree > 0).sum()) == 128 + 12 * 66
    even = row_shape([[tree(128) for _ in range(8)]])
    assert (even.num_rows, even.num_tokens) == (8, 128)  # nothing to gain: the shortest rows
