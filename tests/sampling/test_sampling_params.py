"""Choosing a token without a sort, against NumPy with one."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sso_jax.sampling.sampling_params import (
    draw_from_nucleus,
    make_sampling_params,
    sample_from_logits,
    top_k_mask,
)


def sorted_nucleus(probs, top_p):
    """Ids of the fewest likeliest tokens with mass at least top_p, by sorting."""
    order = np.argsort(-probs, kind="stable")
    mass = np.cumsum(probs[order].astype(np.float64))
    count = int(np.argmax(mass >= top_p)) + 1 if (mass >= top_p).any() else len(probs)
    return set(order[:count].tolist())


def draw(probs, num, top_p, seed=0):
    """Tokens of `num` rows with the same probabilities, by independent uniform numbers."""
    mass = jnp.broadcast_to(jnp.asarray(probs, jnp.float32), (num, len(probs)))
    key = jax.random.key(seed)

    def uniform_of(attempt):
        return jax.random.uniform(jax.random.fold_in(key, attempt), (num,))

    return np.asarray(jax.jit(lambda mass, top_p: draw_from_nucleus(mass, uniform_of, top_p))(mass, top_p))


def keys_of(num, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2**32, (num, 2), dtype=np.uint32))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.95])
def test_all_tokens_of_the_sorted_nucleus_are_drawn_and_no_others(top_p):
    for row in range(4):
        logits = np.random.default_rng(row).normal(size=60).astype(np.float32) * 2
        probs = np.asarray(jax.nn.softmax(logits))
        expected = sorted_nucleus(probs, top_p)
        found = set(draw(probs, 20_000, top_p).tolist())
        least = min(probs[list(expected)]) / sum(probs[list(expected)])
        assert found <= expected and (found == expected or least < 5e-4)


def test_draws_have_the_probabilities_of_the_renormalised_nucleus():
    """Chi-squared of 40,000 draws over k tokens has mean k - 1 and standard deviation sqrt(2 (k - 1))."""
    num = 40_000
    for vocab_size, top_p in ((5, 0.9), (300, 0.7), (300, 0.2)):
        probs = np.random.default_rng(vocab_size).dirichlet(np.full(vocab_size, 0.5))
        kept = sorted(sorted_nucleus(probs, top_p))
        expected = num * probs[kept] / probs[kept].sum()
        counts = Counter(draw(probs, num, top_p).tolist())
        chi = sum((counts[token] - mean) ** 2 / mean for token, mean in zip(kept, expected, strict=True))
        degrees = len(kept) - 1
        assert set(counts) <= set(kept) and chi < degrees + 4 * np.sqrt(2 * max(1, degrees))


def test_a_draw_takes_few_passes_over_the_vocabulary():
    """An attempt is a pass; from a nucleus of 0.9 few rows of 64 need a third, and none needs many for a small one."""
    probs = np.random.default_rng(1).dirichlet(np.full(2000, 0.05), size=64).astype(np.float32)
    for top_p, most in ((0.9, 4), (0.5, 8), (0.02, 14)):
        passes = []

        def uniform_of(attempt, passes=passes):
            passes.append(int(attempt))
            return jax.random.uniform(jax.random.fold_in(jax.random.key(3), attempt), (64,))

        with jax.disable_jit():
            draw_from_nucleus(jnp.asarray(probs), uniform_of, jnp.float32(top_p))
        assert len(passes) <= most, (top_p, passes)


def test_a_row_s_token_depends_on_its_logits_key_and_count_alone():
    """Rows of a batch need different numbers of attempts."""
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(40, 500)).astype(np.float32) * 2)
    keys, counts, strategy = keys_of(40), jnp.arange(40), make_sampling_params(0.8, 0.6)
    together = sample_from_logits(logits, keys, counts, strategy)
    alone = [sample_from_logits(logits[i : i + 1], keys[i : i + 1], counts[i : i + 1], strategy)[0] for i in range(40)]
    assert together.tolist() == [int(token) for token in alone]
    other = sample_from_logits(logits, keys, counts + 1, strategy)
    assert np.mean(np.asarray(other) != np.asarray(together)) > 0.5


def test_top_p_of_one_keeps_every_token():
    probs = [0.5, 0.3, 0.0, 1e-6]
    mass = jnp.asarray([probs] * 2, jnp.float32)
    ends = jnp.asarray([0.0, np.nextafter(1.0, 0.0, dtype=np.float32)])
    assert draw_from_nucleus(mass, lambda _: ends, jnp.float32(1.0)).tolist() == [0, 3]


def test_a_nucleus_of_nearly_everything_leaves_out_what_may_be_left_out_alone():
    probs = np.array([0.5, 0.25, 0.2, 0.05 - 3e-6, 2e-6, 1e-6], np.float32)
    last = jnp.full((1,), np.nextafter(1.0, 0.0, dtype=np.float32))  # always asks for the last token that is left
    for top_p, expected in ((0.9, 2), (0.9999, 3), (0.999998, 4)):
        # floors rise to the mass of each rejected token, so that the last token left is the least likely one kept
        assert int(draw_from_nucleus(jnp.asarray(probs)[None], lambda _: last, jnp.float32(top_p))[0]) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=8, max_size=8), st.floats(0.01, 0.99), st.floats(0, 0.999999))
def test_a_drawn_token_is_one_that_could_not_be_spared(logits, top_p, uniform):
    probs = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))
    number = jnp.full((1,), uniform, jnp.float32)
    token = int(draw_from_nucleus(jnp.asarray(probs)[None], lambda _: number, jnp.float32(top_p))[0])
    assert probs[token] > 0 and probs[probs > probs[token]].sum() < top_p + 1e-5


def test_tokens_tied_at_the_edge_are_all_in():
    assert set(draw([0.4, 0.2, 0.2, 0.2], 500, 0.5).tolist()) == {0, 1, 2, 3}


def test_shortlist_holds_the_k_likeliest():
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), (5, 40)), axis=-1)
    mask = np.asarray(top_k_mask(probs, jnp.int32(7)))
    for row, kept in zip(np.asarray(probs), mask, strict=True):
        assert set(np.flatnonzero(kept)) == set(np.argsort(-row)[:7])


def test_top_p_applies_to_what_top_k_has_left():
    """Of 0.4, 0.3, 0.2, 0.1 the three likeliest are 4/9, 3/9, 2/9: half of that is the first two."""
    logits = jnp.log(jnp.broadcast_to(jnp.array([0.4, 0.3, 0.2, 0.1]), (2000, 4)))
    got = sample_from_logits(logits, keys_of(2000), jnp.zeros(2000, jnp.int32), make_sampling_params(1.0, 0.5, 3))
    assert set(np.asarray(got).tolist()) == {0, 1}
    whole = sample_from_logits(logits, keys_of(2000), jnp.zeros(2000, jnp.int32), make_sampling_params(1.0, 1.0, 3))
    assert set(np.asarray(whole).tolist()) == {0, 1, 2}


def test_temperature_zero_is_the_likeliest_token():
    logits = jax.random.normal(jax.random.key(1), (6, 30))
    chosen = sample_from_logits(logits, keys_of(6), jnp.zeros(6, jnp.int32), make_sampling_params(0.0, 0.8))
    np.testing.assert_array_equal(chosen, np.argmax(np.asarray(logits), axis=-1))


@pytest.mark.parametrize("vocab_size", [100, 128, 1000])
def test_the_token_drawn_is_that_of_the_running_sum_by_numpy(vocab_size):
    num = 500
    logits = np.random.default_rng(5).normal(size=vocab_size).astype(np.float32) * 2
    probs = np.exp(logits.astype(np.float64))
    below = np.cumsum(probs / probs.sum())
    uniform = np.random.default_rng(6).random(num).astype(np.float32)
    mass = jnp.broadcast_to(jnp.asarray(probs / probs.max(), jnp.float32), (num, vocab_size))
    got = np.asarray(draw_from_nucleus(mass, lambda _: jnp.asarray(uniform), jnp.float32(1.0)))
    near = np.abs(below[None, :] - uniform[:, None].astype(np.float64)).min(axis=1) < 1e-6  # float32 may go either way
    assert near.mean() < 0.05 and len(set(got)) > 50
    np.testing.assert_array_equal(got[~near], np.searchsorted(below, uniform[~near], side="right"))


def test_a_token_of_the_vocabulary_is_drawn_of_logits_that_are_not_numbers():
    logits, count = jnp.full((1, 130), jnp.nan), jnp.zeros(1, jnp.int32)
    assert 0 <= int(sample_from_logits(logits, keys_of(1), count, make_sampling_params(1.0, 0.9))[0]) < 130


def test_a_dropped_token_is_never_drawn_even_at_the_ends():
    mass = jnp.exp(jnp.array([[-12.0, 0.0, -12.0, -0.1, -12.0]] * 2))
    ends = jnp.array([0.0, np.nextafter(1.0, 0.0, dtype=np.float32)])
    assert draw_from_nucleus(mass, lambda _: ends, jnp.float32(0.9)).tolist() == [1, 3]


def test_new_temperatures_and_masses_compile_nothing_anew():
    compiled = jax.jit(sample_from_logits)
    inputs = jnp.zeros((2, 8)), keys_of(2), jnp.zeros(2, jnp.int32)
    for temperature, top_p in ((0.0, 1.0), (0.7, 0.8), (1.3, 0.1)):
        compiled(*inputs, make_sampling_params(temperature, top_p))
    assert compiled._cache_size() == 1
