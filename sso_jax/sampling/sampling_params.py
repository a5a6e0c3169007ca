"""Samples the next token of each row from logits [B, V] and the row's random key, without sorting.

Every setting is a traced value.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

BLOCK = 128
"""Number of tokens in a block: sampling first selects a block by its probability mass, then a token within it."""


class SamplingParams(NamedTuple):
    """Sampling settings, as arrays, so that new values do not cause a recompilation."""

    temperature: Float[Array, ""]
    """Divides the logits; 0 always takes the most likely token."""
    top_p: Float[Array, ""]
    """Probability mass of the nucleus."""
    top_k: Int[Array, ""] | None = None
    """Number of most likely tokens to keep; None, which is another pytree structure, for no limit."""


def make_sampling_params(temperature: float, top_p: float, top_k: int | None = None) -> SamplingParams:
    """Converts numbers to `SamplingParams`."""
    return SamplingParams(jnp.float32(temperature), jnp.float32(top_p), None if top_k is None else jnp.int32(top_k))


def _largest_threshold(holds, low: Float[Array, "B"], high: Float[Array, "B"]) -> Float[Array, "B"]:
    """Returns the largest float32 t in [low, high] with `holds(t)`, or `low` if there is none; bounds are in [0, 1].

    `holds` must be true for small t and false for large. Non-negative floats have the same order as their bits, so that
    bisecting the bits finds the exact threshold, in at most 30 passes over the vocabulary.
    """
    bits = tuple(jax.lax.bitcast_convert_type(bound, jnp.int32) for bound in (low, high))

    def halve(bounds):
        low, high = bounds
        middle = low + (high - low + 1) // 2
        found = holds(jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(found, middle, low), jnp.where(found, high, middle - 1)

    found, _ = jax.lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, bits)
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def top_k_mask(mass: Float[Array, "B V"], top_k: Int[Array, ""]) -> Bool[Array, "B V"]:
    """Returns a mask of the `top_k` most likely tokens, and of those that are as likely as the last of them.

    Masses are in [0, 1].
    """

    def holds(t):
        return jnp.sum(mass >= t[:, None], axis=-1) >= top_k

    highest = jnp.max(mass, axis=-1)
    return mass >= _largest_threshold(holds, jnp.zeros_like(highest), highest)[:, None]


def _at(mass: Float[Array, "B N"], before: Float[Array, "B"], target: Float[Array, "B"]) -> Int[Array, "B"]:
    """Returns the first entry with mass at which `before` plus the cumulative mass exceeds `target`.

    If rounding keeps all sums at or below it, returns the last entry with mass. Entries without mass are never
    returned: rounding must not let a dropped token in.
    """
    passed = (before[:, None] + jnp.cumsum(mass, axis=-1) > target[:, None]) & (mass > 0)
    last = mass.shape[1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
    return jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed, axis=-1), last)


class _Attempt(NamedTuple):
    """State of drawing from the nucleus, between two attempts."""

    number: Int[Array, ""]
    floor: Float[Array, "B"]
    """Tokens with at most this mass are known to be outside the nucleus."""
    sums: Float[Array, "B V/BLOCK"]
    """Mass of the tokens above the floor, by block."""
    token: Int[Array, "B"]
    done: Bool[Array, "B"]


def draw_from_nucleus(
    mass: Float[Array, "B V"],
    uniform_of: Callable[[Int[Array, ""]], Float[Array, "B"]],
    top_p: Float[Array, ""],
) -> Int[Array, "B"]:
    """Samples a token of each row's nucleus with probability proportional to its mass.

    Draws from all tokens. A token is in the nucleus if the more likely ones together have less than `top_p` of the
    mass; it is then accepted. Otherwise all tokens with as little mass are outside too, and the next attempt draws from
    the more likely ones. Accepted tokens have the distribution of the nucleus, because each attempt draws from a set
    that contains it (as in FlashInfer's sampling by rejection, without a sort). An attempt is one pass over the
    vocabulary, which gives both the mass of the more likely tokens and the sums to draw from next.

    A token is drawn by the sums of blocks, then within its block: a cumulative sum over the whole vocabulary is slow on
    any device.

    Args:
      mass: probabilities of the tokens, up to a factor per row.
      uniform_of: number of the attempt -> a random number in [0, 1) for each row.
      top_p: share of the mass that the nucleus has at least; 1 keeps every token.
    """
    blocks = jnp.pad(mass, ((0, 0), (0, -mass.shape[1] % BLOCK))).reshape(mass.shape[0], -1, BLOCK)

    def above(floor: Float[Array, "B"]) -> Float[Array, "B V/BLOCK"]:
        return jnp.sum(jnp.where(blocks > floor[:, None, None], blocks, 0.0), axis=-1)

    start = jnp.full(mass.shape[:1], -1.0)
    sums = above(start)
    most = top_p * jnp.sum(sums, axis=-1)

    def attempt(state: _Attempt) -> _Attempt:
        totals = jnp.cumsum(state.sums, axis=-1)
        target = uniform_of(state.number) * totals[:, -1]
        block = _at(state.sums, jnp.zeros_like(target), target)
        before = jnp.take_along_axis(totals - state.sums, block[:, None], axis=1)[:, 0]
        inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [B, BLOCK]
        within = _at(jnp.where(inside > state.floor[:, None], inside, 0.0), before, target)
        floor = jnp.take_along_axis(inside, within[:, None], axis=1)[:, 0]
        sums = above(floor)
        # Without any mass, as for NaN, there is nothing to wait for.
        rejected = (jnp.sum(sums, axis=-1) >= most) & (most > 0) & (top_p < 1.0)
        token = jnp.where(state.done, state.token, block * BLOCK + within)
        return _Attempt(state.number + 1, floor, sums, token, state.done | ~rejected)

    nothing = jnp.zeros(mass.shape[:1], jnp.int32)
    first = _Attempt(jnp.int32(0), start, sums, nothing, nothing > 0)
    token = jax.lax.while_loop(lambda state: ~jnp.all(state.done), attempt, first).token
    return jnp.minimum(token, mass.shape[1] - 1)  # out of range only if there is no mass, that is, for NaN


def _uniform(keys: UInt32[Array, "B 2"], counts: Int[Array, "B"], attempt: Int[Array, ""]) -> Float[Array, "B"]:
    """Returns a number in [0, 1) per row, from the row's key, its token count and the attempt alone."""

    def row(key, count):
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), count)
        return jax.random.uniform(jax.random.fold_in(key, attempt))

    return jax.vmap(row)(keys, counts)


def sample_from_logits(
    logits: Float[Array, "B V"], keys: UInt32[Array, "B 2"], counts: Int[Array, "B"], strategy: SamplingParams
) -> Int[Array, "B"]:
    """Samples a token per row; a row's token depends on its logits, its key and its count alone.

    Applies temperature, then top-k, then top-p on what is left, like transformers. The nucleus is the fewest most
    likely tokens with mass at least `top_p` (Holtzman et al. 2020, eq. 2), and all tokens that are exactly as likely as
    the last of them; a sort would keep some of those by their ids. A `top_p` of 1 keeps every token.

    Args:
      logits: logits of the next token.
      keys: random key of each row.
      counts: number of the token in its response, from 0.
      strategy: sampling settings.
    """

    def drawn() -> Int[Array, "B"]:
        scaled = logits / strategy.temperature
        mass = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
        if strategy.top_k is not None:
            mass = jnp.where(top_k_mask(mass, strategy.top_k), mass, 0.0)
        return draw_from_nucleus(mass, lambda attempt: _uniform(keys, counts, attempt), strategy.top_p)

    return jax.lax.cond(strategy.temperature > 0, drawn, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))
