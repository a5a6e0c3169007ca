"""Queries in, steered queries out, wherever their principles come from: the table, the policy, a file or an endpoint."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sso_jax.assembly import Engine
from sso_jax.config import Config, EndpointConfig, PrinciplesConfig, SampleConfig
from sso_jax.endpoint import Endpoint
from sso_jax.errors import InputError
from sso_jax.preferences.principle_files import load_principles
from sso_jax.preferences.principles import (
    NAMING_TOKENS,
    WRITING_TOKENS,
    ask_policy,
    choose_features,
    feature_table,
    naming_prompt,
    parse_features,
    parse_principles,
    principles_prompt,
    with_written,
)
from sso_jax.preferences.steering import steer
from sso_jax.records import Answer, PrincipledQuery, Query, Question, SteeredQuery, write_records

Ask = Callable[[list[Question], str, int], list[Answer]]
"""(questions, stage, longest answer in tokens) -> answers: what the policy and an endpoint have in common."""
UNPARSED_FILE, JOURNAL_FILE = "unparsed.jsonl", "endpoint.jsonl"


@dataclass(frozen=True)
class SteeringSource:
    """Where principles come from, checked before any work."""

    config: PrinciplesConfig
    given: dict[str, SteeredQuery]
    """By query id, for source `file`."""
    endpoint: Endpoint | None
    temperature: float
    """Of what the endpoint writes."""


def open_endpoint(config: EndpointConfig) -> Endpoint:
    """The server that the config names.

    Raises:
      InputError: if it is not named, does not answer, or is no OpenAI-compatible server.
    """
    if config.url is None:
        raise InputError("endpoint.url: not given; name the server that principles.source `endpoint` and judging.pairs ask")
    return Endpoint(
        config.url, config.model, config.key_variable, config.timeout_seconds, config.retries, config.requests_per_minute, config.concurrency
    )


def open_source(config: Config | SampleConfig, queries: list[Query], endpoint: Endpoint | None) -> SteeringSource:
    """The source of principles that the config describes, for these queries.

    Raises:
      InputError: for a file that does not go with the queries.
    """
    principles, given = config.principles, {}
    if principles.source == "file":
        adjectives = {name: (row.good_adjective, row.bad_adjective) for name, row in feature_table().items()}
        read = load_principles(principles.path, queries, adjectives)
        given = {name: steer(record) if isinstance(record, PrincipledQuery) else record for name, record in read.items()}
    return SteeringSource(principles, given, endpoint if principles.source == "endpoint" else None, config.endpoint.temperature)


def steer_queries(
    source: SteeringSource, engine: Engine, params, queries: list[Query], seed: int, iteration: int, folder: Path | None
) -> tuple[list[SteeredQuery], dict]:
    """Steered queries and what there is to say of them: how much was drawn at random, fell back, was not answered.

    Features are named by the policy or the endpoint; principles are the table's (`predefined`) or written by who named the features.
    What could not be read goes to `folder/unparsed.jsonl` for a look, what an endpoint answers to `folder/endpoint.jsonl`.
    """
    if source.config.source == "file":
        return [source.given[query.id] for query in queries], {"random_features": 0}

    def ask(questions: list[Question], stage: str, max_tokens: int) -> list[Answer]:
        stage = f"iteration {iteration}: {stage}"
        if source.endpoint is None:
            return ask_policy(engine.sampler, params, engine.chat, questions, seed, iteration, stage, max_tokens)
        journal = None if folder is None else folder / JOURNAL_FILE
        return source.endpoint.ask(questions, stage, max_tokens, source.temperature, journal)

    count, probability = source.config.features_per_query, source.config.concision_probability
    named = ask([Question(f"{query.id}/features", naming_prompt(query, count)) for query in queries], "features", NAMING_TOKENS)
    answers = [
        choose_features(query, answer.text, count, probability, f"{seed}/{iteration}") for query, answer in zip(queries, named, strict=True)
    ]
    unparsed = [
        {"id": query.id, "asked": "features", "text": answer.text}
        for query, answer in zip(queries, named, strict=True)
        if answer.text is not None and not parse_features(answer.text, count)
    ]
    lost = Counter(answer.lost for answer in named if answer.text is None)
    if source.config.source != "predefined":
        answers, unread, unanswered = _written(answers, ask)
        unparsed, lost = unparsed + unread, lost + unanswered
    if unparsed and folder is not None:
        write_records(unparsed, folder / UNPARSED_FILE)
    return [steer(record) for record in answers], _statistics(answers, unparsed, lost)


def _written(records: list[PrincipledQuery], ask: Ask) -> tuple[list[PrincipledQuery], list[dict], Counter]:
    """The queries with principles written for each of their features, what could not be read, and what was not answered."""
    places = [(i, feature) for i, record in enumerate(records) for feature in record.features]
    questions = [
        Question(f"{records[i].id}/{feature}", principles_prompt(Query(records[i].id, records[i].query), feature)) for i, feature in places
    ]
    answers = ask(questions, "principles", WRITING_TOKENS)
    written: list[list] = [[] for _ in records]
    unparsed = []
    for (i, feature), answer in zip(places, answers, strict=True):
        read = parse_principles(answer.text) if answer.text is not None else None
        written[i].append(read)
        if read is None and answer.text is not None:
            unparsed.append({"id": records[i].id, "asked": feature, "text": answer.text})
    lost = Counter(answer.lost for answer in answers if answer.text is None)
    return [with_written(record, own) for record, own in zip(records, written, strict=True)], unparsed, lost


def _statistics(records: list[PrincipledQuery], unparsed: list[dict], lost: Counter) -> dict:
    return {
        "random_features": sum(record.num_random_features for record in records),
        "fallback_principles": sum(record.num_fallbacks for record in records),
        "unparsed": len(unparsed),
        "unanswered": dict(lost),
    }
