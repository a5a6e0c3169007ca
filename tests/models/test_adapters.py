"""Adapters: a fresh one changes nothing, training moves nothing else, and merging gives the decoder that was
trained.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from toys import FAMILIES, toy_model, toy_params

from sso_jax.models.adapters import fresh_adapters, is_adapter, join, split_trainable
from sso_jax.models.attention import causal_mask
from sso_jax.models.hf_weights import read_params, write_params
from sso_jax.models.layer_layout import cast_to_compute
from sso_jax.models.layers import Adapters
from sso_jax.models.transformer import abstract_params
from sso_jax.runtime.mesh import param_shardings
from sso_jax.training.batches import one_step, supervised_step
from sso_jax.training.example_losses import supervised_losses
from sso_jax.training.row_shapes import row_shape
from sso_jax.training.step_packing import StepShape
from sso_jax.training.trees import Branch, Tree
from sso_jax.training.update import build_update, init_state, state_shardings

ADAPTERS = Adapters(rank=2, alpha=8.0, targets=("query", "out", "down"))
TOKENS = jnp.arange(24).reshape(2, 12)


def adapted(base: dict, mesh, model=None) -> tuple:
    """A decoder (the toy) with adapters, and its parameters: `base` with fresh adapters."""
    model = (model or toy_model()).clone(adapters=ADAPTERS)
    return model, unflatten_dict({**flatten_dict(base, sep="/"), **fresh_adapters(model, mesh, 3)}, sep="/")


def logits(model, params) -> np.ndarray:
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    hidden, _ = model.apply({"params": params}, TOKENS, positions, causal_mask(12))
    return np.asarray(model.apply({"params": params}, hidden, method="logits"))


def train(model, params, mesh):
    """State after two SGD updates on one example."""
    tree = Tree([1, 2, 3], [Branch([4, 5, 6], 0)])
    batch = one_step(supervised_step([tree], StepShape(row_shape([[tree]]), 1, 1), None, weight=1 / 3))
    optimizer = optax.sgd(1.0)
    shardings = state_shardings(params, param_shardings(abstract_params(model), mesh), optimizer, mesh)
    update = build_update(supervised_losses(model), optimizer, mesh, shardings, batch, partial(cast_to_compute, model))
    state = init_state(params, optimizer, shardings)
    for _ in range(2):
        state, _ = update(state, batch, np.float32(0.1))
    return state


@pytest.fixture(scope="module", params=["qwen2", "gemma3", "phi3", "qwen3_moe"])
def trained(request, one_device):
    """The base parameters (on the host, since training takes them over), the decoder with adapters, and its state after
    training.
    """
    plain = toy_model(**FAMILIES[request.param])
    params = toy_params(plain, one_device, scale=2.0)
    base = jax.device_get(params)
    model, whole = adapted(params, one_device, plain)
    return base, model, train(model, whole, one_device)


def test_fresh_adapters_change_nothing_and_are_on_the_named_projections_only(one_device):
    base = toy_params(toy_model(), one_device)
    model, params = adapted(base, one_device)
    np.testing.assert_array_equal(logits(model, params), logits(toy_model(), base))
    adapters = {path.split("/")[-2] for path in flatten_dict(params, sep="/") if is_adapter(path)}
    assert adapters == {"query", "out", "down"}
    assert params["layers"]["attention"]["out"]["adapter_a"].shape == (3, 4, 8, 2)
    assert params["layers"]["attention"]["query"]["adapter_b"].shape == (3, 2, 4, 8)


def test_fresh_adapters_follow_from_the_seed_on_any_mesh(one_device, eight_devices):
    model = toy_model().clone(adapters=ADAPTERS)
    one, eight, other = (
        fresh_adapters(model, one_device, 3),
        fresh_adapters(model, eight_devices, 3),
        fresh_adapters(model, one_device, 4),
    )
    for path in one:
        np.testing.assert_array_equal(one[path], eight[path])
        assert path.endswith("_b") or not np.array_equal(one[path], other[path])


def test_training_moves_the_adapters_and_nothing_else(trained):
    base, model, state = trained
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.frozen), base)
    assert all(is_adapter(path) for path in flatten_dict(state.params, sep="/"))
    assert all(np.abs(np.asarray(leaf)).max() > 0 for leaf in jax.tree.leaves(state.params))
    assert np.abs(logits(model, state.all_params()) - logits(model.clone(adapters=Adapters()), base)).max() > 1e-3


def test_the_export_merges_adapters_into_the_weights(trained, one_device, tmp_path):
    _, model, state = trained
    write_params(state.all_params(), model.architecture, tmp_path, "float32", model.adapters)
    plain = model.clone(adapters=Adapters())
    merged = read_params(tmp_path, plain, one_device)
    np.testing.assert_allclose(logits(plain, merged), logits(model, state.all_params()), atol=1e-5)
    kernel, adapters = state.frozen["layers"]["mlp"]["down"]["kernel"], state.params["layers"]["mlp"]["down"]
    by_hand = np.asarray(kernel[1]) + 4.0 * np.asarray(adapters["adapter_a"][1]) @ np.asarray(
        adapters["adapter_b"][1]
    )  # alpha/rank = 4
    np.testing.assert_allclose(merged["layers"]["mlp"]["down"]["kernel"][1], by_hand, atol=1e-6)


def test_split_and_join_are_inverse_and_without_adapters_everything_is_trained(one_device):
    _, params = adapted(toy_params(toy_model(), one_device), one_device)
    jax.tree.map(np.testing.assert_array_equal, join(*split_trainable(params)), params)
    plain = nn.unbox(abstract_params(toy_model()))
    assert split_trainable(plain) == (plain, {})
