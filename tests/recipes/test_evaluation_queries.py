"""Held-out queries of a model from a folder: which are drawn, and that no round has them."""

import json

import pytest

from sso_jax.config import Config, parse
from sso_jax.recipes.evaluation_queries import read_evaluation_queries
from sso_jax.recipes.stages.sampling import read_queries
from sso_jax.runtime.errors import InputError

pytestmark = pytest.mark.quick
TEXTS = [f"What is {number} times 3?" for number in range(40)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps({"query": text}) + "\n" for text in TEXTS))
    return str(path)


def config_of(file: str, **fields: str) -> Config:
    given = {"model.path": "folder", "queries.path": file, "run.iterations": "1", "evaluation.path": file, **fields}
    return parse(Config, [part for name, value in given.items() for part in (f"--{name}", value)], "train.py", "")


def texts(queries) -> list[str]:
    return [query.query for query in queries]


def test_no_round_has_a_held_out_query(file):
    config = config_of(file, **{"evaluation.max_queries": "12"})
    held_out, source = texts(read_evaluation_queries(config)), read_queries(config)
    assert len(set(held_out)) == 12 and set(held_out) < set(TEXTS)
    assert set(texts(source.rounds[0])) == set(TEXTS) - set(held_out) and len(source.rounds[0]) == 28
    assert source.dropped == {"held_out_for_evaluation": 12}


def test_the_seed_draws_them_and_the_size_of_a_round_does_not(file):
    def drawn(**fields):
        return texts(read_evaluation_queries(config_of(file, **{"evaluation.max_queries": "12", **fields})))

    assert drawn() == drawn(**{"queries.per_iteration": "3"}) != drawn(**{"run.seed": "1"})


def test_a_file_of_its_own_leaves_the_rounds_as_they_are(file, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"query": "Name a bird."}) + "\n")
    config = config_of(file, **{"evaluation.path": str(own)})
    assert texts(read_evaluation_queries(config)) == ["Name a bird."]
    assert texts(read_queries(config).rounds[0]) == TEXTS and not read_queries(config).dropped


def test_no_file_holds_out_nothing(file):
    config = config_of(file, **{"evaluation.path": "null"})
    assert read_evaluation_queries(config) == [] and texts(read_queries(config).rounds[0]) == TEXTS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.path": "toy"}, "evaluation.path: .* is not used with model.path toy"),
        ({"recipe": "reward"}, "evaluation.path: .* is not used by recipe 'reward'"),
        ({"evaluation.path": "./missing.jsonl"}, "evaluation.path: no file './missing.jsonl'"),
        ({"evaluation.max_queries": "0"}, "evaluation.max_queries: 0"),
    ],
)
def test_what_cannot_be_held_out_is_named(file, fields, message):
    with pytest.raises(InputError, match=message):
        read_evaluation_queries(config_of(file, **fields))


def test_queries_that_are_all_held_out_leave_none_for_the_rounds(file):
    with pytest.raises(InputError, match=r"queries.path: 0 usable queries for 1 rounds"):
        read_queries(config_of(file))
