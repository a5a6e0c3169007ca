"""What the backward pass keeps of a layer, counted; and which outputs the policy names."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from toys import ARCHITECTURE, toy_model

from sso_jax.models.attention import causal_mask
from sso_jax.models.remat_policy import NAME, save_marked
from sso_jax.models.transformer import abstract_params
from sso_jax.training.step_limits import activation_widths

ROWS, LENGTH = 2, 24


def kept_entries(model) -> int:
    """Entries that a forward pass hands to its backward pass for each layer, parameters apart."""
    a, params = model.architecture, nn.unbox(abstract_params(model))
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)

    def backward(params):
        return jax.vjp(lambda p: model.apply({"params": p}, tokens, positions, causal_mask(LENGTH))[0], params)[1]

    of_params = {leaf.shape for leaf in jax.tree.leaves(params["layers"])}
    leaves = jax.tree.leaves(jax.eval_shape(backward, params))
    stacked = [leaf for leaf in leaves if leaf.shape[:1] == (a.num_layers,) and leaf.dtype == jnp.float32]
    assert (a.num_layers, a.embed_dim, a.mlp_dim) in {
        leaf.shape for leaf in stacked
    }  # as they lie: what is kept is there to be found
    return sum(leaf.size for leaf in stacked if leaf.shape not in of_params) // a.num_layers


@pytest.mark.parametrize("norms", ["before", "after", "both"])
@pytest.mark.parametrize("qk_norm", ["none", "head", "all_heads"])
def test_a_layer_keeps_its_input_and_what_products_and_attention_give(qk_norm, norms):
    a = dataclasses.replace(ARCHITECTURE, qk_norm=qk_norm, norms=norms)
    heads = (a.num_heads + 2 * a.num_kv_heads) * a.head_size
    before_norms = (a.num_heads + a.num_kv_heads) * a.head_size if qk_norm != "none" else 0
    attended = a.num_heads * a.head_size + a.num_heads  # and the log-sum-exp of each head's scores
    outputs = 0 if norms == "before" else 2 * a.embed_dim
    token = a.embed_dim + heads + before_norms + attended + outputs + a.embed_dim + 2 * a.mlp_dim
    model = toy_model(qk_norm=qk_norm, norms=norms)
    assert kept_entries(model) == ROWS * LENGTH * token
    log_sum_exps = a.num_heads
    assert activation_widths(model)[0] == token - log_sum_exps


def test_with_remat_a_layer_keeps_its_input_alone():
    assert kept_entries(toy_model().clone(remat=True)) == ROWS * LENGTH * ARCHITECTURE.embed_dim


@pytest.mark.parametrize(
    ("name", "settings", "keeps"),
    [
        ("name", {"name": NAME}, True),
        ("name", {"name": "another"}, False),
        ("dot_product_attention_fwd_wrapper", {}, True),
        ("dot_product_attention_bwd_wrapper", {}, False),
        ("dot_general", {}, False),
    ],
)
def test_the_policy_keeps_what_is_marked_and_what_cudnn_gives(name, settings, keeps):
    assert save_marked(SimpleNamespace(name=name), **settings) is keeps
