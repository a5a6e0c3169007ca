"""Copies prompts so that every response of a packed row stands directly behind its prompt, for attention by segments.

The keys and values of a row's T tokens are laid out on P places, one sequence (a prompt and one of its responses) after
another. Queries stay where they are. Each sees the places of its sequence up to its own, which is an interval; so a
kernel needs one number for each query and one for each place, in place of a mask. For a tree with the prompt p p and
the responses a a and b:

    tokens              p p a a b
    places              p p a a p p b
    segment             1 1 1 1 2 2 2
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sso_jax.models.sequences import entries


class Places(NamedTuple):
    """Where the tokens of rows stand; a token has up to C places, and its query belongs to the first."""

    token: Int[Array, "B P"]
    """Token at each place; arbitrary at an empty one."""
    segment: Int[Array, "B P"]
    """Number of the sequence at each place; -1 at an empty one."""
    places: Int[Array, "B T C"]
    """Places of each token, P for none."""
    own: Int[Array, "B T"]
    """Place of each token's query; 0 for a token of no sequence, which sees that place alone."""
    start: Int[Array, "B T"]
    """First place of the sequence in which the query is."""


class Columns(NamedTuple):
    """Who stands where, as packing writes it."""

    token_at: Int[Array, "B P"]
    """Column of the token at each place, -1 for none; sequences follow one another."""
    places: Int[Array, "B T C"]
    """Places of each token, P for none."""


def make_places(columns: Columns, positions: Int[Array, "B T"]) -> Places:
    """Adds what follows from the positions of the tokens: a sequence begins at its token of position 0."""
    token_at, places = columns
    token, is_filled = jnp.maximum(token_at, 0), token_at >= 0
    begins = is_filled & (jnp.take_along_axis(positions, token, axis=1) == 0)
    segment = jnp.where(is_filled, jnp.cumsum(begins, axis=1), -1)
    has_place = places[:, :, 0] < token_at.shape[1]
    own = jnp.where(has_place, places[:, :, 0], 0)
    return Places(token, segment, places, own, jnp.where(has_place, own - positions, 0))


@jax.custom_vjp
def spread(x: Float[Array, "B T E"], places: Places) -> Float[Array, "B P E"]:
    """Returns the token at each place; the gradient of a token is summed over its places, in float32."""
    return entries(x, places.token)


def _spread_backward(places: Places, d_out: Float[Array, "B P E"]):
    num_places = d_out.shape[1]

    def of_copy(place: Int[Array, "B T"]):
        found = entries(d_out, jnp.minimum(place, num_places - 1)).astype(jnp.float32)
        return jnp.where((place < num_places)[..., None], found, 0.0)

    copies = [of_copy(places.places[:, :, copy]) for copy in range(places.places.shape[2])]
    return sum(copies[1:], copies[0]).astype(d_out.dtype), None


spread.defvjp(lambda x, places: (spread(x, places), places), _spread_backward)
