"""Queries, keys and values of packed rows in, of each response behind its prompt as a sequence of its own out; and what
comes of it back.

Which token sees which (`attention.tree_mask`) is the same said otherwise: in its sequence each token sees all before
it. A prompt stands in the sequences of all its responses; a query is asked in one of them, for it finds the same in
each.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int


class Sequences(NamedTuple):
    """Z sequences of U places in each row, and which of its T tokens stand where; P counts all Z*U places of a row.

    A prompt stands in the sequences of all its responses. Each token asks in the first of its sequences.
    """

    column: Int[Array, "B P"]
    """Column of the token at each place; anything behind a sequence's last."""
    lengths: Int[Array, "B Z"]
    position: Int[Array, "B T"]
    inside: Bool[Array, "B Z T"]
    """Whether a sequence holds the token, which then stands at its position."""
    query: Int[Array, "B P"]
    """Token that asks at each place, T for none."""
    place: Int[Array, "B T"]
    """Place where each token asks, P for a token of no sequence."""


def make_sequences(columns: Int[Array, "B Z U"], positions: Int[Array, "B T"]) -> Sequences:
    """Sequences of these columns, -1 behind the end of each."""
    batch, num_sequences, length = columns.shape
    num_places, num_tokens = num_sequences * length, positions.shape[1]
    position = jnp.minimum(positions, length - 1)  # only a token of no sequence can be beyond
    at = jnp.broadcast_to(position[:, None], (batch, num_sequences, num_tokens))
    inside = jnp.take_along_axis(columns, at, axis=2) == jnp.arange(num_tokens)[None, None, :]  # [B, Z, T]
    first = jnp.argmax(inside, axis=1) * length + position
    place = jnp.where(jnp.any(inside, axis=1), first, num_places)
    numbers = jnp.broadcast_to(jnp.arange(num_tokens), place.shape)

    def invert(place: Int[Array, "T"], number: Int[Array, "T"]) -> Int[Array, "P"]:
        return jnp.full((num_places,), num_tokens).at[place].set(number, mode="drop")

    lengths = jnp.maximum(1, jnp.sum(columns >= 0, axis=2))  # an empty sequence gives nothing to anyone
    column = jnp.maximum(columns, 0).reshape(batch, -1)
    return Sequences(column, lengths, position, inside, jax.vmap(invert)(place, numbers), place)


@jax.custom_vjp
def moved(x: Float[Array, "B W E"], source: Int[Array, "B P"], back: Int[Array, "B W"]) -> Float[Array, "B P E"]:
    """At each place the entry of x that `source` names, 0 where it names none; `back` says where each entry went, to at
    most one place.

    With it the gradient is a look-up as well, where autodiff would add entries up.
    """
    return _looked_up(x, source)


def _looked_up(x: Float[Array, "B W E"], source: Int[Array, "B P"]) -> Float[Array, "B P E"]:
    found = _entries(x, jnp.minimum(source, x.shape[1] - 1))
    return jnp.where((source < x.shape[1])[..., None], found, 0)


def _entries(x: Float[Array, "B W E"], index: Int[Array, "B P"]) -> Float[Array, "B P E"]:
    """Entries of each row, looked up in one list of all rows' entries.

    An entry has to lie in one piece, before and after: XLA on a GPU otherwise lays out the list entry by entry side by
    side, as the product before it might, and reads each number of an entry from elsewhere.
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
    """At each place the token that stands there; a token's gradient is the sum over the sequences that it is in,
    float32.
    """
    return _entries(x, sequences.column)


def _copied_backward(sequences, d_out):
    batch, num_sequences, num_tokens = sequences.inside.shape
    length = d_out.shape[1] // num_sequences
    at = jnp.arange(num_sequences)[None, :, None] * length + sequences.position[:, None]  # [B, Z, T]
    found = _entries(d_out, at.reshape(batch, -1)).reshape(batch, num_sequences, num_tokens, -1).astype(jnp.float32)
    return _in_order(jnp.sum(jnp.where(sequences.inside[..., None], found, 0.0), axis=1).astype(d_out.dtype)), None


copied.defvjp(lambda x, sequences: (copied(x, sequences), sequences), _copied_backward)
