"""The default size of a device step: what fits, by arithmetic, against hand counts and XLA's own account."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from toys import ARCHITECTURE, FAMILIES, toy_model

from sso_jax.commands import programs
from sso_jax.config import Config, MeshConfig, ModelConfig, ObjectiveConfig, TrainConfig
from sso_jax.models.architecture import Experts
from sso_jax.models.hf_config import to_hf_config
from sso_jax.models.transformer import abstract_params
from sso_jax.runtime.mesh import make_mesh, param_shardings
from sso_jax.training.step_limits import (
    LEAST_TOKENS,
    MOST_TOKENS,
    activation_widths,
    active_params,
    fitting_tokens,
    step_limits,
)

MIB = 2**20


def limits_of(model, mesh, **kwargs):
    return step_limits(model, param_shardings(abstract_params(model), mesh), mesh, **kwargs)


def test_tokens_are_what_the_bytes_of_weights_moments_and_logits_leave(one_device):
    """float32: 4 + 8 + 4 bytes a parameter, 12 a logit, and what the layers keep, of four fifths of the memory."""
    model = toy_model().clone(remat=True, max_logits=1000)
    a = model.architecture
    params = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: abstract_params(model))))
    marked = 2 * a.embed_dim + (2 * a.num_heads + 2 * a.num_kv_heads) * a.head_size + 2 * a.mlp_dim
    assert activation_widths(model) == (a.embed_dim, marked + 2 * a.embed_dim + a.mlp_dim)
    per_token = 4 * (a.num_layers * a.embed_dim + 3 * (marked + 2 * a.embed_dim + a.mlp_dim))
    memory = 20 * MIB
    expected = int((0.8 * memory - 16 * params - 12 * 1000) / per_token)
    assert LEAST_TOKENS < expected < MOST_TOKENS
    assert limits_of(model, one_device, tokens=None, memory=memory).tokens == expected


def test_tokens_are_given_or_within_bounds_on_every_shard(one_device, eight_devices):
    model = toy_model()
    assert limits_of(model, one_device, tokens=77).tokens == 77
    assert limits_of(model, one_device, tokens=None, memory=1).tokens == LEAST_TOKENS
    eight = limits_of(model, eight_devices, tokens=None, memory=2**40)
    assert eight.tokens == MOST_TOKENS * eight.num_shards and eight.num_shards == 4
    assert 0 < limits_of(model, one_device, tokens=None).tokens <= MOST_TOKENS


def test_more_is_kept_without_remat_and_fewer_bytes_are_held_in_bfloat16(one_device):
    memory, model = 20 * MIB, toy_model().clone(remat=True, max_logits=1000)
    shardings = param_shardings(abstract_params(model), one_device)

    def fitting(other):
        return fitting_tokens(other, shardings, one_device, memory)

    assert fitting(model.clone(remat=False)) < fitting(model) < fitting(model.clone(dtype=jnp.dtype("bfloat16")))


@pytest.mark.parametrize(("family", "memory"), [("qwen2", 300 * MIB), ("qwen3_moe", 600 * MIB)])
def test_the_estimate_holds_against_xla(tmp_path, family, memory):
    """The bytes that XLA plans for an update in steps of the estimated size are at most those of the device, and at
    least a quarter of them.
    """
    sizes = dict(vocab_size=1024, embed_dim=256, mlp_dim=1024, num_layers=4, num_heads=4, num_kv_heads=2, head_size=64)
    experts = {"experts": Experts(16, 4, 256, True)} if family == "qwen3_moe" else {}
    architecture = dataclasses.replace(ARCHITECTURE, **{**FAMILIES[family], **experts}, **sizes)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(architecture, "float32", 1, 2)))
    config = Config(
        model=ModelConfig(path=str(tmp_path), max_logits=2**20),
        mesh=MeshConfig(1, 1, 1),
        objective=ObjectiveConfig(base="dpo"),
        train=TrainConfig(batch_size=64, max_tokens=128),
        dry_run="v5e:1x1",
    )
    plan = programs.make_plan(config, jax.devices()[:1], memory)
    assert LEAST_TOKENS < plan.step_limits.tokens < MOST_TOKENS
    program = programs.compiled(programs.trace_policy_update(plan), "update", memory)
    assert 0.25 * memory < program.total_bytes < memory


def test_a_token_is_computed_with_its_experts_alone():
    """The published Qwen3-30B-A3B: 30.5 and 3.3 thousand million parameters, of sizes from its config.json."""
    sizes = dict(vocab_size=151936, embed_dim=2048, mlp_dim=6144, num_layers=48, num_heads=32, num_kv_heads=4)
    changes = dict(FAMILIES["qwen3_moe"], experts=Experts(128, 8, 768, True), head_size=128, **sizes)
    model = toy_model(**changes)
    expert, attention = 3 * 2048 * 768, 2 * 2048 * 4096 + 2 * 2048 * 512 + 2 * 128
    rest = 48 * (attention + 2048 * 128 + 2 * 2048) + 2048 + 2 * 151936 * 2048
    assert active_params(model) == rest + 48 * 8 * expert == 3_353_032_704
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model))) == rest + 48 * 128 * expert


def test_rows_of_all_devices_among_which_experts_are_split_are_held(eight_devices):
    """Each device has the rows of four: into and out of its experts, and their hidden units thrice."""
    model = toy_model(**FAMILIES["qwen3_moe"]).clone(remat=True)
    a, split = model.architecture, make_mesh(1, 2, 1, expert=4)
    one, four = activation_widths(model), activation_widths(model, 4)
    assert one[0] == four[0] == a.embed_dim + 3 * 8
    assert four[1] - one[1] == 3 * 3 * (2 * a.embed_dim + 3 * a.experts.mlp_dim)
    fitting = [
        fitting_tokens(model.clone(max_logits=1000), param_shardings(abstract_params(model), mesh), mesh, 20 * MIB)
        for mesh in (split, make_mesh(1, 8, 1))
    ]
    assert 8 * LEAST_TOKENS <= fitting[0] < fitting[1]
