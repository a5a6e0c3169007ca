"""The dry run on the devices that are here: bytes by arithmetic, programs that compile, and what it refuses."""

import dataclasses
import importlib.util
import json

import jax
import pytest
from flax.traverse_util import flatten_dict
from toys import ARCHITECTURE

from sso_jax import dry_run
from sso_jax.config import Config, MeshConfig, ModelConfig, ObjectiveConfig, SamplingConfig, TrainConfig
from sso_jax.errors import InputError
from sso_jax.models.hf_weights import to_hf_config
from sso_jax.models.presets import PRESETS


def config_of(path, **sections) -> Config:
    sections = {
        "mesh": MeshConfig(data=2, fsdp=2, tensor=2),
        "sampling": SamplingConfig(batch_size=8, max_new_tokens=8),
        "objective": ObjectiveConfig(base="dpo"),
        "train": TrainConfig(batch_size=8, microbatch_size=4, max_tokens=64),
        **sections,
    }
    return Config(model=ModelConfig(path=str(path)), dry_run="v5e:2x4", **sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with config.json alone: the dry run needs no weights."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(to_hf_config(ARCHITECTURE, "float32", 1, 2)))
    return folder


@pytest.fixture(scope="module")
def programs(folder):
    plan = dry_run.make_plan(config_of(folder), jax.devices())
    return plan, {name: compiled(plan, name) for name, compiled in dry_run.PROGRAMS.items()}


def test_bytes_of_parameters_and_optimizer_are_those_of_their_shapes(programs):
    plan, compiled = programs
    flat = flatten_dict(plan.params, sep="/")
    cut = {"norm": 1, "kernel": 4, "embedding": 4, "head": 4}  # parts of the mesh that cut a matrix: 2 over width, 2 over the other axis
    biases = {"query/bias": 2, "key/bias": 2, "value/bias": 2}
    expected = 0
    for path, leaf in flat.items():
        parts = next((n for end, n in biases.items() if path.endswith(end)), cut.get(path.rsplit("/", 1)[-1], 1))
        expected += leaf.size * 4 // parts
    assert {program.params_bytes for program in compiled.values()} == {expected}
    assert compiled["update"].optimizer_bytes == pytest.approx(2 * expected, abs=64)  # two moments, and counters
    assert compiled["scoring"].optimizer_bytes == 0


def test_the_update_of_a_reward_model_has_no_vocabulary(folder, programs):
    """No head and one row in its place: less arithmetic than the policy's update, and fewer bytes of optimizer."""
    plan = dataclasses.replace(programs[0], config=dataclasses.replace(programs[0].config, recipe="reward"))
    program, of_policy = dry_run.compile_update(plan, "update"), programs[1]["update"]
    assert program.optimizer_bytes < of_policy.optimizer_bytes and 0 < program.flops < of_policy.flops


def test_the_cache_holds_keys_and_values_of_all_slots(programs):
    plan, compiled = programs
    a, slots = plan.model.architecture, 32 + 8  # the shortest prompt bucket and the new tokens
    whole = 2 * a.num_layers * 8 * a.num_kv_heads * slots * a.head_size * 4
    assert compiled["prefill and decode"].cache_bytes == whole // 8


def test_an_update_costs_four_scorings_a_microbatch_and_attention_five(programs):
    _, compiled = programs  # forward, forward again under remat, two products backward for each; attention recomputes its scores once more
    num_micro = 2
    assert num_micro * 4 < compiled["update"].flops / compiled["scoring"].flops < num_micro * 5


def test_the_table_names_what_does_not_fit_and_says_what_to_do(programs):
    plan, compiled = programs
    fits, fails = compiled["scoring"], dataclasses.replace(compiled["update"], fits=False, total_bytes=20 * 2**30)
    text = dry_run.table(plan, [fits, fails], 16 * 2**30)
    assert "| scoring | " in text and "| 20.00 | 125% |" in text
    assert "update does not fit: set model.compute_dtype bfloat16; or train adapters (lora.rank 16" in text
    assert "scoring does not fit" not in text


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "4x4", "v5e:4"])
def test_what_is_no_topology_is_refused(topology):
    with pytest.raises(InputError, match=r"dry_run: .* is no topology; give GENERATION:SIZES with one of v4, v5e, v5p, v6e"):
        dry_run.find_devices(topology)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_one_line_says_what_to_install():
    with pytest.raises(InputError, match=r"dry_run: 'v5e:2x2' cannot be compiled for .*requirements-dry-run.txt"):
        dry_run.find_devices("v5e:2x2")


def test_a_model_that_the_mesh_does_not_cut_is_refused(folder):
    with pytest.raises(InputError, match=r"mesh\.tensor: 4 does not divide the model's num_key_value_heads 2"):
        dry_run.make_plan(config_of(folder, mesh=MeshConfig(data=1, fsdp=2, tensor=4)), jax.devices())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_that_their_names_promise(name):
    a = PRESETS[name]
    heads, kv_heads = a.num_heads * a.head_size, a.num_kv_heads * a.head_size
    layer = a.width * (2 * heads + 2 * kv_heads + 3 * a.hidden) + 2 * a.width + a.qkv_bias * (heads + 2 * kv_heads)
    total = a.num_layers * layer + a.width + a.vocab_size * a.width * (1 if a.tied_head else 2)
    published = {
        "0.5B": 494_032_768,
        "1.5B": 1_543_714_304,
        "7B": 7_615_616_512,
        "1B": 1_235_814_400,
        "3B": 3_212_749_824,
        "8B": 8_030_261_248,
    }
    size = next(word for word in name.split("-") if word in published)
    assert total == published[size]
