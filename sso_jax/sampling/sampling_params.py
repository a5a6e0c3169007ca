"""Logits [B, V] and one uniform number a row in, the next token of each row out. No sort; every setting is a traced
value.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 128
"""Tokens whose masses are first summed up before one of them is drawn."""

WAYS, NUM_LOOKS = 8, 10
"""On an accelerator: parts into which a look at the vocabulary splits what bounds a threshold, and looks that leave one
of the 2^30 floats of a probability."""


class SamplingParams(NamedTuple):
    """How a token is drawn; arrays, so that new values compile nothing anew."""

    temperature: Float[Array, ""]
    """Divides the logits; 0 takes the likeliest token."""
    top_p: Float[Array, ""]
    """Mass of the nucleus."""
    top_k: Int[Array, ""] | None = None
    """Size of the shortlist; None (a structure of its own) for no limit."""


def make_sampling_params(temperature: float, top_p: float, top_k: int | None = None) -> SamplingParams:
    """Strategy of plain numbers."""
    return SamplingParams(jnp.float32(temperature), jnp.float32(top_p), None if top_k is None else jnp.int32(top_k))


def _largest_threshold(holds, low: Float[Array, "B"], high: Float[Array, "B"]) -> Float[Array, "B"]:
    """Largest float32 t in [low, high], bounds from 0 to 1, for which `holds(t)`, true for small t and false for large;
    else `low`.

    Floats of one sign are ordered as their bits, so that a search among the bits finds the threshold exactly. A CPU,
    which pays for each sum, halves them until all rows are done; an accelerator, which pays for each look at the
    vocabulary, and a GPU for each time the host asks whether to go on, compares with several thresholds in one look, a
    fixed number of times.
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
    """The part of the bounds that holds the threshold, of `ways` nearly equal ones; as bits of floats."""
    low, high = bounds
    step = (high - low + ways - 1) // ways
    tried = [jnp.minimum(low + part * step, high) for part in range(1, ways)]
    found = [holds(jax.lax.bitcast_convert_type(bits, jnp.float32)) for bits in tried]
    for bits, true in zip(
        tried, found, strict=True
    ):  # ascending: the last true one bounds from below, the first false one from above
        low = jnp.where(true, bits, low)
    for bits, true in zip(reversed(tried), reversed(found), strict=True):
        high = jnp.where(true, high, bits - 1)
    return low, high


def top_k_mask(probs: Float[Array, "B V"], top_k: Int[Array, ""]) -> Bool[Array, "B V"]:
    """The `top_k` likeliest tokens, and those as likely as the last of them."""

    def holds(t):
        return jnp.sum(probs >= t[:, None], axis=-1) >= top_k

    highest = jnp.max(probs, axis=-1)
    return probs >= _largest_threshold(holds, jnp.zeros_like(highest), highest)[:, None]


def top_p_mask(probs: Float[Array, "B V"], top_p: Float[Array, ""]) -> Bool[Array, "B V"]:
    """The nucleus (Holtzman et al. 2020, eq. 2): fewest likeliest tokens with mass at least `top_p`; 1 keeps every
    token.

    Tokens exactly as likely as the last of them are in too; a sort would keep some of them by their ids.
    """

    def holds(t):
        return jnp.sum(jnp.where(probs >= t[:, None], probs, 0.0), axis=-1) >= top_p

    highest = jnp.max(probs, axis=-1)
    left_out = jnp.maximum(1.0 - top_p, 0.0)
    lowest = jnp.minimum(
        left_out / (2 * probs.shape[1]), highest
    )  # all tokens below it have at most half of what may be left out
    return (probs >= _largest_threshold(holds, lowest, highest)[:, None]) | (top_p >= 1.0)


def _at(mass: Float[Array, "B N"], before: Float[Array, "B"], target: Float[Array, "B"]) -> Int[Array, "B"]:
    """The first entry with mass at which `before` and the masses up to it pass `target`; where rounding keeps all
    below, the last one.

    Only entries with mass are ever taken: rounding must not let a dropped token in.
    """
    passed = (before[:, None] + jnp.cumsum(mass, axis=-1) > target[:, None]) & (mass > 0)
    last = mass.shape[1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
    return jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed, axis=-1), last)


def _draw(mass: Float[Array, "B V"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """Token of each row whose interval of the masses, ordered by id, holds `uniform` times their sum.

    First the block of tokens, by the sums of all blocks, then the token in it: a running sum over a whole vocabulary is
    slow anywhere.
    """
    blocks = jnp.pad(mass, ((0, 0), (0, -mass.shape[1] % BLOCK))).reshape(mass.shape[0], -1, BLOCK)
    sums = jnp.sum(blocks, axis=-1)  # [B, V/BLOCK]
    totals = jnp.cumsum(sums, axis=-1)
    target = uniform * totals[:, -1]
    block = _at(sums, jnp.zeros_like(target), target)
    before = jnp.take_along_axis(totals - sums, block[:, None], axis=1)[:, 0]
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [B, BLOCK]
    return jnp.minimum(
        block * BLOCK + _at(inside, before, target), mass.shape[1] - 1
    )  # beyond only where there is no mass: NaN


def sample_from_logits(
    logits: Float[Array, "B V"], uniform: Float[Array, "B"], strategy: SamplingParams
) -> Int[Array, "B"]:
    """Token of each row: the one whose interval of the kept, ordered-by-id probabilities holds `uniform` in [0, 1).

    Temperature, then top-k, then top-p on what is left, as transformers does.
    """

    def drawn() -> Int[Array, "B"]:
        probs = jax.nn.softmax(logits / strategy.temperature, axis=-1)
        if strategy.top_k is not None:
            probs = jnp.where(top_k_mask(probs, strategy.top_k), probs, 0.0)
            probs = probs / jnp.sum(probs, axis=-1, keepdims=True)
        return _draw(jnp.where(top_p_mask(probs, strategy.top_p), probs, 0.0), uniform)

    return jax.lax.cond(strategy.temperature > 0, drawn, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))
