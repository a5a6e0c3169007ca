"""Layers in stacks and apart: the same parameters, log-probs and gradients; what is shared by all layers is computed
once.
"""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from toys import ARCHITECTURE, toy_model, toy_params

from sso_jax.models.attention import causal_mask
from sso_jax.models.layer_layout import (
    build_lay_out,
    laid_out,
    runs_unrolled,
    stack,
    trains_unrolled,
    unstack,
    with_layout_of,
)
from sso_jax.models.layers import Adapters
from sso_jax.models.transformer import abstract_params
from sso_jax.runtime.mesh import compiler_options, param_shardings
from sso_jax.sampling.decode import as_decoded
from sso_jax.training.log_probs import build_score, cell_log_probs
from sso_jax.training.packing import pack
from sso_jax.training.row_shapes import row_shape
from sso_jax.training.trees import Branch, Tree

NUM_LAYERS = ARCHITECTURE.num_layers
TREES = [
    Tree([5, 6, 7], [Branch([8, 9, 10], 0), Branch([11], 1)]),
    Tree([12, 13], [Branch([14, 15], 2)]),
    Tree([16] * 9, [Branch([17, 18, 19, 20], 3), Branch([21] * 5, 4)]),
]


@pytest.fixture(scope="module")
def rows():
    return pack(TREES, row_shape([TREES], 1), 5)


def test_taken_apart_and_stacked_again_parameters_are_the_same(one_device):
    model = toy_model().clone(adapters=Adapters(2, 4.0, ("query", "down")))
    params = toy_params(model, one_device)
    apart = unstack(params)
    assert "layers" not in apart and all(f"layers_{i}" in apart for i in range(NUM_LAYERS))
    np.testing.assert_array_equal(
        apart["layers_1"]["unit"]["gate"]["kernel"], params["layers"]["unit"]["gate"]["kernel"][1]
    )
    assert jax.tree.structure(stack(apart)) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, stack(apart), params)


def test_stacks_keep_the_order_of_more_than_ten_layers():
    params = {"layers": {"norm": {"scale": jnp.arange(24.0).reshape(12, 2)}}, "head": jnp.ones(3)}
    jax.tree.map(np.testing.assert_array_equal, stack(unstack(params)), params)


def test_parameters_without_layers_stay_as_they_are():
    assert unstack({}) == {} and stack({}) == {}
    assert unstack({"head": 1.0}) == stack({"head": 1.0}) == {"head": 1.0}


def test_log_probs_and_gradients_are_the_same_with_layers_apart(one_device, rows):
    model = toy_model(qk_norm=True)
    params = toy_params(
        model, one_device, scale=3.0
    )  # at ten times the usual scale gradients are too ill-conditioned for float32
    weights = np.array([1.0, -2.0, 3.0, 0.5, -1.0], np.float32)

    def loss(params):
        log_probs = cell_log_probs(model, params, rows, 5)
        return jnp.sum(log_probs * weights), log_probs

    (_, expected), d_params = jax.value_and_grad(loss, has_aux=True)(params)
    (_, got), d_apart = jax.value_and_grad(loss, has_aux=True)(unstack(params))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    got, expected = flatten_dict(stack(d_apart)), flatten_dict(d_params)
    assert got.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(got[path], leaf, atol=1e-5 * np.abs(leaf).max(), err_msg=str(path))


def test_scoring_takes_layers_apart_once_and_gives_the_plain_log_probs(one_device, eight_devices, rows):
    model = toy_model()
    many = pack(TREES, row_shape([TREES], 8), 5)
    for mesh, own in ((one_device, rows), (eight_devices, many)):
        params = toy_params(model, mesh)
        score = build_score(model, mesh, param_shardings(abstract_params(model), mesh))
        laid_out = score.lay_out(params)
        assert not with_layout_of(model, laid_out).stacked
        with jax.set_mesh(mesh):
            got = score.log_probs(laid_out, own, 5)
        np.testing.assert_allclose(got, cell_log_probs(model, toy_params(model, one_device), rows, 5), rtol=1e-5)


def test_layers_lie_apart_where_that_is_faster_or_asked_for(one_device):
    assert trains_unrolled(toy_model(), one_device)
    assert not trains_unrolled(toy_model().clone(remat=True), one_device)
    assert not trains_unrolled(toy_model().clone(laid="stacked"), one_device)
    cases = {
        ("cpu", 8): (True, True, True),
        ("gpu", 1): (True, False, True),
        ("gpu", 8): (True, False, False),
        ("tpu", 1): (False,) * 3,
    }
    for (name, size), expected in cases.items():
        mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=name)] * size, object), size=size)
        decoder = as_decoded(toy_model(), mesh)
        assert (not decoder.stacked, decoder.outputs_first, runs_unrolled(toy_model(), mesh)) == expected
        assert bool(compiler_options(mesh)) is (name == "gpu")
        asked = {laid: runs_unrolled(toy_model().clone(laid=laid), mesh) for laid in ("stacked", "apart")}
        assert asked == {"stacked": False, "apart": True}


def test_weights_are_converted_once_and_gradients_are_those_of_the_stored_ones(one_device, rows):
    """Each projection converts what is float32 and rounds its gradient to bfloat16; converted before, the same numbers
    come out.
    """
    model = toy_model().clone(dtype=jnp.bfloat16)
    params = {**toy_params(model, one_device, scale=3.0), "another": {"weight": jnp.ones(3)}}
    given = laid_out(model, params, apart=False)
    assert {leaf.dtype for path, leaf in flatten_dict(given).items() if path[0] != "another"} == {jnp.dtype("bfloat16")}
    assert given["another"]["weight"].dtype == jnp.float32

    def loss(params):
        return jnp.sum(cell_log_probs(model, params, rows, 5) * np.array([1.0, -2.0, 3.0, 0.5, -1.0], np.float32))

    (expected, d_stored), (got, d_given) = (jax.jit(jax.value_and_grad(loss))(own) for own in (params, given))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    d_stored, d_given = flatten_dict(d_stored), flatten_dict(d_given)
    for path, leaf in d_stored.items():
        np.testing.assert_allclose(
            np.asarray(d_given[path], np.float32), leaf, atol=2**-8 * np.abs(leaf).max(), err_msg=str(path)
        )


def test_laying_out_passes_on_what_stays_as_it_is(one_device):
    model = toy_model()
    params = toy_params(model, one_device)
    stacked, apart = (build_lay_out(model, one_device, apart)(params) for apart in (False, True))
    assert stacked["layers"]["unit"]["up"]["kernel"] is params["layers"]["unit"]["up"]["kernel"]
    assert apart["embedding"] is params["embedding"] and "layers_2" in apart
    halved = build_lay_out(model.clone(dtype=jnp.bfloat16), one_device, True)(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(halved)} == {jnp.dtype("bfloat16")}


def count_sines(model, params) -> int:
    """Sines in the compiled program of a forward pass."""
    tokens = jnp.zeros((2, 8), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(8), tokens.shape) + tokens[:, :1]  # no constant

    def run(params, tokens, positions):
        return model.apply({"params": params}, tokens, positions, causal_mask(8))[0]

    return len(re.findall(r" sine\(", jax.jit(run).lower(params, tokens, positions).compile().as_text()))


def test_rotations_are_computed_once_for_all_layers(one_device):
    model = toy_model()
    params = toy_params(model, one_device)
    assert count_sines(model, params) == 1
    assert count_sines(model.clone(stacked=False), unstack(params)) == 1
