"""Experts on one token a row, as in decoding, held to the same tokens in sequences, on meshes and with adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from toys import FAMILIES, toy_model, toy_params

from sso_jax.models.adapters import fresh_adapters
from sso_jax.models.attention import causal_mask
from sso_jax.models.layers import Adapters
from sso_jax.models.transformer import abstract_params
from sso_jax.runtime.mesh import batch_sharding, make_mesh, param_shardings

TOKENS = np.random.default_rng(0).integers(3, 96, (16, 2))
MESHES = {"fsdp": (1, 8, 1, 1), "all_axes": (1, 2, 2, 2), "fsdp_and_expert": (1, 2, 1, 4), "data": (2, 2, 1, 2)}
"""Sizes of the axes data, fsdp, tensor, expert of eight devices."""


def adapted(mesh):
    """A decoder with experts and adapters on all its projections that change what it computes."""
    model = toy_model(**FAMILIES["qwen3_moe"])
    base = flatten_dict(toy_params(model, mesh, scale=3.0), sep="/")
    names = ("query", "out", "gate", "up", "down")
    model = model.clone(adapters=Adapters(rank=2, alpha=4.0, targets=names))
    fresh = fresh_adapters(model, mesh, 3)
    draw = np.random.default_rng(1)
    moved = {path: draw.normal(0.0, 0.3, leaf.shape).astype(np.float32) for path, leaf in sorted(fresh.items())}
    assert sum("/mlp/" in path for path in moved) == 6
    params = unflatten_dict({**base, **moved}, sep="/")
    return model, jax.device_put(params, param_shardings(abstract_params(model), mesh))


def hidden(model, params, tokens, mesh):
    """Hidden states of the first token of each row."""

    def first(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model.apply({"params": params}, tokens, positions, causal_mask(tokens.shape[1]))[0][:, 0]

    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(first)(params, jax.device_put(tokens, batch_sharding(mesh))))


@pytest.fixture(scope="module")
def expected(one_device):
    model, params = adapted(one_device)
    whole = hidden(model, params, TOKENS, one_device)
    plain = hidden(model.clone(adapters=Adapters()), params, TOKENS, one_device)
    assert np.abs(whole - plain).max() > 0.1  # the adapters do something
    return whole


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_a_single_token_a_row_gives_what_it_gives_in_a_sequence_on_one_device(expected, sizes):
    data, fsdp, tensor, expert = sizes
    mesh = make_mesh(data, fsdp, tensor, expert=expert)
    model, params = adapted(mesh)
    np.testing.assert_allclose(hidden(model, params, TOKENS[:, :1], mesh), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(hidden(model, params, TOKENS, mesh), expected, rtol=0, atol=1e-5)


def test_only_sequences_gather_the_matrices_of_experts():
    """Programs compiled for one and two tokens a row, on eight shards of the embed axis."""
    mesh, model = make_mesh(1, 8, 1), toy_model(**FAMILIES["qwen3_moe"])
    params = toy_params(model, mesh)
    gathers = {}
    for num_tokens in (1, 2):

        def run(params, tokens):
            positions = jnp.zeros(tokens.shape, jnp.int32)
            return model.apply({"params": params}, tokens, positions, causal_mask(tokens.shape[1]))[0]

        tokens = jax.device_put(TOKENS[:, :num_tokens], batch_sharding(mesh))
        with jax.set_mesh(mesh):
            program = jax.jit(run).lower(params, tokens).compile().as_text()
        lines = [line for line in program.splitlines() if " all-gather(" in line or " all-gather-start(" in line]
        gathers[num_tokens] = sum("8,32,16]" in line or "8,16,32]" in line for line in lines)
    assert gathers == {1: 0, 2: 3}  # gate, up and down in the body of the scan
