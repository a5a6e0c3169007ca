"""The dry run on the devices that are here: bytes by arithmetic, the programs of each recipe, and what it refuses."""

import dataclasses
import importlib.util
import json

import jax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from toys import ARCHITECTURE

from sso_jax.commands import dry_run, programs
from sso_jax.commands.between_slices import between_slices
from sso_jax.config import (
    Config,
    GeneratorConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    SamplingConfig,
    TrainConfig,
)
from sso_jax.models.hf_config import to_hf_config
from sso_jax.models.presets import PRESETS
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.runtime.errors import InputError


def config_of(path, **sections) -> Config:
    sections = {
        "mesh": MeshConfig(data=2, fsdp=2, tensor=2),
        "sampling": SamplingConfig(batch_size=8, max_new_tokens=8),
        "objective": ObjectiveConfig(base="dpo"),
        "train": TrainConfig(batch_size=8, tokens_per_step=1408, max_tokens=64),
        **sections,
    }
    return Config(model=ModelConfig(path=str(path)), dry_run="v5e:2x4", **sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with config.json alone: the dry run needs no weights."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(to_hf_config(ARCHITECTURE, "float32", 1, 2)))
    return folder


def plan_of(folder, **sections):
    return programs.make_plan(config_of(folder, **sections), jax.devices(), 16 * programs.GIB)


def compile_all(plan):
    return {
        name: programs.compiled(trace(plan), name, plan.device_bytes)
        for name, trace in programs.programs_of(plan.config).items()
    }


@pytest.fixture(scope="module")
def online(folder):
    """The plan of recipe online without y_o's log-prob, and its programs."""
    plan = plan_of(folder, train=TrainConfig(batch_size=8, tokens_per_step=1408, max_tokens=64, log_original=False))
    return plan, compile_all(plan)


def test_bytes_of_parameters_and_optimizer_are_those_of_their_shapes(online):
    plan, compiled = online
    flat = flatten_dict(plan.params, sep="/")
    cut = {
        "norm": 1,
        "kernel": 4,
        "embedding": 4,
        "head": 4,
    }  # parts of the mesh that cut a matrix: 2 over width, 2 over the other axis
    biases = {"query/bias": 2, "key/bias": 2, "value/bias": 2}
    expected = 0
    for path, leaf in flat.items():
        parts = next((n for end, n in biases.items() if path.endswith(end)), cut.get(path.rsplit("/", 1)[-1], 1))
        expected += leaf.size * 4 // parts
    assert {program.params_bytes for program in compiled.values()} == {expected}
    assert compiled["update"].optimizer_bytes == pytest.approx(2 * expected, abs=64)  # two moments, and counters
    assert compiled["scoring"].optimizer_bytes == 0


def test_the_update_of_a_reward_model_has_no_vocabulary(online):
    """No head and one row in its place: less arithmetic than the policy's update, and fewer bytes of optimizer."""
    plan = dataclasses.replace(online[0], config=dataclasses.replace(online[0].config, recipe="reward"))
    program, of_policy = programs.programs_of(plan.config)["update"](plan), online[1]["update"]
    assert program.optimizer_bytes < of_policy.optimizer_bytes and 0 < program.flops < of_policy.flops


def test_the_cache_holds_keys_and_values_of_all_slots(online):
    plan, compiled = online
    a, num_pages = plan.model.architecture, 4 * 4  # a page for each of two rows, but at least four on each of 4 shards
    whole = 2 * a.num_layers * num_pages * a.num_kv_heads * 64 * a.head_size * 4
    assert compiled["prefill"].cache_bytes == compiled["decode"].cache_bytes == whole // 8


def test_a_mesh_of_its_own_to_sample_on_holds_a_second_copy_of_the_parameters(folder, online):
    plan = plan_of(
        folder, sampling=SamplingConfig(batch_size=8, max_new_tokens=8, mesh=MeshConfig(data=8, fsdp=1, tensor=1))
    )
    traced, shared = programs.trace_prefill(plan), online[1]["prefill"]
    program = programs.compiled(traced, "prefill", plan.device_bytes)
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(plan.params))
    assert program.params_bytes == whole + shared.params_bytes and program.total_bytes >= program.params_bytes
    assert program.cache_bytes == 2 * shared.cache_bytes  # as many pages on each device, with both heads
    assert program.flops == shared.flops
    assert program.fits and not (tight := programs.compiled(traced, "prefill", device_bytes=whole)).fits
    assert "prefill does not fit: set sampling.mesh null, which needs no second copy" in dry_run.table(plan, [tight])


def test_prefill_runs_the_prompts_and_decode_a_window_of_tokens(online):
    """Counted by hand: matrices for each token, attention of prompts to themselves, of steps to 16 pages of 64 slots
    and to the 16 slots of the window, the head once a row and token drawn.
    """
    plan, compiled = online
    a, rows, slots, pages, window = plan.model.architecture, 8, 32, 16, 16
    attention = a.embed_dim * a.head_size * (2 * a.num_heads + 2 * a.num_kv_heads)
    layer = attention + 3 * a.embed_dim * a.mlp_dim

    def seen(tokens):
        return 2 * a.num_heads * a.head_size * tokens

    head = a.embed_dim * a.vocab_size
    prefill = 2 * rows * (slots * a.num_layers * (layer + seen(slots)) + head)
    step = 2 * (rows * (a.num_layers * (layer + seen(window)) + head) + a.num_layers * seen(pages * 64))
    assert compiled["prefill"].flops == prefill
    assert compiled["decode"].flops == window * step


def test_operations_of_scoring_and_of_the_update_are_the_hand_count(online):
    """A device step of 4 examples is 12 trees of 16 + 48 + 48 tokens, in 4 rows of 352 with 320 places for targets.

    Queries go 64 at a time with the keys up to their block's end. The update computes all layers again in its backward
    pass, but for what their last projection gives: with two products backward that is four of each; of attention's, two
    forward, two again, and five backward.
    """
    plan, compiled = online
    a, rows, tokens, targets, num_steps = plan.model.architecture, 4, 352, 320, 2
    layer = a.embed_dim * a.head_size * (2 * a.num_heads + 2 * a.num_kv_heads) + 3 * a.embed_dim * a.mlp_dim
    down, head = a.embed_dim * a.mlp_dim, a.embed_dim * a.vocab_size
    attended = 2 * a.num_heads * a.head_size  # multiply-adds for each pair of tokens: scores, values
    pairs = 64 * (64 + 128 + 192 + 256 + 320) + 32 * 352
    forward = a.num_layers * (tokens * layer + pairs * attended) + targets * head
    assert compiled["scoring"].flops == 2 * rows * forward
    of_layers = a.num_layers * (tokens * (4 * layer - down) + 9 * pairs * attended // 2)
    assert compiled["update"].flops == num_steps * 2 * rows * (of_layers + 3 * targets * head)


def test_the_log_prob_of_the_original_response_is_in_the_update_where_it_is_logged(folder, online):
    plan = plan_of(folder)
    assert plan.config.train.log_original and not online[0].config.train.log_original
    original = ("plain", "original")
    assert (
        original in programs._objective(plan.config).cells
        and original not in programs._objective(online[0].config).cells
    )
    # not more operations of necessity: longer trees may leave less of a row empty
    assert programs.trace_policy_update(plan).flops != online[1]["update"].flops


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("online", ["prefill", "decode", "scoring", "update"]),
        ("generator", ["prefill", "decode", "scoring", "update of the generator", "update"]),
        ("offline", ["scoring", "update"]),
        ("sft", ["update"]),
        ("reward", ["prefill", "decode", "update"]),
    ],
)
def test_the_programs_are_those_that_the_recipe_runs(folder, recipe, names):
    assert list(programs.programs_of(dataclasses.replace(config_of(folder), recipe=recipe))) == names


def test_a_generator_is_trained_by_the_fields_of_its_own_section(folder):
    config = config_of(
        folder, objective=ObjectiveConfig(base="dpo", form="generator"), generator=GeneratorConfig(batch_size=16)
    )
    plan = dataclasses.replace(plan_of(folder), config=dataclasses.replace(config, recipe="generator"))
    plan = dataclasses.replace(
        plan, step_limits=plan.step_limits._replace(tokens=896)
    )  # 8 trees of 112, so that no row has padding
    of_generator = programs.trace_generator_update(plan)
    of_policy = programs.trace_policy_update(plan)
    assert of_generator.flops == pytest.approx(4 * of_policy.flops, rel=0.05)  # twice the examples, two pairs of each


def test_the_degree_head_of_spo_is_in_the_update(folder, online):
    plan = plan_of(folder, objective=ObjectiveConfig(base="spo"), train=online[0].config.train)
    program, without = programs.trace_policy_update(plan), online[1]["update"]
    width = plan.model.architecture.embed_dim
    assert program.params_bytes - without.params_bytes == 4 * (width * width + width + 4 * width + 4)
    assert program.flops > without.flops


def test_the_table_names_what_does_not_fit_and_says_what_to_do(online):
    plan, compiled = online
    fits, fails = compiled["scoring"], dataclasses.replace(compiled["update"], fits=False, total_bytes=20 * 2**30)
    text = dry_run.table(plan, [fits, fails])
    assert "| scoring | " in text and "| 20.00 | 125% |" in text
    assert "update does not fit: lower train.tokens_per_step (now 1408); or set model.compute_dtype bfloat16" in text
    assert "; or train adapters (lora.rank 16" in text
    assert "scoring does not fit" not in text


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "4x4", "v5e:4"])
def test_what_is_no_topology_is_refused(topology):
    with pytest.raises(
        InputError, match=r"dry_run: .* is not a topology; give GENERATION:SIZES with one of v4, v5e, v5p, v6e"
    ):
        dry_run.find_devices(topology)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_one_line_says_what_to_install():
    with pytest.raises(InputError, match=r"dry_run: cannot compile for 'v5e:2x2' .*requirements-dry-run.txt"):
        dry_run.find_devices("v5e:2x2")


SENDS = """HloModule jit_update, is_scheduled=true

%layers (p: (f32[2])) -> (f32[2]) {
  %send.1 = (bf16[8,128]{1,0:T(8,128)}, u32[], token[]) send(%a), is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
}

%steps (p: (f32[2])) -> (f32[2]) {
  %all-reduce.1 = f32[896,2304]{1,0} all-reduce(%input), channel_id=8, replica_groups={{0,1,2,3}}
  %while.1 = (f32[2]) while(%p), condition=%c1, body=%layers, metadata={op_name="while"}
  %send.2 = (bf16[3,5]{1,0}, u32[], token[]) send(%b), frontend_attributes={_xla_megascale_transfer_type="ALL_GATHER"}
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %while.2 = (f32[2]) while(%p), condition=%c2, body=%steps
  %send.3 = (f32[], u32[], token[]) send(%c), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""


def test_what_crosses_slices_is_counted_by_kind_and_by_the_loops_around_it(online):
    transfers = between_slices(SENDS)
    assert transfers == [("ALL_GATHER", 1, 1, 30), ("ALL_REDUCE", 0, 1, 4), ("ALL_REDUCE", 2, 1, 2048)]
    plan, compiled = online
    assert all(program.transfers is None for program in compiled.values())
    config = dataclasses.replace(plan.config, mesh=dataclasses.replace(plan.config.mesh, slices=2))
    update = dataclasses.replace(compiled["update"], transfers=transfers)
    programs = [dataclasses.replace(compiled["scoring"], transfers=[]), compiled["prefill"], update]
    text = dry_run.table(dataclasses.replace(plan, config=config), programs)
    assert "on 2 slices of v5e:2x4" in text and "between slices, scoring: nothing" in text
    assert "between slices, prefill: unknown, because XLA cannot print the program" in text
    assert "between slices, update: 1 ALL_GATHER of 30 bytes a chip in each pass of a loop; 1 ALL_REDUCE" in text


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("slices", [2, 4])
def test_gradients_and_the_gathered_rows_of_the_embedding_cross_slices_and_no_weights_do(folder, slices):
    devices = dry_run.find_devices("v5e:2x2", slices)
    plan = programs.make_plan(config_of(folder, mesh=MeshConfig(slices, -1, 1, slices=slices)), devices, 2**34)
    scoring = programs.compiled(programs.trace_scoring(plan), "scoring", plan.device_bytes)
    update = programs.compiled(programs.trace_policy_update(plan), "update", plan.device_bytes)
    share = sum(leaf.size for leaf in jax.tree.leaves(plan.params)) // 4  # a chip's shard of the weights
    layers = {0: 1, 1: 1, 2: plan.model.architecture.num_layers}
    assert sum(layers[t.depth] * t.num_bytes for t in scoring.transfers) < share
    reduced = sum(layers[t.depth] * t.num_bytes for t in update.transfers if t.kind == "ALL_REDUCE")
    assert share < reduced < 4 * 4 * share  # in bfloat16 or float32, in whole tiles; the embedding's twice


def test_a_model_that_the_mesh_does_not_cut_is_refused(folder):
    with pytest.raises(InputError, match=r"mesh\.tensor: 4 does not divide the model's num_key_value_heads 2"):
        plan_of(folder, mesh=MeshConfig(data=1, fsdp=2, tensor=4))


PUBLISHED = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2-7B": 7_615_616_512,
    "Qwen2.5-7B": 7_615_616_512,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-30B-A3B": 30_532_122_624,
    "gemma-3-1b": 999_885_952,
    "gemma-3-27b": 27_009_346_304,
    "Olmo-3-7B": 7_298_011_136,
}
"""Numbers of parameters of published weights; of a model with images those of its text model."""


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_of_the_published_weights(name):
    params = nn.unbox(abstract_params(Transformer(PRESETS[name])))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == next(n for own, n in PUBLISHED.items() if own in name)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.25G of 15.75G hbm. Exceeded hbm "
            "capacity by 1.50G.",
            17.25,
        ),
        (
            "E1000: CompileTimeHbmOom: the total memory required for HLO temporaries (16.50G) exceeds available HBM "
            "(15.75G).",
            18.5,
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_what_a_program_that_does_not_fit_needs_is_read_from_the_compilers_words(message, gib):
    assert programs.needed_bytes(message, 2 * programs.GIB) == (None if gib is None else gib * programs.GIB)
