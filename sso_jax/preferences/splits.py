"""Splits pairs into those that are trained on and those that no update sees, by query."""

import hashlib
from collections.abc import Sequence

from sso_jax.data.records import Triple
from sso_jax.runtime.spool import subset

QueryKey = tuple[str, str]


def query_of(pair: Triple) -> QueryKey:
    """Returns what identifies the query of a pair: its text and the messages before it."""
    return pair.query, str(pair.history)


def split_by_query(
    pairs: Sequence[Triple], share: float, seed: int | None = None
) -> tuple[Sequence[Triple], Sequence[Triple]]:
    """Splits pairs into (trained, held-out) by the hash of the query, so that no query is on both sides.

    A query is on the same side in every round, however many of its pairs a filter keeps.

    Args:
      pairs: the pairs.
      share: expected share of the held-out ones.
      seed: seed of the split; None for the split that depends on the queries alone.
    """
    head = "" if seed is None else f"{seed}\0"

    def is_held_out(key: QueryKey) -> bool:
        digest = hashlib.sha256(f"{head}{key[0]}\0{key[1]}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < share

    sides = [is_held_out(query_of(pair)) for pair in pairs]
    trained, held_out = ([number for number, out in enumerate(sides) if out is side] for side in (False, True))
    return subset(pairs, trained), subset(pairs, held_out)


def without_queries(pairs: Sequence[Triple], held_out: Sequence[Triple]) -> Sequence[Triple]:
    """Returns the pairs whose queries no held-out pair has."""
    seen = {query_of(pair) for pair in held_out}
    return subset(pairs, [number for number, pair in enumerate(pairs) if query_of(pair) not in seen])
