"""Samples the next token of each row from logits [B, V] and a uniform number, without sorting.

Every setting is a traced value.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 128
"""Number of tokens in a block: sampling first selects a block by its probability mass, then a token within it."""

WAYS, NUM_LOOKS = 8, 10
"""On an accelerator: parts that each pass over the vocabulary splits the search interval into, and number of passes.

They single out one of the 2^30 floats of a probability.
"""


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
    a search over the bits finds the exact threshold. On a CPU, where every sum costs, the search bisects until all rows
    are done. On an accelerator, where every pass over the vocabulary costs, and on a GPU also every time the host
    decides whether to continue, it compares several thresholds per pass, for a fixed number of passes.
    """
    bits = tuple(jax.lax.bitcast_convert_type(bound, jnp.int32) for bound in (low, high))

    def halve(*bounds):
        return jax.lax.while_loop(lambda b: jnp.any(b[0] < b[1]), partial(_narrowed, holds, 2), bounds)[0]

    def split(*bounds):
        return jax.lax.fori_loop(0, NUM_LOOKS, lambda _, b: _narrowed(holds, WAYS, b), bounds)[0]

    return jax.lax.bitcast_convert_type(jax.lax.platform_dependent(*bits, cpu=halve, default=split), jnp.float32)


def _narrowed(
    holds, ways: int, bounds: tuple[Int[Array, "B"], Int[Array, "B"]]
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Splits the bounds, bits of floats, into `ways` nearly equal parts and returns the part with the threshold."""
    low, high = bounds
    step = (high - low + ways - 1) // ways
    tried = [jnp.minimum(low + part * step, high) for part in range(1, ways)]
    found = [holds(jax.lax.bitcast_convert_type(bits, jnp.float32)) for bits in tried]
    # In ascending order, the last true threshold is the new lower bound and the first false one the new upper bound.
    for bits, true in zip(tried, found, strict=True):
        low = jnp.where(true, bits, low)
    for bits, true in zip(reversed(tried), reversed(found), strict=True):
        high = jnp.where(true, high, bits - 1)
    return low, high


def top_k_mask(probs: Float[Array, "B V"], top_k: Int[Array, ""]) -> Bool[Array, "B V"]:
    """Returns a mask of the `top_k` most likely tokens, and of those that are as likely as the last of them."""

    def holds(t):
        return jnp.sum(probs >= t[:, None], axis=-1) >= top_k

    highest = jnp.max(probs, axis=-1)
    return probs >= _largest_threshold(holds, jnp.zeros_like(highest), highest)[:, None]


def top_p_mask(probs: Float[Array, "B V"], top_p: Float[Array, ""]) -> Bool[Array, "B V"]:
    """Returns a mask of the nucleus: the fewest most likely tokens with mass at least `top_p`.

    Holtzman et al. 2020, eq. 2. Includes all tokens that are exactly as likely as the last one; a sort would keep some
    of them by their ids. A `top_p` of 1 keeps every token.
    """

    def holds(t):
        return jnp.sum(jnp.where(probs >= t[:, None], probs, 0.0), axis=-1) >= top_p

    highest = jnp.max(probs, axis=-1)
    left_out = jnp.maximum(1.0 - top_p, 0.0)
    # All tokens below `lowest` together have at most half of the mass that may be left out.
    lowest = jnp.minimum(left_out / (2 * probs.shape[1]), highest)
    return (probs >= _largest_threshold(holds, lowest, highest)[:, None]) | (top_p >= 1.0)


def _at(mass: Float[Array, "B N"], before: Float[Array, "B"], target: Float[Array, "B"]) -> Int[Array, "B"]:
    """Returns the first entry with mass at which `before` plus the cumulative mass exceeds `target`.

    If rounding keeps all sums at or below it, returns the last entry with mass. Entries without mass are never
    returned: rounding must not let a dropped token in.
    """
    passed = (before[:, None] + jnp.cumsum(mass, axis=-1) > target[:, None]) & (mass > 0)
    last = mass.shape[1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
    return jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed, axis=-1), last)


def _draw(mass: Float[Array, "B V"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """Samples the token of each row whose interval of the masses, ordered by id, contains `uniform` times their sum.

    Selects a block of tokens by the sums of all blocks, then the token within it: a cumulative sum over the whole
    vocabulary is slow on any device.
    """
    blocks = jnp.pad(mass, ((0, 0), (0, -mass.shape[1] % BLOCK))).reshape(mass.shape[0], -1, BLOCK)
    sums = jnp.sum(blocks, axis=-1)  # [B, V/BLOCK]
    totals = jnp.cumsum(sums, axis=-1)
    target = uniform * totals[:, -1]
    block = _at(sums, jnp.zeros_like(target), target)
    before = jnp.take_along_axis(totals - sums, block[:, None], axis=1)[:, 0]
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [B, BLOCK]
    token = block * BLOCK + _at(inside, before, target)
    return jnp.minimum(token, mass.shape[1] - 1)  # out of range only if there is no mass, that is, for NaN


def sample_from_logits(
    logits: Float[Array, "B V"], uniform: Float[Array, "B"], strategy: SamplingParams
) -> Int[Array, "B"]:
    """Samples a token per row: the one whose interval of the kept probabilities contains `uniform` in [0, 1).

    Intervals are in the order of the token ids. Applies temperature, then top-k, then top-p on what is left, like
    transformers.
    """

    def drawn() -> Int[Array, "B"]:
        probs = jax.nn.softmax(logits / strategy.temperature, axis=-1)
        if strategy.top_k is not None:
            probs = jnp.where(top_k_mask(probs, strategy.top_k), probs, 0.0)
            probs = probs / jnp.sum(probs, axis=-1, keepdims=True)
        return _draw(jnp.where(top_p_mask(probs, strategy.top_p), probs, 0.0), uniform)

    return jax.lax.cond(strategy.temperature > 0, drawn, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))
