"""Responses that do not depend on who they share a batch with, end where they should, and compile few programs."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from toys import toy_model, toy_params

from sso_jax.commands.flops import count_flops
from sso_jax.data.buckets import bucket
from sso_jax.models.transformer import abstract_params
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.mesh import param_shardings
from sso_jax.sampling.decode import build_generate, build_parts
from sso_jax.sampling.prefill import prefill, prepare_weights
from sso_jax.sampling.sampler import Request, Sampler, cut_batches, pad_prompts, row_key, shared_prefix
from sso_jax.sampling.sampling_params import make_sampling_params


def make_sampler(model, mesh, stop_ids=(), temperature=0.9, batch_size=4, max_new_tokens=24, max_tokens=128):
    generate = build_generate(model, mesh, param_shardings(abstract_params(model), mesh))
    return Sampler(
        generate, mesh, make_sampling_params(temperature, 0.95), stop_ids, max_new_tokens, max_tokens, batch_size
    )


def requests(count, seed=0):
    draw = np.random.default_rng(seed)
    return [
        Request(draw.integers(3, 96, 3 + 7 * (i % 6)).tolist(), row_key(0, 1, str(i), "chosen")) for i in range(count)
    ]


def test_a_response_does_not_depend_on_batch_order_or_company(one_device):
    model = toy_model()
    params = toy_params(model, one_device)
    asked = requests(11)
    together = make_sampler(model, one_device, batch_size=8).sample(params, asked, "test")
    backwards = make_sampler(model, one_device, batch_size=3).sample(params, asked[::-1], "test")[::-1]
    alone = make_sampler(model, one_device, batch_size=1).sample(params, asked[4:5], "test")
    assert together == backwards
    assert together[4] == alone[0]
    assert len({tuple(response) for response in together}) == 11


def test_eight_devices_give_the_tokens_of_one(one_device, eight_devices):
    model = toy_model()
    asked = requests(10)
    one = make_sampler(model, one_device, batch_size=8).sample(toy_params(model, one_device), asked, "test")
    eight = make_sampler(model, eight_devices, batch_size=8).sample(toy_params(model, eight_devices), asked, "test")
    assert one == eight


def test_other_roles_queries_iterations_and_seeds_have_other_keys():
    keys = {row_key(s, k, q, r) for s in (0, 1) for k in (1, 2) for q in ("a", "b") for r in ("chosen", "rejected")}
    assert len(keys) == 16
    assert row_key(0, 1, "a", "chosen") == row_key(0, 1, "a", "chosen")
    assert all(0 <= word < 2**32 for key in keys for word in key)


def test_a_response_ends_with_its_first_stop_token_and_holds_it(one_device):
    model = toy_model()
    params = toy_params(model, one_device)
    free = make_sampler(model, one_device).sample(params, requests(8), "test")
    stop = free[0][5]
    ended = make_sampler(model, one_device, stop_ids=(stop, 95)).sample(params, requests(8), "test")
    for before, after in zip(free, ended, strict=True):
        ends = [i for i, token in enumerate(before) if token in (stop, 95)]
        assert after == (before[: ends[0] + 1] if ends else before)
    assert len(ended[0]) <= 6


def test_no_end_of_turn_is_added_where_the_limit_cuts(one_device):
    model = toy_model()
    response = make_sampler(model, one_device, max_new_tokens=5).sample(
        toy_params(model, one_device), requests(1), "test"
    )[0]
    assert len(response) == 5


def test_prompt_plus_response_stays_within_max_tokens(one_device):
    model = toy_model()
    sampler = make_sampler(model, one_device, max_tokens=40)
    asked = requests(6)
    for request, response in zip(asked, sampler.sample(toy_params(model, one_device), asked, "test"), strict=True):
        assert len(response) == min(24, 40 - len(request.prompt_ids))


def test_a_prompt_without_room_is_refused_with_its_length(one_device):
    model = toy_model()
    sampler = make_sampler(model, one_device, max_tokens=20)
    with pytest.raises(InputError, match="a prompt of 20 tokens leaves no room for a response within 20"):
        sampler.sample(None, [Request([1] * 20, (0, 0))], "test")


def test_compilations_are_one_a_bucket_whatever_the_temperature(one_device):
    model = toy_model()
    params = toy_params(model, one_device)
    sampler = make_sampler(model, one_device)
    asked = requests(24)  # prompts of 3 to 38 tokens: buckets 32 and 48
    sampler.sample(params, asked, "test")
    assert sampler.generate._cache_size() == 2
    hotter = Sampler(sampler.generate, one_device, make_sampling_params(1.5, 0.5), (7,), 24, 128, 4)
    hotter.sample(params, requests(24, seed=9), "test")
    # stop tokens are an array: another number of them is another shape, nothing else compiles
    assert sampler.generate._cache_size() <= 4


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 32), (32, 32), (33, 48), (49, 64), (65, 96), (97, 128), (2049, 3072)]
)
def test_buckets_are_powers_of_two_and_the_halves_between(length, expected):
    assert bucket(length) == expected


def test_batches_hold_every_prompt_once_with_others_of_like_length():
    lengths = [9, 1, 5, 7, 3, 8, 2]
    batches = cut_batches(lengths, 3)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert [[lengths[i] for i in batch] for batch in batches] == [[1, 2, 3], [5, 7, 8], [9]]


def test_jit_and_no_jit_give_the_same_tokens(one_device):
    model = toy_model(num_layers=1)
    params = toy_params(model, one_device)
    sampler = make_sampler(model, one_device, batch_size=2, max_new_tokens=4)
    asked = requests(2)
    compiled = sampler.sample(params, asked, "test")
    with jax.disable_jit():
        assert sampler.sample(params, asked, "test") == compiled


def starting_alike(count, num_shared):
    """Requests whose prompts share a few-shot question's worth of tokens, and end apart."""
    shared = np.random.default_rng(7).integers(3, 96, num_shared).tolist()
    return [Request(shared + request.prompt_ids, request.key) for request in requests(count)]


@pytest.mark.parametrize(("num_shared", "expected"), [(0, 0), (63, 0), (64, 64), (130, 128)])
def test_what_prompts_start_with_is_shared_in_whole_steps(num_shared, expected):
    prompts = [request.prompt_ids for request in starting_alike(6, num_shared)]
    assert shared_prefix(prompts) == prompts[0][:expected]


def test_a_prefix_leaves_every_prompt_a_token_and_a_single_prompt_has_none():
    whole = list(range(64))
    assert shared_prefix([whole, [*whole, 5]]) == []  # nothing would be left of the first
    assert shared_prefix([[*whole, 5], [*whole, 5]]) == whole
    assert shared_prefix([[*whole, 5]]) == []


@pytest.mark.parametrize("devices", ["one_device", "eight_devices"])
def test_prompts_that_start_alike_are_answered_as_if_they_did_not(devices, request):
    model, mesh = toy_model(), request.getfixturevalue(devices)
    params, sampler = (
        toy_params(model, mesh),
        make_sampler(model, mesh, batch_size=8, max_new_tokens=12, max_tokens=256),
    )
    alike = starting_alike(9, 140)
    other = Request([5, 4, 3], row_key(0, 1, "other", "chosen"))
    assert shared_prefix([item.prompt_ids for item in [*alike, other]]) == []
    assert sampler.sample(params, alike, "test") == sampler.sample(params, [*alike, other], "test")[:-1]


def test_a_shared_prefix_is_run_once():
    model = toy_model()
    params, stops = abstract_params(model), np.array([7], np.int32)
    alike = starting_alike(8, 128)

    def operations(prefix):
        prompts = pad_prompts(alike, 8, bucket(max(len(item.prompt_ids) for item in alike) - len(prefix)), prefix)

        def run(params):
            return prefill(model, prepare_weights(model, params), prompts, make_sampling_params(0.9, 0.95), stops, 4)

        return count_flops(jax.make_jaxpr(run)(nn.unbox(params)))

    shared, apart = (operations(prefix) for prefix in (alike[0].prompt_ids[:128], []))
    # 128 tokens once and 48 of each prompt, against 192 of each prompt, all but the logits
    logits = 2.0 * 8 * model.architecture.embed_dim * model.architecture.vocab_size
    assert (shared - logits) / (apart - logits) == pytest.approx((128 + 8 * 48) / (8 * 192), rel=0.15)


def test_prefill_and_decode_compiled_apart_give_the_tokens_of_the_one_program(eight_devices):
    model = toy_model()
    params, shardings = toy_params(model, eight_devices), param_shardings(abstract_params(model), eight_devices)
    prompts = pad_prompts(requests(7), 8, 48)
    stops, strategy = np.array([7], np.int32), make_sampling_params(0.9, 0.95)
    start, go_on = build_parts(model, eight_devices, shardings)
    with jax.set_mesh(eight_devices):
        together = build_generate(model, eight_devices, shardings)(params, prompts, strategy, stops, 12)
        state = start(params, prompts, strategy, stops, 12)
        assert int(state.step) == 1 and np.all(state.samples.num_tokens == prompts.used)
        apart = go_on(params, prompts, strategy, stops, state)
    jax.tree.map(np.testing.assert_array_equal, apart, together)
