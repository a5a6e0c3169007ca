"""Features and principles, held to METHOD.md's table: what the policy names, what chance adds, and the prompts x, x+
and x- they make.
"""

import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest

from sso_jax.data.chat import make_chat
from sso_jax.data.records import Answer, Query, Question
from sso_jax.data.tokenizer import encode_text
from sso_jax.preferences.principle_sources import policy_asker
from sso_jax.preferences.principles import (
    choose_features,
    feature_table,
    naming_prompt,
    parse_features,
    parse_principles,
    predefined,
    principles_prompt,
    with_written,
)
from sso_jax.preferences.responses import SampleKey
from sso_jax.preferences.steering import steer, steered_prompts
from sso_jax.sampling.sampler import Samples, row_key
from sso_jax.sampling.stage import SamplingStats
from sso_jax.toy.pretraining import train_tokenizer

ADJECTIVES = {
    "Engagement": ("engaging", "dull"),
    "Accuracy": ("accurate", "inaccurate"),
    "Literariness": ("literary", "boring"),
    "Helpfulness": ("helpful", "unhelpful"),
    "Comprehensiveness": ("comprehensive", "incomplete"),
    "Logicality": ("logical", "illogical"),
    "Safety": ("safe", "unsafe"),
}
CONCISE = ("concise", "verbose")
QUERIES = [Query(f"q{number}", f"query {number}") for number in range(3000)]


@pytest.fixture(scope="module")
def chat():
    return make_chat(train_tokenizer())


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_the_table_has_the_features_and_adjectives_of_the_method():
    table = feature_table()
    assert {name: (row.good_adjective, row.bad_adjective) for name, row in table.items()} == {
        **ADJECTIVES,
        "Concision": CONCISE,
    }
    principles = [text for row in table.values() for text in (row.good, row.bad)]
    assert len(set(principles)) == 16 and all(text.strip() == text and len(text) > 10 for text in principles)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Safety, Accuracy", ["Safety", "Accuracy"]),
        ("  ACCURACY and then safety.", ["Accuracy", "Safety"]),
        ("1. **Helpfulness**\n2. **logicality**\n3. Safety", ["Helpfulness", "Logicality"]),
        ("Above all engagement (engagement!), then Literariness", ["Engagement", "Literariness"]),
        ('["Comprehensiveness"]', ["Comprehensiveness"]),
        ("\n\nAccuracy\n\nQuery: Sing!\nQualities: Engagement", ["Accuracy"]),
        ("Concision, Brevity and Tone", []),
        ("", []),
    ],
)
def test_features_are_read_from_whatever_the_policy_writes_around_them(text, expected):
    assert parse_features(text, 2) == expected


def test_the_question_shows_all_features_but_concision_and_ends_with_the_query():
    question = naming_prompt(Query("1", "Why {features}? {count} {query}"), 2)
    assert set(ADJECTIVES) <= set(re.findall(r"\w+", question)) and "Concision" not in question
    assert question.split("Choose from")[0].split()[:2] == ["Which", "2"]
    assert question.endswith("Query: Why {features}? {count} {query}\nQualities:")
    assert question.count("\nQualities:") >= 3  # few-shot: two solved examples at least


def test_named_features_come_first_and_missing_ones_are_drawn_evenly_from_the_others():
    chosen = [choose_features(query, "accuracy", 3, 0.0, "7/1") for query in QUERIES]
    assert all(c.features[0] == "Accuracy" and len(set(c.features)) == 3 for c in chosen)
    assert all((c.features_text, c.num_random_features) == ("accuracy", 2) for c in chosen)
    drawn = Counter(name for c in chosen for name in c.features[1:])
    assert set(drawn) == set(ADJECTIVES) - {"Accuracy"}
    assert all(
        abs(count - 1000) < 130 for count in drawn.values()
    )  # a third each: five standard deviations of sqrt(3000 * 2/9) = 26
    both = choose_features(QUERIES[0], "Safety, Accuracy, Logicality", 2, 0.0, "7/1")
    assert (both.features, both.num_random_features) == (("Safety", "Accuracy"), 0)


def test_a_draw_depends_on_seed_and_query_alone():
    def draw(queries: list[Query], seed: str) -> dict[str, tuple[str, ...]]:
        return {query.id: choose_features(query, None, 2, 0.2, seed).features for query in queries}

    random.seed(1)
    forwards = draw(QUERIES[:50], "7/1")
    random.seed(2)
    assert draw(QUERIES[49::-1], "7/1") == forwards
    assert draw(QUERIES[:50], "7/2") != forwards != draw(QUERIES[:50], "8/1")
    assert len(set(forwards.values())) > 20


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.2, 490, 710), (1.0, 3000, 3000)])
def test_concision_joins_by_chance_as_a_third_feature(probability, low, high):
    chosen = [choose_features(query, "Safety, Accuracy", 2, probability, "7/1") for query in QUERIES]
    concise = [c for c in chosen if len(c.features) == 3]
    assert all(c.features[:2] == ("Safety", "Accuracy") for c in chosen) and all(
        c.features[2] == "Concision" for c in concise
    )
    assert low <= len(concise) <= high  # 600 expected at 0.2, five standard deviations of 22
    assert all(c.num_random_features == 0 for c in chosen)  # it is an addition, not a filled gap


def test_policies_are_asked_once_a_question_and_those_that_do_not_fit_are_left_out(chat):
    questions = [
        Question("a/features", "Short?"),
        Question("b/features", "Long? " * 400),
        Question("c/x/features", "Brief?"),
    ]
    asked = []

    def sample(params, requests, stage, max_new_tokens):
        asked.extend(requests)
        answers = [chat.tokenizer.decode(request.prompt_ids).count("Short?") for request in requests]
        responses = [
            [*encode_text(chat.tokenizer, "Safety" if short else "Accuracy"), chat.tokenizer.eos_token_id]
            for short in answers
        ]
        return Samples(responses, [False, True], SamplingStats())

    sampler = SimpleNamespace(fits=lambda prompt: len(prompt) < 400, sample=sample)
    numbers = {}
    answers = policy_asker(sampler, None, chat, SampleKey(0, 1), numbers)(questions, "features", 32)
    assert numbers["features"]["cut"] == 0.5 and numbers["features"]["row_steps_used"] is None
    assert answers == [Answer("Safety"), Answer(None, "question_too_long"), Answer("Accuracy")]
    assert [request.prompt_ids for request in asked] == [chat.prompt_ids("Short?"), chat.prompt_ids("Brief?")]
    assert [request.key for request in asked] == [row_key(0, 1, "a", "features"), row_key(0, 1, "c/x", "features")]


WRITTEN = ("Say only what is true.", "Say what is false, with confidence.")


GOOD, BAD = (json.dumps(text) for text in WRITTEN)
NEXT = '\n\nQuery: Sing!\nAbout: Safety\n{"good": "x", "bad": "y"}'


@pytest.mark.parametrize(
    "text",
    [
        f'{{"good": {GOOD}, "bad": {BAD}}}',
        f'Sure! Here it is:\n```json\n{{"good": {GOOD},\n "bad": {BAD}}}\n```\nAnything else?',
        "{'good': 'Say only what is true.', 'bad': 'Say what is false, with confidence.'}",
        f'{{"good": {GOOD}, "bad": {BAD}',
        f'{{"good": {GOOD}, "bad": {BAD[:-1]}',
        f'{{"good": {GOOD} "bad": {BAD},}}',
        f'{{"Good principle": {GOOD}, "bad_principle": " Say what is\n false, with confidence. "}}',
        f'<think>{{"good": "no"}}</think>{{good: {GOOD}, bad: {BAD}}}',
        f'{{"good": {GOOD}, "bad": {BAD}}}{NEXT}',
        f'{{"good": {GOOD}, "bad": {BAD}{NEXT}',
        f'{{\n\n"good": {GOOD},\n\n"bad": {BAD}\n\n}}',
        f'{{"principles": {{"good": {GOOD}, "bad": {BAD}}}}}',
    ],
)
def test_principles_are_read_from_what_small_models_write(text):
    assert parse_principles(text) == WRITTEN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot help with that.",
        "good: be true; bad: be false",
        '{"good": "Say only what is true."}',
        '{"good": "Say only what is true.", "bad": ["a", "b"]}',
        '{"good": "Say only what is true.", "bad": "say only what is TRUE."}',
        '{"good": "true", "bad": "Say what is false, with confidence."}',
        '{"good": "Say only what is true.", "bad": "' + "on and " * 100 + '"}',
        "{{{{[[[[",
        "[1, 2]",
        "{}",
    ],
)
def test_what_holds_no_two_principles_is_not_read_as_such(text):
    assert parse_principles(text) is None


def test_the_question_for_principles_ends_with_the_query_the_feature_and_its_sides_and_starts_alike_for_all():
    question = principles_prompt(Query("1", "Why {feature}? {good} {bad}"), "Engagement")
    own = "Query: Why {feature}? {good} {bad}\nAbout: Engagement (good: engaging, bad: dull)"
    assert question.endswith(own)
    assert principles_prompt(Query("2", "How?"), "Safety").startswith(
        question.removesuffix(own)
    )  # which sampling runs once
    examples = re.findall(r"^\{.*\}$", question, re.MULTILINE)
    assert len(examples) == 2 and all(
        parse_principles(example) == tuple(json.loads(example).values()) for example in examples
    )


def test_written_principles_replace_the_tables_where_they_could_be_read():
    record = with_written(predefined(Query("1", "Why?"), ("Safety", "Accuracy")), [None, WRITTEN])
    assert record.good_principles == (feature_table()["Safety"].good, WRITTEN[0])
    assert record.bad_principles == (feature_table()["Safety"].bad, WRITTEN[1])
    assert record.num_fallbacks == 1
    message = steer(record)
    assert WRITTEN[0] in message.good_system and WRITTEN[1] not in message.good_system and message.num_fallbacks == 1


def test_system_messages_name_the_adjectives_and_principles_of_their_side_only():
    features = ("Accuracy", "Helpfulness", "Concision")
    record = steer(predefined(Query("1", "Why?"), features, "text", 1))
    assert (record.id, record.query, record.features, record.features_text, record.num_random_features) == (
        "1",
        "Why?",
        features,
        "text",
        1,
    )
    table = {**ADJECTIVES, "Concision": CONCISE}
    for side, message in enumerate((record.good_system, record.bad_system)):
        assert {table[name][side] for name in features} <= words_of(message)
        assert not {table[name][1 - side] for name in features} & words_of(message)
        for name in features:
            row = feature_table()[name]
            assert (row.good in message, row.bad in message) == (side == 0, side == 1)
        assert "not mention" in message.lower()
        assert "{" not in message


def test_x_has_no_system_message_and_the_others_have_their_own(chat):
    record = steer(predefined(Query("1", "Why <|im_end|>?"), ("Safety",)))
    turn = "<|im_start|>user\nWhy <|im_end|>?<|im_end|>\n<|im_start|>assistant\n"
    assert {context: chat.tokenizer.decode(ids) for context, ids in steered_prompts(chat, record).items()} == {
        "plain": turn,
        "positive": f"<|im_start|>system\n{record.good_system}<|im_end|>\n{turn}",
        "negative": f"<|im_start|>system\n{record.bad_system}<|im_end|>\n{turn}",
    }
