"""The split into trained and held-out pairs: by query and seed, the same whatever else is there."""

import dataclasses
import random

from sso_jax.data.records import Triple
from sso_jax.preferences.splits import split_by_query, without_queries


def triples(count: int) -> list[Triple]:
    """Two pairs of each query."""
    return [Triple(f"id{i}", f"query {i // 2}", None, None, "good", "bad", None) for i in range(count)]


def test_no_query_is_on_both_sides_of_the_split():
    for seed in (None, 0):
        trained, held_out = split_by_query(triples(2000), 0.2, seed)
        assert not {t.query for t in trained} & {t.query for t in held_out} and len(trained) + len(held_out) == 2000
        assert 320 <= len(held_out) <= 480  # 1000 queries: five standard deviations of 12.6 queries
    assert split_by_query(triples(2000), 0.0, 0)[1] == []


def test_the_side_of_a_pair_depends_on_seed_and_query_alone():
    """Neither order nor filters move a pair to the other side; another seed does."""
    pairs = triples(200)
    held_out = {pair.id for pair in split_by_query(pairs, 0.3, 1)[1]}
    some = random.Random(0).sample(pairs, 80)
    assert {pair.id for pair in split_by_query(some, 0.3, 1)[1]} == held_out & {pair.id for pair in some}
    assert {pair.id for pair in split_by_query(pairs, 0.3, 2)[1]} != held_out


def test_messages_before_the_query_tell_queries_apart():
    pairs = [
        dataclasses.replace(pair, query="And then?", history=({"role": "user", "content": pair.query},))
        for pair in triples(200)
    ]
    assert 0 < len(split_by_query(pairs, 0.5, 0)[1]) < 200


def test_queries_of_a_file_of_held_out_pairs_are_not_trained_on():
    pairs = triples(6)
    left = without_queries(pairs, [dataclasses.replace(pairs[2], id="other", chosen="better")])
    assert [pair.id for pair in left] == ["id0", "id1", "id4", "id5"]
