"""Choosing a token without a sort, against NumPy with one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sso_jax.sampling.sampling_params import (
    NUM_LOOKS,
    WAYS,
    _narrowed,
    make_sampling_params,
    sample_from_logits,
    top_k_mask,
    top_p_mask,
)


def sorted_nucleus(probs, top_p):
    """Ids of the fewest likeliest tokens with mass at least top_p, by sorting."""
    order = np.argsort(-probs, kind="stable")
    mass = np.cumsum(probs[order].astype(np.float64))
    count = int(np.argmax(mass >= top_p)) + 1 if (mass >= top_p).any() else len(probs)
    return set(order[:count].tolist())


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.95])
def test_nucleus_equals_the_sorted_one(top_p):
    logits = np.random.default_rng(3).normal(size=(64, 500)).astype(np.float32) * 3
    probs = np.asarray(jax.nn.softmax(logits, axis=-1))
    got = np.asarray(jax.jit(top_p_mask)(jnp.asarray(probs), jnp.float32(top_p)))
    for row, mask in zip(probs, got, strict=True):
        expected = sorted_nucleus(row, top_p)
        found = set(np.flatnonzero(mask).tolist())
        # a float32 sum may reach top_p one token earlier or later where the mass lands on it to the last bit
        assert found == expected or (len(found ^ expected) == 1 and abs(row[list(expected)].sum() - top_p) < 1e-6)


@pytest.mark.parametrize("ways", [2, WAYS])
def test_a_threshold_is_found_exactly_by_halves_and_by_several_at_a_look(ways):
    """The largest threshold that keeps a mass is the least probability kept, to the last bit; here by NumPy's sort."""
    probs = np.random.default_rng(5).dirichlet(np.full(300, 0.3), size=40).astype(np.float32)
    order = -np.sort(-probs, axis=-1)
    mass = np.cumsum(order, axis=-1)
    wanted = np.float32(0.6) * mass[:, -1]
    expected = np.take_along_axis(order, (mass >= wanted[:, None]).argmax(-1)[:, None], axis=-1)[:, 0]

    def holds(t):
        return jnp.sum(jnp.where(probs >= t[:, None], probs, 0.0), axis=-1) >= wanted

    bounds = tuple(
        jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.int32) for x in (np.zeros(40), np.ones(40))
    )
    for _ in range(31 if ways == 2 else NUM_LOOKS):
        bounds = jax.jit(partial(_narrowed, holds, ways))(bounds)
    np.testing.assert_array_equal(*bounds)
    close = np.abs(mass - wanted[:, None]).min(-1) < 1e-6  # where rounding may move the edge by a token
    found = np.asarray(jax.lax.bitcast_convert_type(bounds[0], jnp.float32))
    np.testing.assert_array_equal(found[~close], expected[~close])
    assert close.sum() < 5


def test_looks_are_enough_for_all_probabilities():
    """Each leaves an eighth of what bounds the threshold, rounded up: of fewer than 2^30 floats up to 1 one is left
    after ten.
    """
    most = 0x3F800001  # the float after 1, which a probability may be by rounding
    low, high = jnp.zeros(3, jnp.int32), jnp.full(3, most, jnp.int32)
    target = jnp.array([0, 12345678, most], jnp.int32)
    for _ in range(NUM_LOOKS):
        low, high = _narrowed(lambda t: jax.lax.bitcast_convert_type(t, jnp.int32) <= target, WAYS, (low, high))
    assert low.tolist() == high.tolist() == target.tolist()


def test_top_p_of_one_keeps_every_token():
    probs = jax.nn.softmax(jnp.array([[30.0, 0.0, -60.0]]), axis=-1)  # a float32 sum of the first is 1 already
    assert top_p_mask(probs, jnp.float32(1.0)).tolist() == [[True, True, True]]


def test_a_nucleus_of_nearly_everything_leaves_out_what_may_be_left_out_alone():
    probs = np.array([[0.5, 0.25, 0.2, 0.05 - 3e-6, 2e-6, 1e-6]], np.float32)
    masks = [
        np.asarray(top_p_mask(jnp.asarray(probs), jnp.float32(top_p)))[0].tolist() for top_p in (0.9, 0.9999, 0.999998)
    ]
    assert masks == [[True] * 3 + [False] * 3, [True] * 4 + [False] * 2, [True] * 5 + [False]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=8, max_size=8), st.floats(0.01, 0.99))
def test_nucleus_is_enough_and_no_token_of_it_could_be_spared(logits, top_p):
    probs = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))
    mask = np.asarray(top_p_mask(jnp.asarray(probs)[None], jnp.float32(top_p)))[0]
    assert probs[mask].sum() >= top_p - 1e-5
    least = probs[mask].min()
    assert probs[mask & (probs > least)].sum() < top_p + 1e-5
    assert not mask[probs < least].any()


def test_tokens_tied_at_the_edge_are_all_in():
    mask = top_p_mask(jnp.array([[0.4, 0.2, 0.2, 0.2]]), jnp.float32(0.5))
    assert mask.tolist() == [[True, True, True, True]]


def test_shortlist_holds_the_k_likeliest():
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), (5, 40)), axis=-1)
    mask = np.asarray(top_k_mask(probs, jnp.int32(7)))
    for row, kept in zip(np.asarray(probs), mask, strict=True):
        assert set(np.flatnonzero(kept)) == set(np.argsort(-row)[:7])


def test_temperature_zero_is_the_likeliest_token():
    logits = jax.random.normal(jax.random.key(1), (6, 30))
    chosen = sample_from_logits(logits, jnp.full((6,), 0.99), make_sampling_params(0.0, 0.8))
    np.testing.assert_array_equal(chosen, np.argmax(np.asarray(logits), axis=-1))


def test_draws_have_the_probabilities_of_the_renormalised_nucleus():
    logits = jnp.array([2.0, 1.0, 0.0, -1.0, -4.0])
    temperature, top_p, num = 0.7, 0.9, 40_000
    probs = np.exp(np.array([2.0, 1.0, 0.0, -1.0, -4.0]) / temperature)
    probs /= probs.sum()
    kept = sorted_nucleus(probs, top_p)
    expected = np.array([p if i in kept else 0.0 for i, p in enumerate(probs)])
    expected /= expected.sum()
    uniform = (jnp.arange(num) + 0.5) / num  # an even grid in place of random numbers: counts are exact to one
    chosen = sample_from_logits(jnp.broadcast_to(logits, (num, 5)), uniform, make_sampling_params(temperature, top_p))
    np.testing.assert_allclose(np.bincount(np.asarray(chosen), minlength=5) / num, expected, atol=2 / num * 5)


@pytest.mark.parametrize("vocab_size", [100, 128, 1000])
def test_the_token_drawn_is_that_of_the_running_sum_by_numpy(vocab_size):
    num = 500
    logits = np.random.default_rng(5).normal(size=vocab_size).astype(np.float32) * 2
    probs = np.exp(logits.astype(np.float64))
    below = np.cumsum(probs / probs.sum())
    uniform = np.random.default_rng(6).random(num).astype(np.float32)
    got = np.asarray(
        sample_from_logits(
            jnp.broadcast_to(jnp.asarray(logits), (num, vocab_size)),
            jnp.asarray(uniform),
            make_sampling_params(1.0, 1.0),
        )
    )
    near = (
        np.abs(below[None, :] - uniform[:, None].astype(np.float64)).min(axis=1) < 1e-6
    )  # float32 may fall on either side there
    assert near.mean() < 0.05 and len(set(got)) > 50
    np.testing.assert_array_equal(got[~near], np.searchsorted(below, uniform[~near], side="right"))


def test_a_token_of_the_vocabulary_is_drawn_of_logits_that_are_not_numbers():
    assert (
        0
        <= int(sample_from_logits(jnp.full((1, 130), jnp.nan), jnp.array([0.5]), make_sampling_params(1.0, 0.9))[0])
        < 130
    )


def test_a_dropped_token_is_never_drawn_even_at_the_ends():
    logits = jnp.array([[-9.0, 3.0, -9.0, 2.9, -9.0]] * 2)
    chosen = sample_from_logits(
        logits, jnp.array([0.0, np.nextafter(1.0, 0.0, dtype=np.float32)]), make_sampling_params(1.0, 0.9)
    )
    assert chosen.tolist() == [1, 3]


def test_new_temperatures_and_masses_compile_nothing_anew():
    compiled = jax.jit(sample_from_logits)
    logits, uniform = jnp.zeros((2, 8)), jnp.zeros((2,))
    for temperature, top_p in ((0.0, 1.0), (0.7, 0.8), (1.3, 0.1)):
        compiled(logits, uniform, make_sampling_params(temperature, top_p))
    assert compiled._cache_size() == 1
