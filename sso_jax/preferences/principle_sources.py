"""Queries in, steered queries out, wherever their principles come from: the table, the policy, a file or an endpoint."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from sso_jax.config import Config, PrinciplesConfig, SampleConfig
from sso_jax.data.principle_files import load_principles
from sso_jax.data.records import Answer, PrincipledQuery, Query, Question, SteeredQuery
from sso_jax.preferences.endpoint import JOURNAL_FILE, Endpoint
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
from sso_jax.recipes.engine import Engine
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.hosts import on_first_process
from sso_jax.runtime.json_lines import from_json, to_json, write_records

Ask = Callable[[list[Question], str, int], list[Answer]]
"""(questions, stage, longest answer in tokens) -> answers: what the policy and an endpoint have in common."""
UNPARSED_FILE = "unparsed.jsonl"
log = logging.getLogger(__name__)


def open_endpoint(config: Config | SampleConfig, judged_pairs: int = 0) -> Endpoint | None:
    """The server that the config names, where something is to be asked of it.

    Raises:
      InputError: if it is not named, does not answer, or is no OpenAI-compatible server.
    """
    given = config.endpoint
    if config.principles.source != "endpoint" and not judged_pairs:
        if given.url is not None:
            log.warning("endpoint.url is not used: principles.source is %r, and no pairs are to be judged", config.principles.source)
        return None
    if given.url is None:
        raise InputError("endpoint.url: not given; name the server that principles.source `endpoint` and judging.pairs ask")
    options = {field.name: getattr(given, field.name) for field in dataclasses.fields(given) if field.name != "temperature"}
    return Endpoint(**options)


def given_principles(config: PrinciplesConfig, queries: list[Query]) -> dict[str, SteeredQuery]:
    """Principles by query id where they come from a file; nothing otherwise.

    Raises:
      InputError: for a file that does not go with the queries.
    """
    if config.source != "file":
        return {}
    adjectives = {name: (row.good_adjective, row.bad_adjective) for name, row in feature_table().items()}
    read = load_principles(config.path, queries, adjectives)
    return {name: steer(record) if isinstance(record, PrincipledQuery) else record for name, record in read.items()}


def steer_queries(
    config: Config | SampleConfig,
    given: dict[str, SteeredQuery],
    endpoint: Endpoint | None,
    engine: Engine,
    params,
    queries: list[Query],
    iteration: int,
    folder: Path | None,
) -> tuple[list[SteeredQuery], dict]:
    """Steered queries and what there is to say of them: how much was drawn at random, fell back, was not answered.

    Features are named by the policy or the endpoint; principles are the table's (`predefined`) or written by who named the features.
    What could not be read goes to `folder/unparsed.jsonl` for a look, what an endpoint answers to `folder/endpoint.jsonl`.
    """
    source, seed = config.principles.source, config.run.seed
    count, probability = config.principles.features_per_query, config.principles.concision_probability
    if source == "file":
        return [given[query.id] for query in queries], {"random_features": 0}

    def ask(questions: list[Question], stage: str, max_tokens: int) -> list[Answer]:
        stage = f"iteration {iteration}: {stage}"
        if source != "endpoint":
            return ask_policy(engine.sampler, params, engine.chat, questions, seed, iteration, stage, max_tokens)
        journal = None if folder is None else folder / JOURNAL_FILE
        answers = on_first_process(
            lambda: [to_json(a) for a in endpoint.ask(questions, stage, max_tokens, config.endpoint.temperature, journal)]
        )
        return [from_json(Answer, answer) for answer in answers]

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
    if source != "predefined":
        answers, unread, unanswered = _written(answers, ask)
        unparsed, lost = unparsed + unread, lost + unanswered
    if unparsed and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
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
