"""Unpacks rows of prompt trees into one sequence per response for attention, and packs the results again.

The sequences describe the same visibility as `attention.tree_mask`: within its sequence, each token sees all tokens
before it. A prompt is copied to the sequences of all its responses. Its queries are evaluated in one of them only,
because the result is the same in each.
"""

from enum import StrEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int


class RowForm(StrEnum):
    """What packed rows hold, besides the tree and the branch of each token, to say which token sees which."""

    MASK = "mask"
    """Nothing: a mask is made of them."""
    SEQUENCES = "sequences"
    """`Sequences`."""
    PLACES = "places"
    """`models.places.Places`."""


class Sequences(NamedTuple):
    """Z sequences of U positions for each row, and where its T tokens are in them; P = Z*U places in a row.

    A prompt is part of the sequences of all its responses. Each token's query is evaluated in its first sequence.
    """

    column: Int[Array, "B P"]
    """Column of the token at each place; arbitrary after the end of a sequence."""
    lengths: Int[Array, "B Z"]
    position: Int[Array, "B T"]
    inside: Bool[Array, "B Z T"]
    """Whether a sequence contains the token, which is then at its position."""
    query: Int[Array, "B P"]
    """Token whose query is evaluated at each place; T for none."""
    place: Int[Array, "B T"]
    """Place where each token's query is evaluated; P for a token of no sequence."""


def make_sequences(columns: Int[Array, "B Z U"], positions: Int[Array, "B T"]) -> Sequences:
    """Builds sequences from the columns of their tokens, which are -1 after the end of each."""
    batch, num_sequences, length = columns.shape
    num_places, num_tokens = num_sequences * length, positions.shape[1]
    position = jnp.minimum(positions, length - 1)  # only a token of no sequence can exceed it
    at = jnp.broadcast_to(position[:, None], (batch, num_sequences, num_tokens))
    inside = jnp.take_along_axis(columns, at, axis=2) == jnp.arange(num_tokens)[None, None, :]  # [B, Z, T]
    first = jnp.argmax(inside, axis=1) * length + position
    place = jnp.where(jnp.any(inside, axis=1), first, num_places)
    numbers = jnp.broadcast_to(jnp.arange(num_tokens), place.shape)

    def invert(place: Int[Array, "T"], number: Int[Array, "T"]) -> Int[Array, "P"]:
        return jnp.full((num_places,), num_tokens).at[place].set(number, mode="drop")

    lengths = jnp.maximum(1, jnp.sum(columns >= 0, axis=2))  # an empty sequence is never read
    column = jnp.maximum(columns, 0).reshape(batch, -1)
    return Sequences(column, lengths, position, inside, jax.vmap(invert)(place, numbers), place)


@jax.custom_vjp
def moved(x: Float[Array, "B W E"], source: Int[Array, "B P"], back: Int[Array, "B W"]) -> Float[Array, "B P E"]:
    """Returns for each place the entry of x at index `source`, and 0 if `source` is out of range.

    `back` is the inverse: the one place that each entry moved to, if any. With it the backward pass is a gather too,
    instead of the scatter-add of autodiff.
    """
    return _looked_up(x, source)


def _looked_up(x: Float[Array, "B W E"], source: Int[Array, "B P"]) -> Float[Array, "B P E"]:
    found = entries(x, jnp.minimum(source, x.shape[1] - 1))
    return jnp.where((source < x.shape[1])[..., None], found, 0)


def entries(x: Float[Array, "B W E"], index: Int[Array, "B P"]) -> Float[Array, "B P E"]:
    """Gathers entries of each row from the flat list of all rows' entries.

    Each entry must be contiguous before and after. On a GPU, XLA may otherwise give the list a layout with entries
    interleaved, as preferred by the product before it, and read each number of an entry from a different place.
    """
    batch, num, size = x.shape
    flat = (jnp.arange(batch)[:, None] * num + index).reshape(-1)
    return _in_order(_in_order(x.reshape(-1, size)).at[flat].get(mode="promise_in_bounds").reshape(batch, -1, size))


def _in_order(x: Array) -> Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


moved.defvjp(
    lambda x, source, back: (_looked_up(x, source), back),
    lambda back, d_out: (_looked_up(d_out, back), None, None),
)


@jax.custom_vjp
def copied(x: Float[Array, "B T E"], sequences: Sequences) -> Float[Array, "B P E"]:
    """Returns for each place the token at it; the gradient of a token is summed over its sequences, in float32."""
    return entries(x, sequences.column)


def _copied_backward(sequences, d_out):
    batch, num_sequences, num_tokens = sequences.inside.shape
    length = d_out.shape[1] // num_sequences
    at = jnp.arange(num_sequences)[None, :, None] * length + sequences.position[:, None]  # [B, Z, T]
    found = entries(d_out, at.reshape(batch, -1)).reshape(batch, num_sequences, num_tokens, -1).astype(jnp.float32)
    return _in_order(jnp.sum(jnp.where(sequences.inside[..., None], found, 0.0), axis=1).astype(d_out.dtype)), None


copied.defvjp(lambda x, sequences: (copied(x, sequences), sequences), _copied_backward)
