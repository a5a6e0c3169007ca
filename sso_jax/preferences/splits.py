"""Splits pairs into those that are trained on and those that no update sees, by query."""

import hashlib

from sso_jax.data.records import Triple

QueryKey = tuple[str, str]


def query_of(pair: Triple) -> QueryKey:
    """Returns what identifies the query of a pair: its text and the messages before it."""
    return pair.query, str(pair.history)


def split_by_query(pairs: list[Triple], share: float, seed: int | None = None) -> tuple[list[Triple], list[Triple]]:
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
    trained = [pair for pair, out in zip(pairs, sides, strict=True) if not out]
    return trained, [pair for pair, out in zip(pairs, sides, strict=True) if out]


def without_queries(pairs: list[Triple], held_out: list[Triple]) -> list[Triple]:
    """Returns the pairs whose queries no held-out pair has."""
    seen = {query_of(pair) for pair in held_out}
    return [pair for pair in pairs if query_of(pair) not in seen]
