"""Small members of every family: one device and eight, and the table of families held to transformers' classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from toys import FAMILIES as MEMBERS
from toys import toy_model, toy_params

from sso_jax.models.families import FAMILIES, LACKING, TEXT_MODELS
from sso_jax.models.hf_config import CAUSAL_CLASS, REWARD_CLASS, to_hf_config
from sso_jax.models.presets import PRESETS
from sso_jax.runtime.mesh import batch_sharding, make_mesh
from sso_jax.training.log_probs import cell_log_probs
from sso_jax.training.packing import pack
from sso_jax.training.row_shapes import row_shape
from sso_jax.training.trees import Branch, Tree


def packed_rows():
    """Eight rows with several trees each, whose responses are longer than the windows."""
    draw = np.random.default_rng(0)

    def ids(low, high):
        return draw.integers(3, 96, draw.integers(low, high)).tolist()

    trees = [Tree(ids(5, 20), [Branch(ids(3, 15), 2 * i + b) for b in range(2)]) for i in range(16)]
    return pack(trees, row_shape([trees], 8), 32)


MESHES = {"expert_4": (1, 2, 1, 4), "expert_2_and_tensor": (1, 2, 2, 2), "expert_8": (1, 1, 1, 8)}
"""Sizes of the axes data, fsdp, tensor, expert of eight devices."""


@pytest.mark.parametrize("family", MEMBERS)
def test_eight_devices_give_the_log_probs_and_gradients_of_one(one_device, eight_devices, family):
    hold_equal(family, one_device, eight_devices)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_sharded_experts_give_the_log_probs_and_gradients_of_one_device(one_device, sizes):
    data, fsdp, tensor, expert = sizes
    mesh = make_mesh(data, fsdp, tensor, expert=expert)
    hold_equal("qwen3_moe", one_device, mesh)
    kernel = toy_params(toy_model(**MEMBERS["qwen3_moe"]), mesh)["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[1] == 8 // expert  # [layers, experts, ...]


def hold_equal(family, one_device, other):
    model, rows = toy_model(**MEMBERS[family]), packed_rows()
    assert rows.tokens.shape[0] % 4 == 0
    weights = jnp.asarray(np.random.default_rng(1).normal(size=32), jnp.float32)

    def run(mesh):
        def loss(params, rows):
            log_probs = cell_log_probs(model, params, rows, 32)
            return jnp.sum(weights * log_probs), log_probs

        params, placed = toy_params(model, mesh, scale=2.0), jax.device_put(rows, batch_sharding(mesh))
        with jax.set_mesh(mesh):
            gradients, log_probs = jax.jit(jax.grad(loss, has_aux=True))(params, placed)
        return jax.device_get((log_probs, gradients))

    (one, one_gradients), (eight, eight_gradients) = run(one_device), run(other)
    np.testing.assert_allclose(eight, one, rtol=0, atol=2e-5)
    for a, b in zip(jax.tree.leaves(eight_gradients), jax.tree.leaves(one_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def test_the_classes_are_those_of_transformers():
    """A config of each family opens as the class that the table names, and so does its reward model."""
    for kind, family in FAMILIES.items():
        config_class = transformers.CONFIG_MAPPING[kind]
        assert transformers.AutoModelForCausalLM._model_mapping[config_class].__name__ == family.causal_class
        reward = transformers.AutoModelForSequenceClassification._model_mapping[config_class].__name__
        assert reward == (family.reward_class or family.causal_class.replace(CAUSAL_CLASS, REWARD_CLASS))
    assert all(kind in transformers.CONFIG_MAPPING for kind in (*TEXT_MODELS, *LACKING))


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_takes_the_config_of_a_preset_and_keeps_its_layers(name, tmp_path):
    architecture = PRESETS[name]
    fields = to_hf_config(architecture, "bfloat16", 1, 2)
    config = transformers.CONFIG_MAPPING[architecture.model_type](**fields)
    assert config.num_hidden_layers == architecture.num_layers and config.vocab_size == architecture.vocab_size
    if "layer_types" in fields:
        windows = [architecture.kinds[i].sliding_window for i in architecture.kind_indices()]
        assert [kind == "sliding_attention" for kind in config.layer_types] == [w is not None for w in windows]
        assert {window for window in windows if window} <= {config.sliding_window}
