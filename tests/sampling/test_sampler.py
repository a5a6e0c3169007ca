"""Responses that depend on their request alone, end where they should, and compile few programs."""

import dataclasses

import jax
import numpy as np
import pytest
from toys import FAMILIES, share_of_clear_tokens, toy_model, toy_params

from sso_jax.data.buckets import bucket
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.mesh import make_mesh
from sso_jax.sampling.decode import build_programs
from sso_jax.sampling.sampler import Request, Sampler, row_key
from sso_jax.sampling.sampling_params import make_sampling_params
from sso_jax.sampling.slots import WINDOW, PoolShape

MODEL = toy_model(max_positions=512)


def make_sampler(mesh, model=MODEL, temperature=0.9, **changes):
    settings = {"stop_ids": (), "max_new_tokens": 24, "max_tokens": 128, "num_slots": 4, **changes}
    return Sampler(build_programs(model, mesh), mesh, make_sampling_params(temperature, 0.95), **settings)


def requests(count, seed=0, step=7):
    draw = np.random.default_rng(seed)
    return [
        Request(draw.integers(3, 96, 3 + step * (i % 6)).tolist(), row_key(0, 1, str(i), "chosen"))
        for i in range(count)
    ]


def sample(sampler, params, asked):
    return sampler.sample(params, asked, "test").responses


RAGGED = dict(stop_ids=(7, 11), max_new_tokens=150, max_tokens=512)
"""Responses of 2 to 150 tokens, which end anywhere in a window, and some of which fill more than one page."""


@pytest.mark.parametrize("layers", ["scanned", "unrolled"])
def test_a_response_does_not_depend_on_order_slot_or_company(one_device, layers):
    params, asked = toy_params(MODEL, one_device), requests(11, step=23)
    sampler = make_sampler(one_device, layers=layers, **RAGGED)
    together = sample(sampler, params, asked)
    assert sample(sampler, params, asked[::-1])[::-1] == together
    assert sample(sampler, params, asked[4:5]) == together[4:5]
    assert len({tuple(response) for response in together}) == 11
    assert min(map(len, together)) < WINDOW < 128 < max(map(len, together))


def test_bits_of_a_row_do_not_depend_on_the_others(one_device):
    """Values in the cache after two windows, alone and among others: nothing of another row enters a sum."""
    params, asked = toy_params(MODEL, one_device), requests(6, step=23)
    programs = build_programs(MODEL, one_device)
    lengths = [len(response) for response in sample(make_sampler(one_device, **RAGGED), params, asked)]
    one = next(i for i, length in enumerate(lengths) if length > 3 * WINDOW)
    seen = {}

    def run(own):
        caches = []

        def window(weights, state, *rest):
            state, drawn = programs.window(weights, state, *rest)
            caches.append((jax.device_get(state.cache.values), rest[0]))
            return state, drawn

        sampler = make_sampler(one_device, **RAGGED)
        sampler = dataclasses.replace(sampler, programs=programs._replace(window=window))
        responses = sample(sampler, params, own)
        return responses, caches

    for own in (asked[one : one + 1], [asked[one], *asked[one + 1 :], *asked[:one]]):
        responses, caches = run(own)
        size = len(asked[one].prompt_ids)  # no other prompt has as many tokens
        values, inputs, slot = next(
            (values, inputs, slot)
            for values, inputs in caches
            for slot in range(4)
            if inputs.live[slot] and inputs.prompt_tokens[slot] == size and inputs.counts[slot] == 1 + 2 * WINDOW
        )
        page = inputs.table.pages[slot][0]
        seen.setdefault("pages", []).append(values[:, page][..., np.flatnonzero(inputs.table.positions[page] >= 0), :])
        seen.setdefault("responses", []).append(responses[0])
    assert seen["responses"][0] == seen["responses"][1]
    np.testing.assert_array_equal(*seen["pages"])


CACHED = {"untied": {}, "heads": dict(tied_head=True, num_kv_heads=4), **FAMILIES}


@pytest.mark.parametrize(
    ("family", "scanned"),
    [
        *((name, "unrolled") for name in CACHED),
        *((name, "scanned") for name in ("untied", "gemma2", "gemma3", "qwen3_moe")),
    ],
)
def test_decoding_with_the_cache_equals_the_full_forward_pass(one_device, family, scanned):
    """Greedy responses over several windows and pages: each token is the likeliest one of the whole sequence."""
    model = toy_model(max_positions=512, **CACHED[family])
    params = toy_params(model, one_device)
    sampler = make_sampler(one_device, model, 0.0, max_new_tokens=140, max_tokens=512, layers=scanned)
    asked = requests(5, step=31)
    for request, response in zip(asked, sample(sampler, params, asked), strict=True):
        assert len(response) == 140 and share_of_clear_tokens(model, params, request.prompt_ids, response) > 0.95


@pytest.mark.parametrize("changes", [{}, FAMILIES["gemma2"], FAMILIES["gemma3"]], ids=["qwen2", "gemma2", "gemma3"])
def test_eight_devices_give_the_tokens_of_one(one_device, eight_devices, changes):
    asked, model = requests(13, step=23), toy_model(max_positions=512, **changes)
    one, eight = (
        sample(make_sampler(mesh, model, num_slots=8, **RAGGED), toy_params(model, mesh), asked)
        for mesh in (one_device, eight_devices)
    )
    assert one == eight


@pytest.mark.parametrize("sizes", [(1, 2, 1, 4), (1, 2, 2, 2), (1, 8, 1, 1)], ids=["expert_4", "all_axes", "fsdp_8"])
@pytest.mark.parametrize("layers", ["scanned", "unrolled"])
def test_experts_on_eight_devices_give_the_tokens_of_one(one_device, sizes, layers):
    model, asked = toy_model(**FAMILIES["qwen3_moe"]), requests(9)
    data, fsdp, tensor, expert = sizes
    one, eight = (
        sample(make_sampler(mesh, model, layers=layers, num_slots=8), toy_params(model, mesh), asked)
        for mesh in (one_device, make_mesh(data, fsdp, tensor, expert=expert))
    )
    assert one == eight and len({tuple(response) for response in one}) == 9


def test_a_response_of_experts_does_not_depend_on_order_slot_or_company(one_device):
    """Rows are sorted by expert: which others are among them changes where a row is, and not what it becomes."""
    model = toy_model(max_positions=512, **FAMILIES["qwen3_moe"])
    params, asked = toy_params(model, one_device), requests(11, step=23)
    sampler = make_sampler(one_device, model, **RAGGED)
    together = sample(sampler, params, asked)
    assert sample(sampler, params, asked[::-1])[::-1] == together
    assert sample(sampler, params, asked[4:5]) == together[4:5]
    assert len({tuple(response) for response in together}) == 11


def test_other_roles_queries_iterations_and_seeds_have_other_keys():
    keys = {row_key(s, k, q, r) for s in (0, 1) for k in (1, 2) for q in ("a", "b") for r in ("chosen", "rejected")}
    assert len(keys) == 16
    assert row_key(0, 1, "a", "chosen") == row_key(0, 1, "a", "chosen")
    assert all(0 <= word < 2**32 for key in keys for word in key)


def test_a_response_ends_with_its_first_stop_token_and_holds_it(one_device):
    params = toy_params(MODEL, one_device)
    free = sample(make_sampler(one_device), params, requests(8))
    stop = free[0][5]
    ended = sample(make_sampler(one_device, stop_ids=(stop, 95)), params, requests(8))
    for before, after in zip(free, ended, strict=True):
        ends = [i for i, token in enumerate(before) if token in (stop, 95)]
        assert after == (before[: ends[0] + 1] if ends else before)
    assert len(ended[0]) <= 6


@pytest.mark.parametrize("limit", [1, 2, WINDOW, WINDOW + 1, WINDOW + 2])
def test_no_end_of_turn_is_added_where_the_limit_cuts(one_device, limit):
    got = make_sampler(one_device, max_new_tokens=limit).sample(toy_params(MODEL, one_device), requests(6), "test")
    assert [len(response) for response in got.responses] == [limit] * 6
    assert got.stats.num_tokens == 6 * limit and got.stats.row_steps_used == 6 * (limit - 1)


def test_prompt_plus_response_stays_within_max_tokens(one_device):
    sampler, asked = make_sampler(one_device, max_tokens=40), requests(6)
    for request, response in zip(asked, sample(sampler, toy_params(MODEL, one_device), asked), strict=True):
        assert len(response) == min(24, 40 - len(request.prompt_ids))


def test_a_prompt_without_room_is_refused_with_its_length(one_device):
    sampler = make_sampler(one_device, max_tokens=20)
    with pytest.raises(InputError, match="a prompt of 20 tokens leaves no room for a response within 20"):
        sampler.sample(None, [Request([1] * 20, (0, 0))], "test")


def test_no_requests_have_no_responses(one_device):
    got = make_sampler(one_device).sample(toy_params(MODEL, one_device), [], "test")
    assert got.responses == [] and got.stats.share_used is None


def test_compilations_are_one_window_and_one_prefill_a_bucket(one_device):
    params, sampler = toy_params(MODEL, one_device), make_sampler(one_device, layers="scanned")
    sample(sampler, params, requests(24))  # prompts of 3 to 38 tokens: buckets 32 and 48
    assert sampler.programs.window._cache_size() == 1 and sampler.programs.admit._cache_size() == 2
    hotter = dataclasses.replace(sampler, strategy=make_sampling_params(1.5, 0.5), num_slots=4)
    sample(hotter, params, requests(17, seed=9))
    assert sampler.programs.window._cache_size() == 1 and sampler.programs.admit._cache_size() == 2


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 32), (32, 32), (33, 48), (49, 64), (65, 96), (97, 128), (2049, 3072)]
)
def test_buckets_are_powers_of_two_and_the_halves_between(length, expected):
    assert bucket(length) == expected


def test_jit_and_no_jit_give_the_same_tokens(one_device, monkeypatch):
    for module in ("slots", "decode", "stage"):
        monkeypatch.setattr(f"sso_jax.sampling.{module}.WINDOW", 2)  # without jit each step takes seconds
    model = toy_model(num_layers=1)
    params = toy_params(model, one_device)
    sampler = make_sampler(one_device, model, num_slots=2, max_new_tokens=3)
    asked = requests(2)
    compiled = sample(sampler, params, asked)
    with jax.disable_jit():
        assert sample(sampler, params, asked) == compiled


def test_responses_are_those_of_a_full_cache_where_rows_start_again(one_device, monkeypatch):
    """A cache of a few pages, in which the youngest rows are put back again and again."""
    params, asked = toy_params(MODEL, one_device), requests(9, step=23)
    sampler = make_sampler(one_device, **RAGGED)
    expected = sample(sampler, params, asked)
    shapes = []

    def few_pages(sizes, num_slots, num_shards, page_size):
        shapes.append(PoolShape(num_slots, 9, 8, num_shards, page_size))
        return shapes[-1]

    monkeypatch.setattr("sso_jax.sampling.sampler.pool_shape", few_pages)
    got = sampler.sample(params, asked, "test")
    assert got.responses == expected and shapes
    assert got.stats.num_tokens >= sum(map(len, expected))


def test_with_too_little_memory_half_of_the_slots_are_tried_and_finished_responses_kept(one_device, caplog):
    params, asked = toy_params(MODEL, one_device), requests(9)
    programs = build_programs(MODEL, one_device)
    slots, admitted = [], []

    def window(weights, state, *rest):
        slots.append(state.last.shape[0])
        if state.last.shape[0] > 2 and len(slots) > 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return programs.window(weights, state, *rest)

    def admit(weights, state, prompts, *rest):
        admitted.append(int(np.sum(prompts.slots < state.last.shape[0])))
        return programs.admit(weights, state, prompts, *rest)

    sampler = make_sampler(one_device)
    expected = sample(sampler, params, asked)
    tight = dataclasses.replace(sampler, programs=programs._replace(window=window, admit=admit))
    assert sample(tight, params, asked) == expected
    assert slots[:4] == [4] * 4 and set(slots[4:]) == {2}
    assert "too little memory for 4 slots; trying half of them" in caplog.text
    assert sum(admitted) < 2 * len(asked)
