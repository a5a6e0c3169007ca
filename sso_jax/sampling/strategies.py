"""Logits [B, V] and one uniform number a row in, the next token of each row out. No sort; every setting is a traced value."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Strategy(NamedTuple):
    """How a token is drawn; arrays, so that new values compile nothing anew."""

    temperature: Float[Array, ""]
    """Divides the logits; 0 takes the likeliest token."""
    top_p: Float[Array, ""]
    """Mass of the nucleus."""
    top_k: Int[Array, ""] | None = None
    """Size of the shortlist; None (a structure of its own) for no limit."""


def make_strategy(temperature: float, top_p: float, top_k: int | None = None) -> Strategy:
    """Strategy of plain numbers."""
    return Strategy(jnp.float32(temperature), jnp.float32(top_p), None if top_k is None else jnp.int32(top_k))


def _largest_threshold(holds, batch_size: int) -> Float[Array, "B"]:
    """Largest float32 t in [0, 1] for which `holds(t)`, true for small t and false for large; 0 where it never holds.

    Floats of one sign are ordered as their bits, so 31 halvings of the bits find the threshold exactly.
    """
    as_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)  # noqa: E731
    one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low + 1) // 2
        true = holds(as_float(middle))
        return jnp.where(true, middle, low), jnp.where(true, high, middle - 1)

    start = jnp.zeros((batch_size,), jnp.int32), jnp.full((batch_size,), one, jnp.int32)
    return as_float(jax.lax.fori_loop(0, 31, halve, start)[0])


def top_k_mask(probs: Float[Array, "B V"], top_k: Int[Array, ""]) -> Bool[Array, "B V"]:
    """The `top_k` likeliest tokens, and those as likely as the last of them."""
    holds = lambda t: jnp.sum(probs >= t[:, None], axis=-1) >= top_k  # noqa: E731
    return probs >= _largest_threshold(holds, probs.shape[0])[:, None]


def top_p_mask(probs: Float[Array, "B V"], top_p: Float[Array, ""]) -> Bool[Array, "B V"]:
    """The nucleus (Holtzman et al. 2020, eq. 2): fewest likeliest tokens with mass at least `top_p`; 1 keeps every token.

    Tokens exactly as likely as the last of them are in too; a sort would keep some of them by their ids.
    """
    holds = lambda t: jnp.sum(jnp.where(probs >= t[:, None], probs, 0.0), axis=-1) >= top_p  # noqa: E731
    return (probs >= _largest_threshold(holds, probs.shape[0])[:, None]) | (top_p >= 1.0)


def choose(logits: Float[Array, "B V"], uniform: Float[Array, "B"], strategy: Strategy) -> Int[Array, "B"]:
    """Token of each row: the one whose interval of the kept, ordered-by-id probabilities holds `uniform` in [0, 1).

    Temperature, then top-k, then top-p on what is left, as transformers does.
    """
    greedy = jnp.argmax(logits, axis=-1)
    temperature = jnp.where(strategy.temperature > 0, strategy.temperature, 1.0)
    probs = jax.nn.softmax(logits / temperature, axis=-1)
    if strategy.top_k is not None:
        probs = jnp.where(top_k_mask(probs, strategy.top_k), probs, 0.0)
        probs = probs / jnp.sum(probs, axis=-1, keepdims=True)
    probs = jnp.where(top_p_mask(probs, strategy.top_p), probs, 0.0)
    below = jnp.cumsum(probs, axis=-1)
    reached = (below > (uniform * below[:, -1])[:, None]) & (probs > 0)  # rounding must not let a dropped token in
    drawn = jnp.where(jnp.any(reached, axis=-1), jnp.argmax(reached, axis=-1), greedy)
    return jnp.where(strategy.temperature > 0, drawn, greedy)
