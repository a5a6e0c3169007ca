"""Principles from the policy, a file and an endpoint, and a run whose endpoint misbehaves: every query ends accounted
for.
"""

import json
from types import SimpleNamespace

import pytest
from openai_server import Misbehave, serve

import train
from sso_jax.config import PrinciplesConfig
from sso_jax.data.chat import make_chat
from sso_jax.data.records import Query
from sso_jax.data.tokenizer import encode_text
from sso_jax.preferences import http_client
from sso_jax.preferences.principle_sources import PrincipleSource, given_principles
from sso_jax.preferences.principles import feature_table
from sso_jax.preferences.responses import SampleKey
from sso_jax.recipes.stages.sampling import steer_from_source
from sso_jax.runtime.errors import InputError
from sso_jax.sampling.sampler import Samples
from sso_jax.sampling.stage import SamplingStats
from sso_jax.toy.pretraining import train_tokenizer

QUERIES = [Query("a", "Why is the sky blue?"), Query("b", "Spell fox."), Query("c", "Say hello to Anna.")]
GOOD, BAD = "Keep to what the query asks for.", "Wander off to whatever comes to mind."


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def chat():
    return make_chat(train_tokenizer())


def engine_that_says(chat, answer):
    """An engine whose policy answers the text of each prompt with `answer(text)`; prompts of 300 tokens do not fit."""

    def sample(params, requests, stage, max_new_tokens):
        texts = [answer(chat.tokenizer.decode(request.prompt_ids)) for request in requests]
        responses = [encode_text(chat.tokenizer, text) for text in texts]
        return Samples(responses, [False] * len(responses), SamplingStats())

    return SimpleNamespace(chat=chat, sampler=SimpleNamespace(sample=sample, fits=lambda prompt: len(prompt) < 300))


def test_the_policy_writes_its_principles_and_what_cannot_be_read_falls_back_and_is_kept(chat, tmp_path):
    def answer(text: str) -> str:
        if "Qualities:" in text:
            return "none of them" if "Spell fox." in text else "Safety, Accuracy"
        return (
            f'Here: {{"good": "{GOOD}", "bad": "{BAD}"'
            if "About: Safety" in text.split("Query:")[-1]
            else "I would rather not."
        )

    source = PrincipleSource(PrinciplesConfig(source="self", concision_probability=0.0), {})
    long = [*QUERIES, Query("d", "Long? " * 300)]
    steered, counts = steer_from_source(engine_that_says(chat, answer), None, long, source, SampleKey(0, 1), tmp_path)
    said = counts.as_json()
    by_id = {record.id: record for record in steered}
    assert list(by_id) == ["a", "b", "c", "d"]
    for name in ("a", "c"):
        record = by_id[name]
        assert (record.features, record.num_fallbacks, record.num_random_features) == (("Safety", "Accuracy"), 1, 0)
        assert GOOD in record.good_system and BAD in record.bad_system
        assert (
            feature_table()["Accuracy"].good in record.good_system
            and feature_table()["Safety"].good not in record.good_system
        )
    assert by_id["b"].num_random_features == by_id["d"].num_random_features == 2
    unsafe = [sum(feature != "Safety" for feature in by_id[name].features) for name in ("b", "d")]
    assert said["fallback_principles"] == 2 + unsafe[0] + 2  # d does not fit, whatever it is asked
    assert said["unanswered"] == {"question_too_long": 1 + 2}
    unparsed = lines(tmp_path / "unparsed.jsonl")
    assert said["unparsed"] == len(unparsed) == 1 + 2 + unsafe[0]
    assert {"id": "b", "asked": "features", "text": "none of them"} in unparsed
    assert {"id": "a", "asked": "Accuracy", "text": "I would rather not."} in unparsed


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def from_file(path: str):
    rules = PrinciplesConfig(source="file", path=path)
    source = PrincipleSource(rules, given_principles(rules, QUERIES))
    return steer_from_source(None, None, QUERIES, source, SampleKey(0, 1), None)[0]


ROWS = [
    {"id": "b", "features": ["Safety"], "good_principles": [GOOD], "bad_principles": [BAD]},
    {"id": "a", "good_system": "Be good.", "bad_system": "Be bad.", "features": ["Mood"]},
    {
        "question_id": "c",
        "features": ["Mood", "Tempo"],
        "good_principles": ["Smile.", "Hurry."],
        "bad_principles": ["Frown.", "Wait."],
        "good_adjectives": ["merry", "quick"],
        "bad_adjectives": ["sad", "slow"],
    },
]


def test_principles_of_a_file_are_used_as_they_stand(tmp_path):
    a, b, c = from_file(write(tmp_path / "p.jsonl", ROWS))
    assert (a.good_system, a.bad_system, a.features) == ("Be good.", "Be bad.", ("Mood",))
    assert GOOD in b.good_system and "safe" in b.good_system and BAD in b.bad_system and "unsafe" in b.bad_system
    assert "merry and quick" in c.good_system and "Smile. Hurry." in c.good_system and "sad and slow" in c.bad_system
    assert [record.query for record in (a, b, c)] == [query.query for query in QUERIES]


BAD_FILES = {
    "id_of_no_query": ([*ROWS, {**ROWS[0], "id": "bb"}], r"line 4: no query has the id 'bb' \(did you mean 'b'\?\)"),
    "query_without_principles": (ROWS[:2], "has no principles for 1 of 3 queries, the first is id 'c'"),
    "id_used_twice": ([*ROWS, ROWS[0]], "line 4: id 'b' was used before"),
    "no_id": ([{"good_system": "g", "bad_system": "b"}], "line 1: no id"),
    "no_texts": ([{"id": "a"}], "line 1: good_principles is 'None' for 0 features"),
    "lists_of_other_lengths": ([{**ROWS[0], "bad_principles": []}], r"line 1: bad_principles is '\[\]' for 1 features"),
    "equal_sides": (
        [{"id": "a", "good_system": "x", "bad_system": "x"}],
        "line 1: good_system and bad_system are equal",
    ),
    "equal_principles": ([{**ROWS[0], "bad_principles": [GOOD]}], "line 1: the principles of Safety are equal"),
    "unknown_feature": ([{**ROWS[0], "features": ["Zest"]}], "line 1: feature 'Zest' has no adjectives"),
    "text_of_another_type": ([{**ROWS[0], "good_principles": [7]}], "line 1: good_principles contains 7"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_does_not_go_with_the_queries_is_refused_with_its_line(tmp_path, case):
    rows, message = BAD_FILES[case]
    with pytest.raises(InputError, match=message) as refused:
        from_file(write(tmp_path / "p.jsonl", rows))
    assert "p.jsonl" in str(refused.value)


NUM_QUERIES = 12


def strong_model(text: str) -> str:
    """What a strong generator answers; its principles for query 3 cannot be read, and as a judge it prefers the first
    answer.
    """
    if "Qualities:" in text:
        return "Safety, Accuracy"
    if "[answer A]" in text:
        return '{"better": "A"}'
    return "no" if "query 3 " in text else f'```json\n{{"good": "{GOOD}", "bad": "{BAD}"}}\n```'


@pytest.fixture(scope="module")
def endpoint_run(model_folder, tmp_path_factory):
    """A round with principles and judgments from a server where every seventh first try fails in another way, and query
    5 always.
    """
    patch = pytest.MonkeyPatch()
    patch.setattr(http_client, "FIRST_WAIT_SECONDS", 0.01)
    patch.setenv("LOCAL_KEY", "sk-very-secret")
    folder = tmp_path_factory.mktemp("endpoint")
    queries = write(
        folder / "q.jsonl", [{"id": f"q{i}", "query": f"What is query {i} about?"} for i in range(NUM_QUERIES)]
    )
    troubles = [
        Misbehave.status(500),
        Misbehave.status(429, Retry_After="0.05"),
        Misbehave.body("<html>"),
        Misbehave.stall(0.6),
    ]

    def plan(text: str, tries: int):
        if "query 5 " in text and "[answer A]" not in text:
            return Misbehave.status(400)
        return troubles[len(text) // 7 % 4] if tries == 1 and len(text) % 7 == 0 else None

    with serve(strong_model, plan, key="sk-very-secret") as server:
        arguments = [
            "--model.path",
            str(model_folder),
            "--queries.path",
            queries,
            "--run.directory",
            str(folder / "run"),
        ]
        arguments += [
            "--run.iterations",
            "1",
            "--queries.per_iteration",
            str(NUM_QUERIES),
            "--sampling.max_new_tokens",
            "12",
        ]
        arguments += [
            "--principles.source",
            "endpoint",
            "--endpoint.url",
            server.url(),
            "--endpoint.key_variable",
            "LOCAL_KEY",
        ]
        arguments += ["--endpoint.timeout_seconds", "0.4", "--judging.pairs", "4", "--train.max_tokens", "512"]
        assert train.main(arguments) == 0
    patch.undo()
    return folder / "run", server


def test_every_query_of_a_run_with_a_bad_server_is_accounted_for(endpoint_run):
    directory, _ = endpoint_run
    records = {row["id"]: row for row in lines(directory / "iteration_1" / "principles.jsonl")}
    assert set(records) == {f"q{i}" for i in range(NUM_QUERIES)}
    row = json.loads((directory / "summary.json").read_text())[1]
    assert row["num_pairs"] + sum(row["dropped"].values()) == row["num_queries"] == NUM_QUERIES
    for name, record in records.items():
        written = 0 if name in ("q3", "q5") else len(record["features"])
        assert record["num_fallbacks"] == len(record["features"]) - written
        assert (GOOD in record["good_system"]) == (written > 0)
    unread = len(records["q3"]["features"])
    assert row["unparsed"] == len(lines(directory / "iteration_1" / "unparsed.jsonl")) == unread
    assert row["unanswered"] == {"refused": 1 + len(records["q5"]["features"])}
    assert row["fallback_principles"] == unread + len(records["q5"]["features"])


def test_a_judge_that_prefers_the_first_answer_is_seen_through(endpoint_run):
    directory, server = endpoint_run
    judged = json.loads((directory / "summary.json").read_text())[1]["endpoint_judge"]
    assert judged == {
        "num_judged": 4,
        "num_unread": 0,
        "accuracy": 0.5,
        "ties": 1.0,
        "consistency": 0.0,
        "first_position": 1.0,
    }
    rows = lines(directory / "iteration_1" / "judgments.jsonl")
    pairs = {row["id"]: row for row in lines(directory / "iteration_1" / "pairs.jsonl")}
    for row in rows:
        pair = pairs[row["id"]]
        asked = [
            body["messages"][0]["content"]
            for body in server.bodies
            if f"[query]\n{pair['query']}\n" in body["messages"][0]["content"]
        ]
        first = {text.split("[answer A]\n")[1].split("\n[end")[0] for text in asked}
        assert first == {pair["chosen"], pair["rejected"]}
    assert all(
        body["temperature"] == (0.0 if "[answer A]" in body["messages"][0]["content"] else 0.7)
        for body in server.bodies
    )


def test_the_key_is_in_no_file_of_the_run(endpoint_run):
    directory, _ = endpoint_run
    texts = [path.read_bytes() for path in directory.rglob("*") if path.is_file()]
    assert texts and not any(b"sk-very-secret" in text for text in texts)
